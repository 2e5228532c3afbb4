"""Annotated images on disk: VOC folders, COCO JSON and Darknet .data files, read into one form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolov4_fast.datasets.coco import open_coco
from yolov4_fast.datasets.concatenation import concatenated
from yolov4_fast.datasets.darknet import open_darknet
from yolov4_fast.datasets.dataset import Annotation, Dataset, DatasetError, DatasetWarning
from yolov4_fast.datasets.voc import open_voc

__all__ = [
    "Annotation",
    "Dataset",
    "DatasetError",
    "DatasetWarning",
    "open_dataset",
    "open_datasets",
]


def open_dataset(
    path: str | Path, split: str | None = None, class_names: Sequence[str] | None = None
) -> Dataset:
    """Opens the annotated images at `path`, whichever of the three formats they are in.

    `path`: a VOC folder (Annotations, JPEGImages, ImageSets/Main), a COCO JSON file or a folder
    that holds annotations/*.json, or a Darknet .data file. `split`: one of those the data set has;
    None takes the one to evaluate on (val, valid, validation or test), or the only one there is.
    `class_names` forces classes and their order; objects of other classes are then left out and
    counted.

    Unusable annotations never raise: they are dropped or clipped, listed in `Dataset.problems`, and
    one `DatasetWarning` says how many there were. A path or split that is not there raises
    `DatasetError`.
    """
    path = Path(path).expanduser()
    names = None if class_names is None else tuple(class_names)
    if not path.exists():
        raise DatasetError(f"there is no data set at {path}")
    if path.is_file():
        if path.suffix == ".json":
            return open_coco(path, split, names)
        if path.suffix == ".data":
            return open_darknet(path, split, names)
        raise DatasetError(f"{path} is neither a COCO .json nor a Darknet .data file")
    if (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir():
        return open_voc(path, split, names)
    if any(path.glob("annotations/*.json")) or any(path.glob("*/_annotations.coco.json")):
        return open_coco(path, split, names)
    inside = sorted(p.parent.name for p in path.glob("*/Annotations"))
    if inside:  # a VOCdevkit
        raise DatasetError(
            f"{path} is no data set, but holds some: name {', '.join(inside)} in it, or several"
        )
    raise DatasetError(
        f"{path} is no data set: a VOC folder has Annotations and JPEGImages, a COCO folder "
        "annotations/*.json; for Darknet name the .data file itself"
    )


def open_datasets(
    paths: Sequence[str | Path],
    split: str | Sequence[str | None] | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Opens several data sets, in any of the formats, as one: their images in the order given.

    `paths`: one or more, each as `open_dataset` takes it; VOC 07+12 is VOCdevkit/VOC2007 and
    VOCdevkit/VOC2012 with the split trainval. `split`: of all of them, or one for each.
    `class_names` forces classes and their order.

    Without `class_names`, lists of classes that were written down (COCO's categories, a .names
    file, classes.txt, the 20 of VOC) must hold the same names; the order is that of the first.
    Classes that were gathered from annotations join them, in the order in which they are first
    seen.

    Problems are counted and warned of by set, and name their set. Images of one name in different
    sets are different images. The same split of the same path twice raises `DatasetError`.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be a sequence of paths, not {paths!r}")
    splits = [split] * len(paths) if split is None or isinstance(split, str) else list(split)
    if not paths or len(splits) != len(paths):
        raise DatasetError(f"{len(splits)} split(s) were given for {len(paths)} data set(s)")
    parts = [open_dataset(path, one, class_names) for path, one in zip(paths, splits, strict=True)]
    return concatenated(parts) if len(parts) > 1 else parts[0]
