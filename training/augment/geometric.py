"""Cropping, scaling, rotating, flipping and resizing in one resampling step.

A `Window` is the part of a picture that the result shows, in continuous pixels of that picture;
where it reaches outside, the result is grey. Everything geometric is a choice of window (the whole
image, a letterbox, a jittered crop), an angle and one call to `view`, which warps straight to the
target size.

Resampling is OpenCV's bilinear. It is not Darknet's align-corners to the last bit, by less than a
pixel: enough for training. Validation goes through the detector's own resize.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from training.augment.sample import Sample

GREY = 127  # Darknet's letterbox fill, 0.5
MIN_SIDE = 2.0  # px of the result; a thinner box is degenerate


class Window(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float


def whole(image: np.ndarray) -> Window:
    """All of the picture: stretched, when the target has another shape."""
    return Window(0.0, 0.0, float(image.shape[1]), float(image.shape[0]))


def letterbox(image: np.ndarray, height: int, width: int) -> Window:
    """The window that keeps the picture's shape in a height x width result, with Darknet's
    whole-pixel borders.
    """
    image_height, image_width = image.shape[:2]
    if width * image_height < height * image_width:
        new_width, new_height = width, max(image_height * width // image_width, 1)
    else:
        new_width, new_height = max(image_width * height // image_height, 1), height
    left, top = (width - new_width) // 2, (height - new_height) // 2
    scale_x, scale_y = image_width / new_width, image_height / new_height
    return Window(
        -left * scale_x, -top * scale_y, (width - left) * scale_x, (height - top) * scale_y
    )


def jitter(window: Window, amount: float, rng: np.random.Generator) -> Window:
    """Moves each side by up to `amount` of the window's width or height, inwards or outwards."""
    left, top, right, bottom = rng.uniform(-amount, amount, 4)
    width, height = window.x2 - window.x1, window.y2 - window.y1
    return Window(
        window.x1 + left * width,
        window.y1 + top * height,
        window.x2 + right * width,
        window.y2 + bottom * height,
    )


def rescale(window: Window, factor: float, rng: np.random.Generator) -> Window:
    """The window `factor` times as large: a smaller one lies anywhere within it, a larger one
    anywhere around it.
    """
    width, height = window.x2 - window.x1, window.y2 - window.y1
    x, y = rng.random(2) * (1 - factor)
    x1, y1 = window.x1 + x * width, window.y1 + y * height
    return Window(x1, y1, x1 + factor * width, y1 + factor * height)


def view(
    sample: Sample,
    window: Window,
    height: int,
    width: int,
    flip: bool,
    min_visible: float,
    angle: float = 0.0,
) -> Sample:
    """What `window` shows of the sample, at height x width.

    angle: degrees by which the picture is turned about the window's centre, clockwise as one sees
    it, before `flip` mirrors it left to right.

    A box becomes the bounds of the ellipse inscribed in it (exact for a box that is not turned).
    The bounds of its turned corners would be larger than nearly any object; of the simple rules the
    ellipse trains best (Kalra et al., arXiv 2109.13488). Boxes are clipped to the result. Those
    that keep less than `min_visible` of their area, or become thinner than `MIN_SIDE`, are dropped.
    """
    scale_x = width / (window.x2 - window.x1)
    scale_y = height / (window.y2 - window.y1)
    shift_x, shift_y = -window.x1 * scale_x, -window.y1 * scale_y
    if flip:
        scale_x, shift_x = -scale_x, width - shift_x
    if angle:
        centre = (window.x1 + window.x2) / 2, (window.y1 + window.y2) / 2
        image, boxes = _turned(sample, angle, centre, (scale_x, scale_y), height, width)
    else:
        image = _straight(sample.image, scale_x, scale_y, shift_x, shift_y, height, width)
        boxes = sample.boxes * np.array([scale_x, scale_y] * 2, dtype=np.float32)
        boxes += np.array([shift_x, shift_y] * 2, dtype=np.float32)
        if flip:
            boxes = boxes[:, [2, 1, 0, 3]]
    boxes, keep = clip(boxes, height, width, min_visible)
    return Sample(image, boxes, sample.class_ids[keep])


def _straight(
    image: np.ndarray,
    scale_x: float,
    scale_y: float,
    shift_x: float,
    shift_y: float,
    height: int,
    width: int,
) -> np.ndarray:
    """The picture scaled and moved, at height x width."""
    # Pixel i covers i..i+1, so its centre is at i + 0.5; OpenCV counts in pixel centres.
    matrix = np.array(
        [
            [scale_x, 0, shift_x + 0.5 * (scale_x - 1)],
            [0, scale_y, shift_y + 0.5 * (scale_y - 1)],
        ]
    )
    result = cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    left, right = sorted((shift_x, shift_x + scale_x * image.shape[1]))
    _paint_outside(result, left, shift_y, right, shift_y + scale_y * image.shape[0])
    return result


def _turned(
    sample: Sample,
    angle: float,
    centre: tuple[float, float],
    scale: tuple[float, float],
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned about `centre`, scaled, and `centre` put into the middle of
    height x width; and the bounds of the ellipses in its boxes.
    """
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    linear = np.array(scale)[:, None] * np.array([[cos, -sin], [sin, cos]])
    middle = np.array([width / 2, height / 2])
    shift = middle - linear @ centre
    matrix = np.column_stack([linear, shift + linear.sum(axis=1) / 2 - 0.5])
    image = cv2.warpAffine(
        sample.image,
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,  # blends into the slanted border, which is as it should be
        borderValue=(GREY,) * 3,
    )
    corners = sample.boxes.reshape(-1, 2, 2).astype(np.float64)
    centres = corners.mean(axis=1) @ linear.T + shift
    halves = np.sqrt(((corners[:, 1] - corners[:, 0]) / 2) ** 2 @ (linear.T**2))
    return image, np.concatenate([centres - halves, centres + halves], axis=1).astype(np.float32)


def _paint_outside(image: np.ndarray, left: float, top: float, right: float, bottom: float) -> None:
    """Makes everything grey but left..right, top..bottom, in place.

    OpenCV's own constant border would blend the grey into the outermost pixels of the picture.
    """
    x1, y1, x2, y2 = (max(round(side), 0) for side in (left, top, right, bottom))
    image[:y1] = image[y2:] = GREY
    image[:, :x1] = image[:, x2:] = GREY


def clip(
    boxes: np.ndarray, height: int, width: int, min_visible: float
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] clipped to 0..width, 0..height: those worth keeping [K, 4], and which they
    are, bool [N].
    """
    clipped = np.clip(boxes, 0, np.array([width, height] * 2, dtype=np.float32))
    before = boxes[:, 2:] - boxes[:, :2]
    after = clipped[:, 2:] - clipped[:, :2]
    keep = (after >= MIN_SIDE).all(axis=1)
    keep &= after.prod(axis=1) >= min_visible * before.prod(axis=1)
    return clipped[keep], keep
