"""What a run draws: its batches and detections, and the curves of its losses and precision.

Pictures are [H, W, 3] uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from training.loader import Batch
from training.losses import Losses
from yolov4_fast.average_precision import precision_recall_curve
from yolov4_fast.datasets import Annotation
from yolov4_fast.detections import Detections, class_color
from yolov4_fast.evaluation import Evaluation
from yolov4_fast.files import replacing

TILE = 320  # px, the longer side of a picture in a sheet
MOST = 9  # pictures of a batch that are shown
TRUTH = (255, 255, 255)
MOST_NAMED = 20  # classes that a legend has room for


def batch_sheet(batch: Batch, class_names: Sequence[str]) -> np.ndarray:
    """The first pictures of a batch as they are trained on, with the boxes of their objects."""
    images = batch.images[:MOST].permute(0, 2, 3, 1).cpu().numpy()
    targets = batch.targets.cpu()
    return sheet(
        [
            with_boxes(image, targets[targets[:, 0] == number], class_names)
            for number, image in enumerate(images)
        ]
    )


def with_boxes(image: np.ndarray, targets: Tensor, class_names: Sequence[str]) -> np.ndarray:
    """A copy of a picture with the boxes of its targets [M, 6]: (_, class, cx, cy, w, h)."""
    height, width = image.shape[:2]
    values = targets.numpy()
    half = values[:, 4:6] / 2
    corners = np.concatenate([values[:, 2:4] - half, values[:, 2:4] + half], 1)
    scale = np.array([width, height, width, height], np.float32)
    found = Detections(
        corners * scale,
        np.ones(len(values), np.float32),
        values[:, 1].astype(np.int64),
        tuple(class_names),
        (height, width),
    )
    return found.draw(np.ascontiguousarray(image))


def validation_picture(image: np.ndarray, found: Detections, truth: Annotation) -> np.ndarray:
    """What was found in a picture, on white frames around the objects that are to be found."""
    canvas = image.copy()
    for x1, y1, x2, y2 in truth.boxes.round().astype(int).tolist():
        cv2.rectangle(canvas, (x1, y1), (x2, y2), TRUTH, 2)
    return found.draw(canvas)


def sheet(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side on one sheet, each shrunk to fit its square tile where it is larger."""
    tile = min(TILE, max(max(picture.shape[:2]) for picture in pictures))
    columns = ceil(len(pictures) ** 0.5)
    rows = ceil(len(pictures) / columns)
    canvas = np.zeros((rows * tile, columns * tile, 3), np.uint8)
    for number, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        scale = min(1.0, tile / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        y, x = number // columns * tile, number % columns * tile
        canvas[y : y + size[1], x : x + size[0]] = small
    return canvas


def class_curves(evaluation: Evaluation) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Precision, recall and score, each [D], along the detections of every class that has
    objects, in descending order of score.
    """
    matches, curves = evaluation.matches, {}
    if matches is None:
        return {}
    for class_id, positives in enumerate(matches.positives.tolist()):
        if positives:
            mine = (matches.class_ids == class_id) & ~matches.ignored
            precision, recall = precision_recall_curve(matches.hits[mine], positives)
            name = evaluation.class_names[class_id]
            curves[name] = precision, recall, matches.scores[mine]
    return curves


def write_curves(
    path: Path, rows: Sequence[Mapping[str, Any]], evaluation: Evaluation | None
) -> None:
    """A PNG of the losses and mAP50 by epoch (rows of log.jsonl), and of precision over recall."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, means, precision = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]
    for name in Losses._fields:
        losses.plot(epochs, [row.get(name, np.nan) for row in rows], label=name)
    losses.set(xlabel="epoch", title="training loss", yscale="log")
    validated = [row for row in rows if row.get("mAP50") is not None]  # 0 is a result too
    means.plot([row["epoch"] for row in validated], [row["mAP50"] for row in validated], "o-")
    means.set(xlabel="epoch", title="validation mAP50", ylim=(0, 1.02))
    if evaluation:
        for name, (precisions, recalls, _) in class_curves(evaluation).items():
            color = class_color(evaluation.class_names.index(name))
            precision.plot(recalls, precisions, label=name, color=[c / 255 for c in color])
    precision.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    precision.set_title("last validation, IoU 0.5")
    for axes in (losses, precision):
        if 0 < len(axes.lines) <= MOST_NAMED:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    means.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
