"""The average precision of a detector on annotated images.

AP needs all detections, also the unlikely ones: `evaluate` runs the detector at a confidence of
0.001, not at the one that suits a user. The rules are those of `average_precision`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from yolov4_fast.average_precision import (
    EvaluationError,
    Matches,
    Points,
    Predicted,
    Prediction,
    class_ap,
    coco_ap,
    match,
    mean_ap,
    precision_recall_f1,
    voc_ap,
)
from yolov4_fast.datasets import Dataset

__all__ = [
    "Evaluation",
    "EvaluationError",
    "Prediction",
    "evaluate",
    "evaluate_predictions",
    "voc_ap",
]

CONFIDENCE = 0.001  # of the detector while it is evaluated
REPORT_CONFIDENCE = 0.25  # at which precision, recall and F1 are told, as Darknet does


# Six of COCO's 80 classes go by two names: Darknet's coco.names spells them as Pascal VOC does,
# COCO's own JSON differently.
ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


class DetectsFiles(Protocol):
    """What `evaluate` needs of a detector."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def detect(self, batch: Any) -> Sequence[Predicted]: ...


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. NaN: there was nothing to measure."""

    metric: str  # "voc" or "coco"
    class_names: tuple[str, ...]
    ap: tuple[float, ...]  # per class: voc at `iou_threshold`, coco over IoU 0.50 to 0.95
    mAP: float  # mean of `ap` over the classes that have objects
    mAP50: float
    iou_threshold: float
    points: Points
    precision: float  # over all classes, at `confidence` and `iou_threshold`
    recall: float
    f1: float
    confidence: float
    images: int
    objects: tuple[int, ...]  # per class, without difficult ones and crowds
    detections: tuple[int, ...]  # per class
    coco: dict[str, float] = field(default_factory=dict)  # COCO's twelve numbers; empty for voc
    # What the numbers are made from: every detection held against the objects.
    matches: Matches | None = field(default=None, repr=False, compare=False)

    @property
    def AP(self) -> float | None:
        """COCO's AP over IoU 0.50 to 0.95; None for voc."""
        return self.coco.get("AP")

    def to_json(self) -> dict[str, Any]:
        """Plain types only; NaN becomes None."""
        result: dict[str, Any] = {
            "metric": self.metric,
            "mAP50": _number(self.mAP50),
            "mAP": _number(self.mAP),
            "iou_threshold": self.iou_threshold,
            "points": self.points,
            "confidence": self.confidence,
            "precision": _number(self.precision),
            "recall": _number(self.recall),
            "f1": _number(self.f1),
            "images": self.images,
            "classes": [
                {"name": name, "AP": _number(ap), "objects": objects, "detections": detections}
                for name, ap, objects, detections in zip(
                    self.class_names, self.ap, self.objects, self.detections, strict=True
                )
            ],
        }
        if self.coco:
            result["AP"] = _number(self.coco["AP"])
            result["coco"] = {name: _number(value) for name, value in self.coco.items()}
        return result

    def __str__(self) -> str:
        """A table for people."""
        width = max(5, *(len(name) for name in self.class_names))
        rule = "AP" if self.metric == "coco" else f"AP{self.iou_threshold * 100:.3g}"
        lines = [f"{'class':<{width}}  {'objects':>8}  {'detections':>10}  {rule:>6}"]
        for name, ap, objects, detections in zip(
            self.class_names, self.ap, self.objects, self.detections, strict=True
        ):
            lines.append(f"{name:<{width}}  {objects:>8}  {detections:>10}  {ap:6.4f}")
        objects, detections = sum(self.objects), sum(self.detections)
        lines.append(f"{'mean':<{width}}  {objects:>8}  {detections:>10}  {self.mAP:6.4f}")
        if self.coco:
            lines.append("  ".join(f"{name} {value:.4f}" for name, value in self.coco.items()))
        lines.append(
            f"mAP50 {self.mAP50:.4f} on {self.images} images; at confidence {self.confidence:g}: "
            f"precision {self.precision:.4f}, recall {self.recall:.4f}, F1 {self.f1:.4f}"
        )
        return "\n".join(lines)


def evaluate(
    detector: DetectsFiles,
    dataset: Dataset,
    *,
    metric: str = "voc",
    iou_threshold: float = 0.5,
    points: Points = "area",
    confidence: float | None = CONFIDENCE,
    report_confidence: float = REPORT_CONFIDENCE,
    batch: int = 16,
    progress: bool = True,
) -> Evaluation:
    """Runs `detector` over all images of `dataset` and measures its AP.

    Classes are matched by name and must be the same, in any order. `confidence` is what the
    detector runs at, its `confidence` set aside; None leaves it as it is, and AP is then of the
    detections above that only. NMS is the detector's. `iou_threshold` and `points` are those of the
    VOC rule; `batch` images are handed over at a time.
    """
    class_of = match_classes(detector.class_names, dataset.class_names)
    if confidence is not None and hasattr(detector, "confidence"):
        detector = copy.copy(detector)
        detector.confidence = confidence
    predictions: list[Predicted] = []
    with tqdm(total=len(dataset), desc="evaluating", disable=not progress, unit="img") as bar:
        for start in range(0, len(dataset), batch):
            paths = [dataset.image_path(i) for i in range(start, min(start + batch, len(dataset)))]
            for found in detector.detect(paths):
                class_ids = class_of[np.asarray(found.class_ids, dtype=np.int64)]
                predictions.append(Prediction(found.boxes, found.scores, class_ids))
            bar.update(len(paths))
    return evaluate_predictions(
        predictions,
        dataset,
        metric=metric,
        iou_threshold=iou_threshold,
        points=points,
        report_confidence=report_confidence,
    )


def evaluate_predictions(
    predictions: Sequence[Predicted],
    dataset: Dataset,
    *,
    metric: str = "voc",
    iou_threshold: float = 0.5,
    points: Points = "area",
    report_confidence: float = REPORT_CONFIDENCE,
) -> Evaluation:
    """Measures detections that were already made, one per image of `dataset` in its order and
    class ids.
    """
    if metric not in ("voc", "coco"):
        raise EvaluationError(f"metric must be voc or coco, not {metric!r}")
    if points not in ("area", 11, 101):
        raise EvaluationError(f"points must be 'area', 11 or 101, not {points!r}")
    if not 0 < iou_threshold < 1:
        raise EvaluationError(f"iou_threshold must be between 0 and 1, not {iou_threshold}")
    classes = len(dataset.class_names)
    truths = [dataset.annotation(i) for i in range(len(dataset))]
    matches = match(predictions, truths, classes, iou_threshold)
    coco: dict[str, float] = {}
    if metric == "coco":
        coco, ap = coco_ap(predictions, truths, classes)
        mean, mean50 = coco["AP"], coco["AP50"]
    else:
        ap = class_ap(matches, points)
        mean = mean50 = mean_ap(ap)
        if iou_threshold != 0.5:
            mean50 = mean_ap(class_ap(match(predictions, truths, classes, 0.5), points))
    precision, recall, f1 = precision_recall_f1(matches, report_confidence)
    return Evaluation(
        metric=metric,
        class_names=dataset.class_names,
        ap=tuple(ap.tolist()),
        mAP=mean,
        mAP50=mean50,
        iou_threshold=iou_threshold,
        points=points,
        precision=precision,
        recall=recall,
        f1=f1,
        confidence=report_confidence,
        images=len(dataset),
        objects=tuple(matches.positives.tolist()),
        detections=tuple(np.bincount(matches.class_ids, minlength=classes).tolist()),
        coco=coco,
        matches=matches,
    )


def match_classes(of_detector: Sequence[str], of_dataset: Sequence[str]) -> np.ndarray:
    """For each class of the detector its number in the data set, int64 [C]; the two names of
    `ALIASES` count as one. Raises EvaluationError where the names differ.
    """
    number = {ALIASES.get(name, name): i for i, name in enumerate(of_dataset)}
    wanted = [ALIASES.get(name, name) for name in of_detector]
    twice = len(number) < len(of_dataset) or len(set(wanted)) < len(wanted)
    if twice or set(wanted) != set(number):
        detector_only = [n for n in of_detector if ALIASES.get(n, n) not in number]
        dataset_only = [n for n in of_dataset if ALIASES.get(n, n) not in wanted]
        raise EvaluationError(
            f"the classes of the detector ({len(of_detector)}) and of the data set "
            f"({len(of_dataset)}) differ: only the detector has {_few(detector_only)}, "
            f"only the data set has {_few(dataset_only)}"
            + ("; a class occurs twice" if twice else "")
        )
    return np.array([number[name] for name in wanted], dtype=np.int64)


def _few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"[{', '.join(names[:most])}{more}]"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
