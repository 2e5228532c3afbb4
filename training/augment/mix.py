"""Two pictures in one: CutMix and MixUp, for detection.

Both take the objects of both pictures as they are seen; the share of a picture is not a weight of
its objects' loss.
"""

from __future__ import annotations

import cv2
import numpy as np

from training.augment.geometric import MIN_SIDE
from training.augment.sample import Sample

CUTMIX_SHARE = (0.1, 0.5)  # of the picture that the rectangle takes
MIXUP_BETA = 8.0  # both weights nearly always within 0.2..0.8: both pictures can be seen

Rectangle = tuple[int, int, int, int]  # xyxy px


def cutmix_rectangle(height: int, width: int, rng: np.random.Generator) -> Rectangle:
    """A rectangle of the picture's proportions anywhere within it.

    CutMix (Yun et al., arXiv 1905.04899, section 3.1) lets it take any share and reach over the
    border; for detection it stays large enough to show objects, and leaves half of the first
    picture.
    """
    side = np.sqrt(rng.uniform(*CUTMIX_SHARE))
    rows, columns = max(round(side * height), 1), max(round(side * width), 1)
    y, x = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    return x, y, x + columns, y + rows


def cutmix(sample: Sample, patch: Sample, rectangle: Rectangle, min_visible: float) -> Sample:
    """The sample with `patch`, which is as large as `rectangle`, pasted into it with its objects.

    A box whose covered part reaches over its whole width or height from one side shrinks to the
    rectangle that is left; any other stays, as what is left of the object still touches its sides.
    What is left thinner than `MIN_SIDE` counts as covered.
    Boxes that keep less than `min_visible` of their area, or become thinner than `MIN_SIDE`, are
    dropped.
    """
    x1, y1, x2, y2 = rectangle
    image = sample.image.copy()
    image[y1:y2, x1:x2] = patch.image
    boxes, keep = uncovered(sample.boxes, rectangle, min_visible)
    pasted = patch.boxes + np.array([x1, y1, x1, y1], dtype=np.float32)
    return Sample(
        image,
        np.concatenate([boxes[keep], pasted]),
        np.concatenate([sample.class_ids[keep], patch.class_ids]),
    )


def uncovered(
    boxes: np.ndarray, rectangle: Rectangle, min_visible: float
) -> tuple[np.ndarray, np.ndarray]:
    """The bounds [N, 4] of what is left of boxes [N, 4] beside a rectangle, and which of them are
    worth keeping, bool [N].
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    start, end = np.array(rectangle[:2], np.float32), np.array(rectangle[2:], np.float32)
    overlap = np.minimum(high, end) - np.maximum(low, start)
    overlap = np.where((overlap > 0).all(axis=1, keepdims=True), overlap, 0)
    area = (high - low).prod(axis=1)
    spanned = overlap > high - low - MIN_SIDE  # what sticks out is too thin to be seen
    strip = spanned[:, ::-1]  # covered all across, so that the box ends where the rectangle begins
    low = np.where(strip & (low > start - MIN_SIDE), np.maximum(low, end), low)
    high = np.where(strip & (high < end + MIN_SIDE), np.minimum(high, start), high)
    keep = (high - low >= MIN_SIDE).all(axis=1)
    keep &= area - overlap.prod(axis=1) >= min_visible * area
    return np.concatenate([low, high], axis=1), keep


def mixup(sample: Sample, other: Sample, rng: np.random.Generator) -> Sample:
    """Both pictures, of one size, laid over each other, with the objects of both.

    The weights come from Beta(8, 8) (Zhang et al., arXiv 1710.09412, with a distribution for
    detection that is narrower than theirs). An object that is half transparent is an object.
    """
    weight = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    return Sample(
        cv2.addWeighted(sample.image, weight, other.image, 1 - weight, 0),
        np.concatenate([sample.boxes, other.boxes]),
        np.concatenate([sample.class_ids, other.class_ids]),
    )
