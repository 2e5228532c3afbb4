"""Darknet .data files: train= and valid= list images, names= the classes; one label file beside
each image.

A label line is `class cx cy width height`, normalised to the image. The label file of an image is
found as Darknet finds it: images or JPEGImages in its path replaced by labels, the suffix by .txt,
or else right beside the image. An image without a label file is one without objects, as in Darknet,
and is counted as a problem.
"""

from __future__ import annotations

from pathlib import Path

from yolov4_fast.darknet.names import read_names
from yolov4_fast.datasets.dataset import (
    Annotation,
    Dataset,
    DatasetError,
    ObjectList,
    Problems,
    choose_split,
    class_indices,
    read_lines,
)

SPLIT_KEYS = ("train", "valid", "val", "test")


def open_darknet(path: Path, split: str | None, class_names: tuple[str, ...] | None) -> Dataset:
    """Opens a .data file; see `open_dataset`. Split "val" and "valid" are the same.

    Relative paths are taken from the .data file's folder, its parents, or the working directory
    (Darknet's rule), whichever has the file first.
    """
    options = _read_options(path)
    splits = [key for key in SPLIT_KEYS if key in options]
    if split in ("val", "valid"):
        split = next((s for s in ("valid", "val") if s in splits), split)
    split = choose_split(splits, split, path)
    if "names" not in options:
        raise DatasetError(f"{path} has no line names=")
    own_names = read_names(_find(options["names"], path))
    if options.get("classes", str(len(own_names))) != str(len(own_names)):
        raise DatasetError(
            f"{path} says classes={options['classes']}, but {options['names']} has "
            f"{len(own_names)} names"
        )
    names = class_names or own_names
    indices = class_indices(names)
    class_of = [indices.get(name) for name in own_names]
    list_file = _find(options[split], path)
    problems = Problems(str(path))
    images: list[Path] = []
    annotations: list[Annotation] = []
    for line in read_lines(list_file):
        image = _find_image(line, list_file, path)
        if image is None:
            problems.add(line, "no such image: left out")
            continue
        images.append(image)
        annotations.append(_read_labels(image, class_of, problems))
    if not images:
        raise DatasetError(f"{list_file} names no image that is there")
    return Dataset(path, split, names, tuple(images), tuple(annotations), problems.report())


def _read_options(path: Path) -> dict[str, str]:
    options = {}
    for line in read_lines(path):
        key, equals, value = line.partition("=")
        if equals and not key.startswith(("#", ";")):
            options[key.strip()] = value.strip()
    return options


def _candidates(name: str, *beside: Path) -> list[Path]:
    folders = [parent for file in beside for parent in file.absolute().parents]
    return [*(folder / name for folder in folders), Path(name).expanduser()]


def _find(name: str, data_file: Path) -> Path:
    for candidate in _candidates(name, data_file):
        if candidate.is_file():
            return candidate
    raise DatasetError(f"{data_file} names {name}, which is not there")


def _find_image(name: str, list_file: Path, data_file: Path) -> Path | None:
    return next((c for c in _candidates(name, list_file, data_file) if c.is_file()), None)


def _label_file(image: Path) -> Path:
    """Where the labels of `image` are: the first of these that exists, or else beside it."""
    parts = image.parts
    for folder in ("images", "JPEGImages"):
        if folder in parts:
            at = len(parts) - 1 - parts[::-1].index(folder)
            replaced = Path(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")
            if replaced.is_file():
                return replaced
    return image.with_suffix(".txt")


def _read_labels(image: Path, class_of: list[int | None], problems: Problems) -> Annotation:
    """Boxes normalised to the image."""
    file = _label_file(image)
    objects = ObjectList(file.name, 1.0, 1.0, problems, normalized=True)
    if not file.is_file():
        problems.add(image.name, "no label file: taken as having no objects")
        return objects.annotation()
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        label = f"line {number} ({line.strip()})"
        try:
            class_id, cx, cy, width, height = (float(word) for word in line.split())
        except ValueError:
            problems.add(file.name, f"{label} is not five numbers: dropped")
            continue
        known = class_id.is_integer() and 0 <= class_id < len(class_of)
        mapped = class_of[int(class_id)] if known else None
        if mapped is None:
            problems.add(file.name, f"{label} is of an unknown class: dropped")
            continue
        box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        objects.add(box, mapped, label)
    return objects.annotation()
