"""Parts of a picture hidden, so that objects must be known from what is left of them.

Each of the three paints into a picture of its own, in place, and marks in `hidden` [H, W] uint8
what it has covered. `drop_hidden` then decides about the boxes: an object is still where it was, so
its box stays as it is, unless less than `min_visible` of it can be seen.

Sources: random erasing (Zhong et al., arXiv 1708.04896), Cutout (DeVries and Taylor, 1708.04552),
GridMask (Chen et al., 2001.04086).
"""

from __future__ import annotations

import cv2
import numpy as np

from training.augment.geometric import GREY
from training.augment.sample import Sample

ERASED = (0.02, 0.2)  # share of the picture; the paper's 0.4 hides most small objects altogether
ERASED_ASPECT = 0.3  # the rectangle's least proportion of sides, either way
CUTOUT_COUNT = 8  # squares at most
CUTOUT_SIDE = (0.05, 0.2)  # of the picture's shorter side
GRID_UNIT = (0.15, 0.5)  # from one square to the next, of the picture's shorter side
GRID_HIDDEN = 0.5  # side of a square, of the unit: a quarter of the picture is hidden


def random_erase(image: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> None:
    """A rectangle of random pixels, wholly within the picture."""
    height, width = hidden.shape
    share = rng.uniform(*ERASED)
    aspect = np.exp(rng.uniform(-1, 1) * np.log(ERASED_ASPECT))
    rows = min(max(round(np.sqrt(share * aspect) * height), 1), height)
    columns = min(max(round(np.sqrt(share / aspect) * width), 1), width)
    y, x = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    image[y : y + rows, x : x + columns] = rng.integers(
        256, size=(rows, columns, 3), dtype=np.uint8
    )
    hidden[y : y + rows, x : x + columns] = 1


def cutout(image: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> None:
    """One to eight grey squares; their centres lie anywhere, so they can reach over the border."""
    height, width = hidden.shape
    for _ in range(rng.integers(1, CUTOUT_COUNT + 1)):
        side = max(rng.uniform(*CUTOUT_SIDE) * min(height, width), 1.0)
        y, x = rng.random(2) * (height, width) - side / 2
        _cover(image, hidden, (x, y, x + side, y + side))


def grid_mask(image: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> None:
    """Grey squares on a regular grid that begins anywhere."""
    height, width = hidden.shape
    unit = max(rng.uniform(*GRID_UNIT) * min(height, width), 2.0)
    start_y, start_x = (rng.random(2) - 1) * unit
    side = GRID_HIDDEN * unit
    for y in np.arange(start_y, height, unit):
        for x in np.arange(start_x, width, unit):
            _cover(image, hidden, (x, y, x + side, y + side))


def _cover(image: np.ndarray, hidden: np.ndarray, box: tuple[float, float, float, float]) -> None:
    x1, y1, x2, y2 = (max(round(side), 0) for side in box)
    image[y1:y2, x1:x2] = GREY
    hidden[y1:y2, x1:x2] = 1


def drop_hidden(sample: Sample, hidden: np.ndarray, min_visible: float) -> Sample:
    """The sample without the boxes of which less than `min_visible` is visible."""
    sums = cv2.integral(hidden)
    x1, y1, x2, y2 = sample.boxes.round().astype(int).T
    covered = sums[y2, x2] - sums[y1, x2] - sums[y2, x1] + sums[y1, x1]
    area = (x2 - x1) * (y2 - y1)
    keep = area - covered >= min_visible * area
    return sample._replace(boxes=sample.boxes[keep], class_ids=sample.class_ids[keep])
