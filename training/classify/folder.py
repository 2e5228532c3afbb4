"""Pictures sorted into one folder per class: ROOT/train/<class>/*.jpg, ROOT/val/<class>/*.jpg.

Classes are the names of the folders, sorted. Hidden files and files of other kinds are passed over;
a picture that cannot be decoded is found out when it is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from yolov4_fast.datasets import DatasetError
from yolov4_fast.sources import IMAGE_SUFFIXES


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of one split, class by class, each class sorted by path."""

    path: Path
    split: str
    class_names: tuple[str, ...]
    image_paths: tuple[Path, ...] = field(repr=False)
    class_ids: tuple[int, ...] = field(repr=False)  # of each picture

    def __len__(self) -> int:
        return len(self.image_paths)


def open_folder(
    path: str | Path, split: str, class_names: tuple[str, ...] | None = None
) -> ImageFolder:
    """Lists the pictures of a split. Raises DatasetError for a folder, or a class, without any.

    class_names: of the split that was trained on; another class is then an error, and one that has
    no pictures here is none.
    """
    path = Path(path).expanduser()
    root = path / split
    if not root.is_dir():
        held = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        raise DatasetError(
            f"there is no folder {root}: pictures are looked for in {root}/<class>/"
            + (f"; {path} holds {', '.join(held[:5])}" if held else "")
        )
    found = {
        folder.name: sorted(_pictures(folder))
        for folder in sorted(root.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    if not any(found.values()):
        raise DatasetError(f"{root}: holds no pictures in folders named after their classes")
    if class_names is None:
        class_names = tuple(found)
        empty = next((name for name, pictures in found.items() if not pictures), None)
        if empty is not None:
            raise DatasetError(f"{root / empty}: holds no pictures of that class")
    unknown = [name for name, pictures in found.items() if pictures and name not in class_names]
    if unknown:
        raise DatasetError(
            f"{root}: holds the class {unknown[0]!r}, which is not among those trained on"
        )
    pairs = [
        (picture, class_id)
        for class_id, name in enumerate(class_names)
        for picture in found.get(name, ())
    ]
    pictures, class_ids = zip(*pairs, strict=True)
    return ImageFolder(path, split, class_names, pictures, class_ids)


def _pictures(folder: Path) -> Iterator[Path]:
    """The picture files of a folder and those below it."""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(where, name)


def counts(folder: ImageFolder) -> tuple[int, int]:
    """Pictures of the smallest and of the largest class."""
    numbers = Counter(folder.class_ids)
    return min(numbers.values()), max(numbers.values())
