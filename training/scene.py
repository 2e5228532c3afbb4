"""Draws scenes of objects of eight classes, each a function of its random generator alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

CLASS_NAMES = ("circle", "ring", "triangle", "rectangle", "star", "cross", "heart", "arrow")
SIZES = (0.06, 0.45)  # of the shorter side of the picture
MAX_OBJECTS = 12
MIN_VISIBLE = 0.3
MIN_BOX = 6  # px; what is left of an object has at least this width and height
MIN_CONTRAST = 55.0  # distance in RGB between an object's colour and what is behind it
MAX_COVER = 0.6  # an object is put elsewhere when it would hide more than this of another
SUPERSAMPLE = 2


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # [H, W, 3] uint8 RGB
    boxes: np.ndarray  # [N, 4] int64 xyxy px, 0-based, right and bottom exclusive
    class_ids: np.ndarray  # [N] int64


def scene(height: int, width: int, rng: np.random.Generator) -> Scene:
    """Draws one scene."""
    canvas = _background(height, width, rng)
    owner = np.full((height, width), -1, dtype=np.int32)  # the object seen at each pixel
    class_ids: list[int] = []
    areas: list[int] = []  # px of each object, also those outside the picture or behind others
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        class_id = int(rng.integers(len(CLASS_NAMES)))
        mask = _object_mask(class_id, min(height, width), rng)
        place = _free_place(mask, owner, areas, rng)
        if place is None:
            continue
        _paint(canvas, mask, place, rng)
        inside, part = _overlap(place, mask.shape, owner.shape)
        owner[inside][mask[part] >= 0.5] = len(class_ids)
        class_ids.append(class_id)
        areas.append(int((mask >= 0.5).sum()))
    boxes, kept = [], []
    for number, (class_id, area) in enumerate(zip(class_ids, areas, strict=True)):
        ys, xs = np.nonzero(owner == number)
        if len(xs) < MIN_VISIBLE * area:
            continue
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        if min(box[2] - box[0], box[3] - box[1]) >= MIN_BOX:
            boxes.append(box)
            kept.append(class_id)
    image = _photograph(canvas, rng)
    return Scene(
        image, np.array(boxes, dtype=np.int64).reshape(-1, 4), np.array(kept, dtype=np.int64)
    )


def _outline(class_id: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The contours [N, 2] of a class within -1..1; areas inside an even number of them are
    empty.
    """
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    match CLASS_NAMES[class_id]:
        case "circle":
            return [circle]
        case "ring":
            return [circle, circle * rng.uniform(0.45, 0.68)]
        case "triangle":
            corners = np.deg2rad(np.array([-90, 30, 150]) + rng.uniform(-12, 12, 3))
            return [np.stack([np.cos(corners), np.sin(corners)], axis=1)]
        case "rectangle":
            half = rng.uniform(0.45, 0.9)
            return [np.array([[-0.9, -half], [0.9, -half], [0.9, half], [-0.9, half]])]
        case "star":
            points = int(rng.integers(5, 7))
            angles = np.arange(2 * points) * np.pi / points
            radii = np.where(np.arange(2 * points) % 2, rng.uniform(0.38, 0.5), 1.0)
            return [np.stack([np.sin(angles), -np.cos(angles)], axis=1) * radii[:, None]]
        case "cross":
            a = rng.uniform(0.22, 0.38)
            quarter = np.array([[a, -1], [a, -a], [1, -a]])
            quarters = [quarter @ np.array([[c, s], [-s, c]])
                        for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]  # fmt: skip
            return [np.concatenate(quarters)]
        case "heart":
            x = np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return [np.stack([x, -(y + 2.5) / 15], axis=1)]
        case "arrow":
            neck, shaft = rng.uniform(-0.1, 0.2), rng.uniform(0.18, 0.3)
            upper = np.array([[-1, -shaft], [neck, -shaft], [neck, -0.7], [1, 0]])
            return [np.concatenate([upper, upper[-2::-1] * (1, -1)])]
        case name:
            raise AssertionError(name)


def _object_mask(class_id: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Coverage float32 [h, w] in 0..1 of a new object, at its own size and rotation."""
    length = side * float(np.exp(rng.uniform(*np.log(SIZES))))
    squeeze = np.array([1.0, rng.uniform(0.75, 1.0)])
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    contours = [contour * squeeze @ rotation.T for contour in _outline(class_id, rng)]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    scale = length / (high - low).max()
    size = np.ceil((high - low) * scale).astype(int) + 2
    drawn = np.zeros((size[1] * SUPERSAMPLE, size[0] * SUPERSAMPLE), dtype=np.uint8)
    points = [
        np.rint(((c - low) * scale + 1) * SUPERSAMPLE * 16).astype(np.int32) for c in contours
    ]
    cv2.fillPoly(drawn, points, 255, shift=4)
    small = cv2.resize(drawn, (int(size[0]), int(size[1])), interpolation=cv2.INTER_AREA)
    return small.astype(np.float32) / 255


def _free_place(
    mask: np.ndarray, owner: np.ndarray, areas: Sequence[int], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Left and top for an object where it hides no other too much; None when no try succeeds."""
    height, width = mask.shape
    for _ in range(12):
        # Up to a quarter of the object may lie outside.
        left = int(rng.integers(-width // 4, max(owner.shape[1] - 3 * width // 4, 1)))
        top = int(rng.integers(-height // 4, max(owner.shape[0] - 3 * height // 4, 1)))
        inside, part = _overlap((left, top), mask.shape, owner.shape)
        hidden = owner[inside][mask[part] >= 0.5]
        hidden = np.bincount(hidden[hidden >= 0], minlength=len(areas))
        if all(count <= MAX_COVER * area for count, area in zip(hidden, areas, strict=True)):
            return left, top
    return None


def _overlap(
    place: tuple[int, int], part: tuple[int, ...], whole: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of the picture, and of the object at `place`, that cover the same pixels."""
    left, top = place
    x1, x2 = max(left, 0), min(left + part[1], whole[1])
    y1, y2 = max(top, 0), min(top + part[0], whole[0])
    return (
        (slice(y1, y2), slice(x1, x2)),
        (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)),
    )


def _paint(
    canvas: np.ndarray, mask: np.ndarray, place: tuple[int, int], rng: np.random.Generator
) -> None:
    """Draws an object, with a soft shadow under about half of them, onto `canvas` float32 [H, W,
    3].
    """
    if rng.random() < 0.5:
        reach = max(2, mask.shape[0] // 12)
        padded = cv2.copyMakeBorder(mask, *(2 * reach,) * 4, cv2.BORDER_CONSTANT, value=0)
        shadow = cv2.GaussianBlur(padded, (0, 0), reach / 1.5)
        offset = rng.integers(-reach, reach + 1, 2) - 2 * reach
        place_of_shadow = (place[0] + int(offset[0]), place[1] + int(offset[1]))
        inside, part = _overlap(place_of_shadow, shadow.shape, canvas.shape)
        canvas[inside] *= 1 - rng.uniform(0.2, 0.5) * shadow[part][..., None]
    inside, part = _overlap(place, mask.shape, canvas.shape)
    behind = canvas[inside][mask[part] >= 0.5]
    colour = _contrasting(behind.mean(axis=0) if len(behind) else np.zeros(3), rng)
    surface = _texture(mask.shape[0], mask.shape[1], colour, rng)
    if rng.random() < 0.4:
        thickness = max(1, round(min(mask.shape) * rng.uniform(0.03, 0.08)))
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * thickness + 1,) * 2)
        core = cv2.erode(mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)[..., None]
        surface = surface * core + colour * rng.choice([0.35, 1.6]) * (1 - core)
    surface = surface * _light(mask.shape[0], mask.shape[1], 0.35, rng)
    alpha = mask[part][..., None]
    canvas[inside] = canvas[inside] * (1 - alpha) + surface[part] * alpha


def _random_colour(rng: np.random.Generator) -> np.ndarray:
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(0.1, 0.95), rng.uniform(0.2, 1.0)]]])
    return cv2.cvtColor(hsv.astype(np.float32), cv2.COLOR_HSV2RGB)[0, 0] * 255


def _contrasting(other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        colour = _random_colour(rng)
        if np.linalg.norm(colour - other) >= MIN_CONTRAST:
            return colour


def _light(height: int, width: int, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Factors [height, width, 1] around 1 that rise in one direction, by up to `amount` either
    way.
    """
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, amount)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    return (1 + strength * (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2))[..., None]


def _clouds(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise [height, width, 1] in -1..1, with about `cells` bumps across."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), -1, 1)[
        ..., None
    ]


def _texture(height: int, width: int, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A surface float32 [height, width, 3]: plain, gradient, stripes, checks, dots or clouds."""
    other = np.clip(colour + rng.uniform(25, 80) * rng.choice([-1, 1]), 0, 255)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period = max(min(height, width) * rng.uniform(0.12, 0.3), 4.0)
    angle = rng.uniform(0, np.pi)
    along = (np.cos(angle) * x + np.sin(angle) * y) / period
    across = (-np.sin(angle) * x + np.cos(angle) * y) / period
    match rng.choice(["plain", "gradient", "stripes", "checks", "dots", "clouds"], p=[
        0.3, 0.2, 0.15, 0.1, 0.1, 0.15]):  # fmt: skip
        case "plain":
            share = np.zeros_like(x)
        case "gradient":
            share = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
        case "stripes":
            share = (np.floor(along) % 2).astype(np.float32)
        case "checks":
            share = ((np.floor(along) + np.floor(across)) % 2).astype(np.float32)
        case "dots":
            share = ((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.08).astype(np.float32)
        case _:
            share = (_clouds(height, width, int(rng.integers(2, 7)), rng)[..., 0] + 1) / 2
    return colour + (other - colour) * share[..., None]


def _background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [height, width, 3] in 0..255: two colours in a gradient or texture, clouds, and
    clutter.
    """
    first, second = _random_colour(rng), _random_colour(rng)
    if rng.random() < 0.7:
        share = np.clip(_light(height, width, 1.4, rng) - 0.5, 0, 1)
        canvas = first + (second - first) * share
    else:
        canvas = _texture(height, width, first, rng)
    for cells in (3, 9, 40):
        canvas = canvas + _clouds(height, width, cells, rng) * rng.uniform(0, 18)
    canvas = np.ascontiguousarray(np.clip(canvas, 0, 255), dtype=np.float32)
    side = min(height, width)
    for _ in range(rng.integers(0, 9)):  # open strokes: nothing that could pass for an object
        start = rng.uniform(0, 1, 2) * (width, height)
        steps = rng.normal(0, side * 0.05, (6, 2)) + rng.normal(0, side * 0.06, 2)
        points = np.rint(start + np.cumsum(steps, axis=0)).astype(np.int32)
        thickness = int(rng.integers(1, max(side // 90, 2)))
        colour = tuple(float(v) for v in _random_colour(rng))
        cv2.polylines(canvas, [points], False, colour, thickness, cv2.LINE_AA)
    return canvas


def _photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light across the scene, exposure, blur and sensor noise; uint8 [H, W, 3]."""
    height, width = canvas.shape[:2]
    canvas = canvas * _light(height, width, 0.45, rng) * rng.uniform(0.75, 1.15)
    if rng.random() < 0.35:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.5, 1.3))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(0, 12)
    return np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8)
