"""Annotated images on disk: VOC folders, COCO JSON and Darknet .data files, read into one form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolov4_fast.datasets.coco import open_coco
from yolov4_fast.datasets.darknet import open_darknet
from yolov4_fast.datasets.dataset import Annotation, Dataset, DatasetError, DatasetWarning
from yolov4_fast.datasets.voc import open_voc

__all__ = ["Annotation", "Dataset", "DatasetError", "DatasetWarning", "open_dataset"]


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
    raise DatasetError(
        f"{path} is no data set: a VOC folder has Annotations and JPEGImages, a COCO folder "
        "annotations/*.json; for Darknet name the .data file itself"
    )
