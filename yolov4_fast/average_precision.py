"""Average precision by the rules of VOC and of COCO, from detections and objects as arrays.

VOC: per class, detections of all images in descending order of score. Each looks at the object of
its class that it overlaps most. When their IoU is *greater than* the threshold (Darknet's rule; the
devkit takes "or equal"), the first detection of an object is a hit and later ones are false
positives; detections of difficult objects and crowds count neither way. AP is the area under
precision made monotone (VOC 2010 on), or its mean at 11 (VOC 2007) or 101 recalls. Classes without
objects have no AP (NaN) and do not enter the mean.

COCO: AP averaged over IoU 0.50 to 0.95 through faster-coco-eval, which computes what pycocotools
does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from yolov4_fast.datasets import Annotation

Points = Literal["area", 11, 101]
COCO_STATISTICS = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge",
                   "AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge")  # fmt: skip


class EvaluationError(ValueError):
    """What was asked to be evaluated does not fit together; the message says why."""


class Predicted(Protocol):
    """Detections of one image: `Detections`, or `Prediction` for plain arrays."""

    @property
    def boxes(self) -> np.ndarray: ...  # [N, 4] xyxy px

    @property
    def scores(self) -> np.ndarray: ...  # [N]

    @property
    def class_ids(self) -> np.ndarray: ...  # [N]


class Prediction(NamedTuple):
    """Detections of one image as plain arrays."""

    boxes: np.ndarray  # [N, 4] xyxy px
    scores: np.ndarray  # [N]
    class_ids: np.ndarray  # [N]


@dataclass(frozen=True)
class Matches:
    """Detections of a whole data set held against its objects, in descending order of score."""

    scores: np.ndarray  # [D] float64
    class_ids: np.ndarray  # [D] int64
    hits: np.ndarray  # [D] bool: true positives
    ignored: np.ndarray  # [D] bool: found something difficult, counts neither way
    positives: np.ndarray  # [C] int64: objects of each class that are to be found


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU float64 [N, M] of boxes [N, 4] and [M, 4], xyxy; 0 where both have no area."""
    first, second = np.asarray(boxes, np.float64)[:, None], np.asarray(others, np.float64)[None]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(
        first[..., :2], second[..., :2]
    )
    shared = np.maximum(sides, 0).prod(axis=-1)
    area = (first[..., 2:] - first[..., :2]).prod(axis=-1)
    other_area = (second[..., 2:] - second[..., :2]).prod(axis=-1)
    union = area + other_area - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match(
    predictions: Sequence[Predicted],
    truths: Sequence[Annotation],
    num_classes: int,
    iou_threshold: float,
) -> Matches:
    """Holds the detections of each image against its objects by the VOC rule; equal scores keep
    their order.
    """
    if len(predictions) != len(truths):
        raise EvaluationError(f"{len(predictions)} predictions for {len(truths)} images")
    overlaps, objects = [], []  # of each detection: its best IoU, and with which object of them all
    count = 0
    for found, truth in zip(predictions, truths, strict=True):
        best, overlap = np.zeros(len(found.boxes), np.int64), np.zeros(len(found.boxes))
        if len(found.boxes) and len(truth.boxes):
            same_class = np.asarray(found.class_ids)[:, None] == truth.class_ids[None]
            iou = np.where(same_class, box_iou(found.boxes, truth.boxes), 0)
            best = iou.argmax(axis=1)
            overlap = iou[np.arange(len(iou)), best]
        overlaps.append(overlap)
        objects.append(best + count)
        count += len(truth.boxes)
    scores = _joined([found.scores for found in predictions], np.float64)
    order = np.argsort(-scores, kind="stable")
    overlaps_on = _joined(overlaps, np.float64)[order] > iou_threshold
    objects_of = _joined(objects, np.int64)[order]
    unrewarded = _joined([truth.difficult | truth.crowd for truth in truths], bool)
    truth_classes = _joined([truth.class_ids for truth in truths], np.int64)
    ignored = np.zeros(len(scores), dtype=bool)
    ignored[overlaps_on] = unrewarded[objects_of[overlaps_on]]
    candidates = np.flatnonzero(overlaps_on & ~ignored)
    first = np.unique(objects_of[candidates], return_index=True)[1]
    hits = np.zeros(len(scores), dtype=bool)
    hits[candidates[first]] = True
    return Matches(
        scores[order],
        _joined([found.class_ids for found in predictions], np.int64)[order],
        hits,
        ignored,
        np.bincount(truth_classes[~unrewarded], minlength=num_classes),
    )


def precision_recall_curve(hits: np.ndarray, positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall float64 [D] of the first 1..D detections of one class, from those
    detections in descending order of score, bool [D]; recall is NaN without positives.
    """
    found = np.cumsum(hits)
    recall = found / positives if positives else np.full(len(found), math.nan)
    return found / np.arange(1, len(found) + 1), recall


def average_precision(hits: np.ndarray, positives: int, points: Points = "area") -> float:
    """AP of one class from its detections in descending order of score, bool [D]; NaN without
    positives.
    """
    if not positives:
        return math.nan
    precision, recall = precision_recall_curve(hits, positives)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or any higher
    if points == "area":
        return float((np.diff(recall, prepend=0) * precision).sum())
    # COCO's 101 are multiples of 0.01 in floating point; 11 / 10 are exact quotients, as recall is.
    recalls = np.linspace(0, 1, 101) if points == 101 else np.arange(11) / 10
    return float(np.append(precision, 0)[np.searchsorted(recall, recalls)].mean())


def class_ap(matches: Matches, points: Points = "area") -> np.ndarray:
    """AP of each class float64 [C]; NaN for those without objects."""
    counted = ~matches.ignored
    return np.array(
        [
            average_precision(matches.hits[counted & (matches.class_ids == c)], int(n), points)
            for c, n in enumerate(matches.positives)
        ]
    )


def voc_ap(
    predictions: Sequence[Predicted],
    truths: Sequence[Annotation],
    num_classes: int,
    iou_threshold: float = 0.5,
    points: Points = "area",
) -> np.ndarray:
    """VOC's AP of each class float64 [C], from detections and objects of each image; NaN without
    objects.
    """
    return class_ap(match(predictions, truths, num_classes, iou_threshold), points)


def mean_ap(ap: np.ndarray) -> float:
    """Mean over the classes that have an AP; NaN when none has."""
    return float(np.nanmean(ap)) if np.isfinite(ap).any() else math.nan


def precision_recall_f1(matches: Matches, confidence: float) -> tuple[float, float, float]:
    """Over all classes, of the detections with at least this score; NaN where there is nothing
    to divide by.
    """
    counted = (matches.scores >= confidence) & ~matches.ignored
    hits, made = int(matches.hits[counted].sum()), int(counted.sum())
    positives = int(matches.positives.sum())
    return (
        hits / made if made else math.nan,
        hits / positives if positives else math.nan,
        2 * hits / (made + positives) if made + positives else math.nan,
    )


def coco_ap(
    predictions: Sequence[Predicted], truths: Sequence[Annotation], num_classes: int
) -> tuple[dict[str, float], np.ndarray]:
    """COCO's twelve numbers, and AP over IoU 0.50 to 0.95 of each class, float64 [C].

    The 100 likeliest detections of an image and class count. Difficult objects count as any others:
    COCO knows crowds only.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise EvaluationError(
            "COCO AP needs faster-coco-eval: pip install 'yolov4_fast[eval]'"
        ) from error
    truth = COCO(_coco_truth(truths, num_classes))
    found = truth.loadRes(_coco_results(predictions))
    evaluator = COCOeval_faster(truth, found, "bbox", print_function=_silent)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    numbers = [float(v) if v > -1 else math.nan for v in evaluator.stats[:12]]
    # [IoU thresholds, recalls, classes, object sizes, detection limits]: all sizes, 100 detections
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    per_class = precision.transpose(2, 0, 1).reshape(num_classes, -1)
    has_objects = (per_class > -1).all(axis=1)
    ap = np.where(has_objects, per_class.mean(axis=1), math.nan)
    return dict(zip(COCO_STATISTICS, numbers, strict=True)), ap


def _coco_truth(truths: Sequence[Annotation], num_classes: int) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image_id, truth in enumerate(truths):
        rows = zip(
            _xywh(truth.boxes),
            truth.class_ids.tolist(),
            truth.crowd.tolist(),
            truth.areas.tolist(),
            strict=True,
        )
        for box, class_id, crowd, area in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,  # 0 means "unmatched" to the evaluator
                    "image_id": image_id,
                    "category_id": class_id,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return {
        "info": {},
        "images": [{"id": i} for i in range(len(truths))],
        "categories": [{"id": i, "name": str(i)} for i in range(num_classes)],
        "annotations": annotations,
    }


def _coco_results(predictions: Sequence[Predicted]) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": class_id, "bbox": box, "score": score}
        for image_id, found in enumerate(predictions)
        for box, class_id, score in zip(
            _xywh(found.boxes),
            np.asarray(found.class_ids).tolist(),
            np.asarray(found.scores).tolist(),
            strict=True,
        )
    ]


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    corners = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()


def _joined(arrays: Sequence[Any], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(a, dtype) for a in arrays)])


def _silent(*_: object) -> None:
    return None
