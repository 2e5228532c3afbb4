"""One training picture for the classifier, of one, two or four pictures, and what it shows.

A picture is cropped at random (a share of its area, at a proportion near its target's, as in
Inception, arXiv 1409.4842), resized, mirrored and recoloured. CutMix (arXiv 1905.04899) puts a
rectangle of a second one into it; Mosaic, as Darknet's classifier has it, shows one corner each of
four. The label is then shared out by the pixels that each picture keeps.
"""

from __future__ import annotations

from math import exp, log, sqrt
from typing import NamedTuple

import cv2
import numpy as np

PARTS = 4  # most pictures in one
CUT = (0.2, 0.8)  # where the cross of a mosaic may lie, as a share of each side
PROPORTIONS = (3 / 4, 4 / 3)
TRIES = 10  # for a crop that fits, before the middle is taken


class Mixture(NamedTuple):
    """A picture of up to `PARTS` others, and the share of its pixels that each of them has."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    shares: tuple[float, ...]  # one for each picture it was made of; their sum is 1


def random_crop(
    image: np.ndarray, height: int, width: int, least_area: float, rng: np.random.Generator
) -> np.ndarray:
    """A part of the image of at least `least_area` of its area, resized to height x width."""
    tall, wide = image.shape[:2]
    for _ in range(TRIES):
        area = rng.uniform(least_area, 1.0) * tall * wide
        ratio = exp(rng.uniform(log(PROPORTIONS[0]), log(PROPORTIONS[1]))) * width / height
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 1 <= w <= wide and 1 <= h <= tall:
            left, top = int(rng.integers(wide - w + 1)), int(rng.integers(tall - h + 1))
            return _resized(image[top : top + h, left : left + w], height, width)
    return central_crop(image, height, width, 1.0)


def central_crop(image: np.ndarray, height: int, width: int, share: float) -> np.ndarray:
    """The largest central part of the target's proportions, `share` of it along each side."""
    tall, wide = image.shape[:2]
    scale = min(tall / height, wide / width) * share
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (tall - h) // 2, (wide - w) // 2
    return _resized(image[top : top + h, left : left + w], height, width)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    # Bilinear as in detection, whose weights these are to be.
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def cutmix(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Mixture:
    """A rectangle of `other` in `image`, both of one size.

    Its area is 1 - lambda of the picture's, lambda from Beta(1, 1), its centre anywhere; what lies
    outside is cut off (the paper's equations 1 and 2).
    """
    height, width = image.shape[:2]
    side = sqrt(1 - rng.beta(1.0, 1.0))
    x, y = rng.integers(width), rng.integers(height)
    x1, x2 = (int(np.clip(x + sign * width * side / 2, 0, width)) for sign in (-1, 1))
    y1, y2 = (int(np.clip(y + sign * height * side / 2, 0, height)) for sign in (-1, 1))
    mixed = image.copy()
    mixed[y1:y2, x1:x2] = other[y1:y2, x1:x2]
    share = (y2 - y1) * (x2 - x1) / (height * width)
    return Mixture(mixed, (1 - share, share))


def mosaic(images: list[np.ndarray], rng: np.random.Generator) -> Mixture:
    """Four pictures of one size meet at a point; each shows the corner where it stands: top left,
    top right, bottom left, bottom right.
    """
    height, width = images[0].shape[:2]
    x, y = (int(rng.uniform(*CUT) * side) for side in (width, height))
    mixed, shares = np.empty_like(images[0]), []
    corners = [(rows, columns) for rows in (slice(0, y), slice(y, height))
               for columns in (slice(0, x), slice(x, width))]  # fmt: skip
    for image, (rows, columns) in zip(images, corners, strict=True):
        mixed[rows, columns] = image[rows, columns]
        shares.append((rows.stop - rows.start) * (columns.stop - columns.start) / (height * width))
    return Mixture(mixed, tuple(shares))
