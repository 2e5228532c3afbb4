"""How far two runs of a detector agree: boxes matched one to one, and how their scores differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yolov4_fast.detections import Detections


@dataclass(frozen=True)
class Agreement:
    """Of the reference's boxes over `score`: how many another run has too."""

    boxes: int
    matched: int
    worst_overlap: float  # IoU of the worst matched pair, 1 where nothing matched
    worst_score: float  # largest difference of score of a matched pair

    def within(self, score_difference: float) -> bool:
        return self.matched == self.boxes and self.worst_score <= score_difference

    def __str__(self) -> str:
        return (
            f"{self.matched} of {self.boxes} boxes matched, IoU at least {self.worst_overlap:.4f}, "
            f"scores within {self.worst_score:.4f}"
        )


def agreement(
    reference: Sequence[Detections],
    other: Sequence[Detections],
    *,
    score: float = 0.3,
    overlap: float = 0.95,
) -> Agreement:
    """Match each box of the reference with a score over `score` to the other run's box of its class
    that overlaps it most; a pair counts at an IoU over `overlap`, and a box is in one pair at most.

    The other run's boxes may have any score, so that one near `score` is not lost to rounding: run
    both with a lower confidence.
    """
    boxes = matched = 0
    worst_overlap, worst_score = 1.0, 0.0
    for expected, found in zip(reference, other, strict=True):
        free = np.ones(len(found.scores), bool)
        for index in np.flatnonzero(expected.scores > score):
            boxes += 1
            candidates = free & (found.class_ids == expected.class_ids[index])
            if not candidates.any():
                continue
            overlaps = np.where(candidates, _iou(expected.boxes[index], found.boxes), -1)
            best = int(overlaps.argmax())
            if overlaps[best] <= overlap:
                continue
            free[best] = False
            matched += 1
            worst_overlap = min(worst_overlap, float(overlaps[best]))
            difference = abs(float(expected.scores[index]) - float(found.scores[best]))
            worst_score = max(worst_score, difference)
    return Agreement(boxes, matched, worst_overlap, worst_score)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one box [4] with others [N, 4] -> [N]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    intersection = sides.clip(0).prod(1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - intersection
    return intersection / np.maximum(union, 1e-12)
