"""Darknet's mosaic: four pictures meet at a random point, each showing one corner of itself at
full scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from training.augment.geometric import Window, view
from training.augment.sample import Sample

CUT = (0.2, 0.8)  # where the cross may lie, as a share of the width and of the height


def mosaic(
    samples: Sequence[Sample],
    windows: Sequence[Window],
    flips: Sequence[bool],
    height: int,
    width: int,
    rng: np.random.Generator,
    min_visible: float,
    recolour: Callable[[np.ndarray], np.ndarray],
    angles: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
) -> Sample:
    """Puts four samples into one picture of height x width: top left, top right, bottom left,
    bottom right.

    Each quadrant is a `patch`, and `recolour` is applied to each on its own.
    """
    cut_x = int(rng.uniform(*CUT) * width)
    cut_y = int(rng.uniform(*CUT) * height)
    image = np.empty((height, width, 3), dtype=np.uint8)
    boxes, class_ids = [], []
    quadrants = [
        (x1, y1, x2, y2)
        for y1, y2 in ((0, cut_y), (cut_y, height))
        for x1, x2 in ((0, cut_x), (cut_x, width))
    ]
    for sample, window, flip, angle, place in zip(
        samples, windows, flips, angles, quadrants, strict=True
    ):
        part = patch(sample, window, flip, angle, place, height, width, min_visible)
        x1, y1, x2, y2 = place
        image[y1:y2, x1:x2] = recolour(part.image)
        boxes.append(part.boxes + np.array([x1, y1, x1, y1], dtype=np.float32))
        class_ids.append(part.class_ids)
    return Sample(image, np.concatenate(boxes), np.concatenate(class_ids))


def patch(
    sample: Sample,
    window: Window,
    flip: bool,
    angle: float,
    place: tuple[int, int, int, int],
    height: int,
    width: int,
    min_visible: float,
) -> Sample:
    """What a picture of height x width shows at `place` (xyxy px), in a picture of that size.

    It is the same part of what `window` shows at height x width, moved where it can be so that it
    does not show the grey beyond the picture, and then turned by `angle` about its own middle.
    """
    x1, y1, x2, y2 = place
    image_height, image_width = sample.image.shape[:2]
    across = (width - x2, width - x1) if flip else (x1, x2)
    left, right = _part(window.x1, window.x2, across, width, image_width)
    top, bottom = _part(window.y1, window.y2, (y1, y2), height, image_height)
    corner = Window(left, top, right, bottom)
    return view(sample, corner, y2 - y1, x2 - x1, flip, min_visible, angle)


def _part(
    start: float, end: float, span: tuple[int, int], size: int, limit: int
) -> tuple[float, float]:
    """The share `span` / `size` of start..end, moved into 0..limit if it is short enough to fit,
    else to cover it.
    """
    scale = (end - start) / size
    first, last = start + span[0] * scale, start + span[1] * scale
    low, high = min(0.0, limit - (last - first)), max(0.0, limit - (last - first))
    moved = min(max(first, low), high)
    return moved, moved + last - first
