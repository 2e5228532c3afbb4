"""PASCAL VOC folders: Annotations/*.xml, JPEGImages, ImageSets/Main/<split>.txt.

Coordinates are 1-based and inclusive, as the VOC development kit has them: xmin=1, xmax=width is a
box over the whole width. They become (xmin - 1, ymin - 1, xmax, ymax), which gives areas and
overlaps equal to the kit's "+ 1" arithmetic. Tools that write 0-based corners (xmin can be 0 there)
are off by at most one pixel on the left and top. A box with xmax = xmin or ymax = ymin as written
is a slip, not an object one pixel wide, and is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

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

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class _Unreadable(Exception):
    """An annotation file that cannot be used; the message says why."""


@dataclass(frozen=True)
class _Object:
    name: str
    box: (
        tuple[float, float, float, float] | None
    )  # xmin, ymin, xmax, ymax as written; None: not numbers
    difficult: bool


@dataclass(frozen=True)
class _Page:
    """One annotation file as written."""

    width: int  # 0: not given
    height: int
    objects: tuple[_Object, ...]


def open_voc(path: Path, split: str | None, class_names: tuple[str, ...] | None) -> Dataset:
    """Opens a VOC folder; see `open_dataset`. With no ImageSets/Main every annotated image is
    taken.

    Classes, where not given: a classes.txt, labels.txt or the only *.names in the folder; the 20 of
    VOC when the annotations name no others; else all names found in Annotations, sorted, whatever
    the split.
    """
    if not (path / "Annotations").is_dir():
        raise DatasetError(f"{path} has no folder Annotations")
    problems = Problems(str(path))
    split, ids = _ids(path, split)
    pages: dict[str, _Page | _Unreadable] = {}
    names = class_names or _listed_names(path)
    found = names is None
    if names is None:
        pages = {p.stem: _parse(p) for p in sorted((path / "Annotations").glob("*.xml"))}
        names = _found_names(path, pages.values())
    indices = class_indices(names)
    image_files = {p.stem: p for p in sorted((path / "JPEGImages").iterdir())
                   if p.suffix.lower() in IMAGE_SUFFIXES}  # fmt: skip
    images: list[Path] = []
    annotations: list[Annotation] = []
    for image_id in _once(ids, problems):
        page = pages.get(image_id) or _parse(path / "Annotations" / f"{image_id}.xml")
        if isinstance(page, _Unreadable):
            problems.add(f"{image_id}.xml", f"{page}: image left out")
        elif image_id not in image_files:
            problems.add(image_id, "no such image in JPEGImages: left out")
        else:
            image = image_files[image_id]
            try:
                annotations.append(_annotation(image_id, page, image, indices, problems))
            except (OSError, ValueError) as error:  # no size in the XML, and no image to ask
                problems.add(image.name, f"{error}: left out")
            else:
                images.append(image)
    if not images:
        reason = problems.found[0] if problems.found else "it lists none"
        which = f"in split {split!r}" if split else "at all"
        raise DatasetError(f"{path} has no usable image {which}: {reason}")
    return Dataset(
        path,
        split,
        names,
        tuple(images),
        tuple(annotations),
        problems.report(),
        classes_found=found and names != VOC_NAMES,
    )


def _ids(path: Path, split: str | None) -> tuple[str | None, list[str]]:
    """The split to take and the images it lists."""
    lists = {p.stem: p for p in (path / "ImageSets" / "Main").glob("*.txt")}
    # VOC also has a list per class, such as cat_train.txt.
    splits = [s for s in lists if not any(s.endswith(f"_{other}") for other in lists)]
    if not splits:
        if split is not None:
            raise DatasetError(
                f"{path} has no split {split!r}: there are no lists in ImageSets/Main"
            )
        return None, sorted(p.stem for p in (path / "Annotations").glob("*.xml"))
    split = choose_split(splits, split, path)
    ids = [line.split()[0] for line in read_lines(lists[split])]
    return split, [Path(i).stem if Path(i).suffix.lower() in IMAGE_SUFFIXES else i for i in ids]


def _once(ids: Iterable[str], problems: Problems) -> Iterator[str]:
    seen: set[str] = set()
    for image_id in ids:
        if image_id in seen:
            problems.add(image_id, "is listed twice: taken once")
        else:
            seen.add(image_id)
            yield image_id


def _listed_names(path: Path) -> tuple[str, ...] | None:
    for name in ("classes.txt", "labels.txt"):
        if (path / name).is_file():
            return read_names(path / name)
    names_files = sorted(path.glob("*.names"))
    if len(names_files) > 1:
        listed = ", ".join(p.name for p in names_files)
        raise DatasetError(f"{path} has several lists of classes: {listed}")
    return read_names(names_files[0]) if names_files else None


def _found_names(path: Path, pages: Iterable[_Page | _Unreadable]) -> tuple[str, ...]:
    found = {o.name for page in pages if isinstance(page, _Page) for o in page.objects if o.name}
    if not found:
        raise DatasetError(f"no annotation in {path} names a class")
    return VOC_NAMES if found <= set(VOC_NAMES) else tuple(sorted(found))


def _parse(path: Path) -> _Page | _Unreadable:
    try:
        raw = path.read_bytes()
    except OSError as error:
        return _Unreadable(f"cannot be read ({error.strerror})")
    # Entities can expand to gigabytes. A NUL byte would be UTF-16, where the search finds nothing.
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw or b"\0" in raw:
        return _Unreadable("has a DOCTYPE or is not UTF-8, which is refused")
    try:
        root = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError) as error:
        return _Unreadable(f"is not XML ({error})")
    sides = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    width, height = (int(side) if side.isdecimal() else 0 for side in sides)
    return _Page(width, height, tuple(_parse_object(o) for o in root.findall("object")))


def _parse_object(element: ElementTree.Element) -> _Object:
    corners = [element.findtext(f"bndbox/{c}", "") for c in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = (float(c) for c in corners)
        box = (x1, y1, x2, y2)
    except ValueError:
        box = None
    difficult = element.findtext("difficult", "0").strip() == "1"
    return _Object(element.findtext("name", "").strip(), box, difficult)


def _annotation(
    image_id: str, page: _Page, image: Path, indices: dict[str, int], problems: Problems
) -> Annotation:
    width, height = page.width, page.height
    if not (width and height):
        from yolov4_fast.sources import read_image

        height, width = read_image(image).shape[:2]
    objects = ObjectList(f"{image_id}.xml", width, height, problems)
    for number, o in enumerate(page.objects):
        label = f"object {number} ({o.name})"
        if o.name not in indices:
            problems.add(f"{image_id}.xml", f"{label} is of an unknown class: dropped")
        elif o.box is None:
            problems.add(f"{image_id}.xml", f"{label} has no box of numbers: dropped")
        else:
            xmin, ymin, xmax, ymax = o.box
            label += f" box ({xmin:g}, {ymin:g}, {xmax:g}, {ymax:g})"
            slip = xmax <= xmin or ymax <= ymin
            corner = (xmin, ymin) if slip else (xmin - 1, ymin - 1)
            objects.add((*corner, xmax, ymax), indices[o.name], label, o.difficult)
    return objects.annotation()
