"""Shapes of objects, and anchors that fit them: k-means with IoU as the distance.

The distance of two shapes is 1 - IoU of boxes with one centre (YOLO9000, arXiv 1612.08242, section
2). A cluster's centre is the median of its widths and of its heights, which gives a better mean IoU
than the mean does (BCCD, nine anchors, best of ten: 0.886 against 0.883; log-normal shapes 0.633
against 0.616). Half of the restarts begin as k-means++ does, which finds rare shapes, half with
boxes drawn evenly, which fits the many better; the best mean IoU wins. All follows from the seed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from training.augment.geometric import MIN_SIDE
from yolov4_fast.datasets import Dataset

RESTARTS = 10
ITERATIONS = 300
SAMPLE = 50_000  # boxes that k-means looks at; what is found is measured on all
RECALLS = (0.213, 0.5)  # Darknet's iou_thresh, from which an anchor is positive; and VOC's overlap

Anchors = tuple[tuple[float, float], ...]  # width and height, px


class Fit(NamedTuple):
    """How well anchors fit boxes, each box going by its best anchor."""

    average_iou: float
    recalls: tuple[float, ...]  # share of boxes with an IoU above each of `RECALLS`


def object_shapes(dataset: Dataset, height: int, width: int, resize: str) -> np.ndarray:
    """Widths and heights of all objects that are trained on, float64 [N, 2] px of the input."""
    found = [np.zeros((0, 2))]
    for index, annotation in enumerate(dataset.annotations):
        wanted = ~(annotation.crowd | annotation.difficult)
        if not wanted.any():
            continue
        if annotation.normalized and resize == "stretch":
            image_height, image_width = 1, 1  # its size does not matter: it need not be read
        else:
            image_height, image_width = dataset.size(index)
            annotation = dataset.annotation(index, (image_height, image_width))
        scale = np.array([width / image_width, height / image_height])
        if resize == "letterbox":
            scale[:] = scale.min()
        boxes = annotation.boxes[wanted].astype(np.float64)
        found.append((boxes[:, 2:] - boxes[:, :2]) * scale)
    shapes = np.concatenate(found)
    return shapes[(shapes >= MIN_SIDE).all(axis=1)]


def shape_iou(shapes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """IoU [N, K] of shapes [N, 2] and anchors [K, 2] laid on one centre."""
    overlap = np.minimum(shapes[:, None, 0], anchors[:, 0])
    overlap = overlap * np.minimum(shapes[:, None, 1], anchors[:, 1])
    return overlap / (shapes.prod(axis=1)[:, None] + anchors.prod(axis=1) - overlap)


def measure(shapes: np.ndarray, anchors: Anchors) -> Fit:
    """How well the anchors fit shapes [N, 2]."""
    best = np.concatenate(
        [shape_iou(part, np.array(anchors)).max(axis=1) for part in _parts(shapes)]
    )
    return Fit(float(best.mean()), tuple(float((best > least).mean()) for least in RECALLS))


def _parts(shapes: np.ndarray) -> list[np.ndarray]:
    return np.array_split(shapes, -(-len(shapes) // SAMPLE))


def find_anchors(
    shapes: np.ndarray, count: int, *, seed: int = 0, restarts: int = RESTARTS
) -> Anchors:
    """`count` anchors for shapes [N, 2], smallest area first, in whole pixels, or in tenths where
    two would be the same.

    Raises ValueError if there are fewer different shapes than anchors.
    """
    if len(shapes) > SAMPLE:
        shapes = np.random.default_rng(seed).choice(shapes, SAMPLE, replace=False)
    different = len(np.unique(shapes, axis=0))
    if different < count:
        raise ValueError(
            f"{len(shapes)} boxes of {different} different shapes are too few for {count} anchors"
        )
    found = []
    for restart in range(restarts):
        rng = np.random.default_rng((seed, restart))
        start = _spread_start if restart % 2 else _even_start
        found.append(_cluster(shapes, start(shapes, count, rng)))
    _, centres = max(found, key=lambda pair: pair[0])
    rounded = np.rint(centres)
    if len(np.unique(rounded, axis=0)) < count:
        rounded = centres.round(1)
    order = sorted(rounded.tolist(), key=lambda shape: (shape[0] * shape[1], shape))
    return tuple((width, height) for width, height in order)


def _even_start(shapes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Different shapes, those of many boxes more likely."""
    order = shapes[rng.permutation(len(shapes))]
    _, first = np.unique(order, axis=0, return_index=True)
    return order[np.sort(first)[:count]]


def _spread_start(shapes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """As k-means++: each next one by the square of its distance from the nearest so far."""
    chosen = shapes[[rng.integers(len(shapes))]]
    distance = 1 - shape_iou(shapes, chosen)[:, 0]
    while len(chosen) < count:
        weights = distance**2
        chosen = np.vstack([chosen, shapes[rng.choice(len(shapes), p=weights / weights.sum())]])
        distance = np.minimum(distance, 1 - shape_iou(shapes, chosen[-1:])[:, 0])
    return chosen


def _cluster(shapes: np.ndarray, centres: np.ndarray) -> tuple[float, np.ndarray]:
    """The best mean IoU on the way from these centres, and the centres it belongs to."""
    best, nearest = (0.0, centres), np.full(len(shapes), -1)
    for _ in range(ITERATIONS):
        iou = shape_iou(shapes, centres)
        best = max(best, (float(iou.max(axis=1).mean()), centres), key=lambda pair: pair[0])
        previous, nearest = nearest, iou.argmax(axis=1)
        if (nearest == previous).all():
            break
        members = [shapes[nearest == number] for number in range(len(centres))]
        centres = np.array(
            [
                np.median(own, axis=0) if len(own) else centre
                for own, centre in zip(members, centres, strict=True)
            ]
        )
    return best
