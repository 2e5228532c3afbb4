"""What every annotation format is read into: images, their boxes, and what was wrong with them.

Boxes are xyxy in pixels, 0-based and continuous: the image spans 0..width by 0..height, and the box
of a single pixel in the top-left corner is (0, 0, 1, 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

SPLITS_TO_EVALUATE = ("val", "valid", "validation", "test")


class DatasetError(ValueError):
    """A data set, split or class list that is not there or does not fit; the message names it."""


class DatasetWarning(UserWarning):
    """Annotations that could not be used as they are written."""


@dataclass(frozen=True)
class Annotation:
    """The objects of one image."""

    boxes: np.ndarray  # [N, 4] float32 xyxy px
    class_ids: np.ndarray  # [N] int64
    difficult: np.ndarray  # [N] bool; VOC evaluation neither rewards nor punishes finding them
    crowd: np.ndarray  # [N] bool; COCO: a region of many objects
    areas: (
        np.ndarray
    )  # [N] float32 px^2: COCO's segmented area, which its size classes go by; else the box's
    normalized: bool = False  # boxes in 0..1 and areas in shares of the image (Darknet)
    size: tuple[int, int] | None = None  # height and width of the image, where it is noted


@dataclass(frozen=True)
class Dataset:
    """Annotated images. Index `i` runs from 0 to `len(dataset) - 1`."""

    path: Path  # of several data sets in one: of the first
    split: str | None
    class_names: tuple[str, ...]
    image_paths: tuple[Path, ...] = field(repr=False)
    annotations: tuple[Annotation, ...] = field(repr=False)
    problems: tuple[str, ...] = field(default=(), repr=False)
    image_ids: tuple[int, ...] = field(default=(), repr=False)  # COCO's; empty for other formats
    category_ids: tuple[
        int, ...
    ] = ()  # COCO's original (sparse) id of each class; empty for others
    classes_found: bool = False  # `class_names` are those of the objects: no list of them was there
    _sizes: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.image_paths)

    def image_path(self, index: int) -> Path:
        return self.image_paths[index]

    def read_image(self, index: int) -> np.ndarray:
        """The image, uint8 [H, W, 3] RGB."""
        from yolov4_fast.sources import read_image

        image = read_image(self.image_paths[index])
        self._sizes[index] = image.shape[0], image.shape[1]
        return image

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`: its own if it has been read, else as annotated; where
        neither is known it is read.
        """
        noted = self._sizes.get(index) or self.annotations[index].size
        if noted is None:
            self.read_image(index)
            noted = self._sizes[index]
        return noted

    def annotation(self, index: int, size: tuple[int, int] | None = None) -> Annotation:
        """The objects of image `index`, boxes in its pixels.

        size: its height and width, if the caller knows them. Darknet's boxes need them: where they
        are not known the image is read.
        """
        annotation = self.annotations[index]
        if not annotation.normalized or not len(annotation.boxes):
            return annotation
        height, width = size or self.size(index)
        boxes = annotation.boxes * np.array([width, height, width, height], dtype=np.float32)
        areas = annotation.areas * (height * width)
        return replace(annotation, boxes=boxes, areas=areas, normalized=False)


@dataclass
class Problems:
    """Collects what is wrong with the annotations of a data set while it is read."""

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, where: object, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def report(self) -> tuple[str, ...]:
        """All of them; warns once, with the count and the first few."""
        if self.found:
            shown = "; ".join(self.found[:3]) + ("; ..." if len(self.found) > 3 else "")
            count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
            warnings.warn(
                f"{count} in the annotations of {self.source}: {shown}",
                DatasetWarning,
                stacklevel=2,
            )
        return tuple(self.found)


class ObjectList:
    """Gathers the objects of one image; boxes without area are dropped, boxes that reach outside
    are clipped.
    """

    def __init__(
        self,
        where: str,
        width: float,
        height: float,
        problems: Problems,
        *,
        normalized: bool = False,
    ) -> None:
        """width, height: of the image in pixels; 1 and 1 for boxes `normalized` to it."""
        self.where = where
        self.width = width
        self.height = height
        self.problems = problems
        self.normalized = normalized
        self.slack = 1e-3 if normalized else 1.0  # rounding is no problem to report
        self.rows: list[tuple[tuple[float, float, float, float], int, bool, bool, float]] = []

    def add(
        self,
        box: tuple[float, float, float, float],  # xyxy
        class_id: int,
        label: str,
        difficult: bool = False,
        crowd: bool = False,
        area: float | None = None,
    ) -> None:
        """Takes one box; `label` is what a problem report calls it. An `area` that cannot be is
        replaced by the box's.
        """
        if not np.isfinite(box).all():
            return self.problems.add(self.where, f"{label} is not finite: dropped")
        x1, y1, x2, y2 = box
        if x2 <= x1 or y2 <= y1:
            return self.problems.add(self.where, f"{label} has no area: dropped")
        clipped = (max(x1, 0), max(y1, 0), min(x2, self.width), min(y2, self.height))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            return self.problems.add(self.where, f"{label} is outside the image: dropped")
        if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > self.slack:
            self.problems.add(self.where, f"{label} reaches outside the image: clipped")
        if area is None or not (np.isfinite(area) and area >= 0):
            area = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
        self.rows.append((clipped, class_id, difficult, crowd, area))
        return None

    def annotation(self) -> Annotation:
        boxes, class_ids, difficult, crowd, areas = (
            zip(*self.rows, strict=True) if self.rows else ((),) * 5
        )
        return Annotation(
            np.array(boxes, dtype=np.float32).reshape(-1, 4),
            np.array(class_ids, dtype=np.int64),
            np.array(difficult, dtype=bool),
            np.array(crowd, dtype=bool),
            np.array(areas, dtype=np.float32),
            self.normalized,
            None if self.normalized else (round(self.height), round(self.width)),
        )


def choose_split(splits: Iterable[str], split: str | None, source: Path) -> str:
    """`split` if the data set has it; for None the one to evaluate on, or the only one."""
    have = sorted(splits)
    names = ", ".join(have) or "none"
    if split is not None:
        if split not in have:
            raise DatasetError(f"{source} has no split {split!r}; it has: {names}")
        return split
    for candidate in (*SPLITS_TO_EVALUATE, *(have if len(have) == 1 else ())):
        if candidate in have:
            return candidate
    raise DatasetError(f"choose a split of {source}; it has: {names}")


def class_indices(class_names: Sequence[str]) -> dict[str, int]:
    """Name to index; a name that occurs twice raises."""
    indices = {name: i for i, name in enumerate(class_names)}
    if len(indices) != len(class_names):
        twice = next(n for i, n in enumerate(class_names) if n in class_names[:i])
        raise DatasetError(f"the class name {twice!r} occurs twice")
    return indices


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, blank ones left out, without the spaces around them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not UTF-8 text") from None
    return [line.strip() for line in lines if line.strip()]
