"""COCO JSON: one file of images, annotations and categories.

Boxes are (x, y, width, height) in continuous 0-based pixels. Category ids are sparse (COCO's run to
90 for 80 classes): classes here are 0, 1, ... in the order of the ids, and `Dataset.category_ids`
has the originals.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from yolov4_fast.datasets.dataset import (
    Annotation,
    Dataset,
    DatasetError,
    ObjectList,
    Problems,
    choose_split,
    class_indices,
)

FIELDS: dict[str, dict[str, Any]] = {  # what every entry of a list must have, and of which type
    "images": {"id": int, "file_name": str, "width": int | float, "height": int | float},
    "annotations": {"image_id": int, "category_id": int, "bbox": object},
    "categories": {"id": int, "name": str | int},
}


def open_coco(path: Path, split: str | None, class_names: tuple[str, ...] | None) -> Dataset:
    """Opens a COCO file, or a folder of annotations/*<split>*.json or
    <split>/_annotations.coco.json.

    The images are looked for beside the file, and in images and folders named after the split; see
    `_image_folder`.
    """
    root = path
    if path.is_dir():
        files = _split_files(path)
        split = choose_split(files, split, path)
        path = files[split]
    else:
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
    content = _load(path)
    problems = Problems(str(path))
    categories = sorted(content["categories"], key=lambda c: c["id"])
    own_names = tuple(str(c["name"]) for c in categories)
    class_indices(own_names)
    names = class_names or own_names
    indices = class_indices(names)
    category_of = {str(c["name"]): c["id"] for c in categories}
    class_of = {c["id"]: indices.get(str(c["name"])) for c in categories}
    folder = _image_folder(root, path, content["images"], split)
    objects = {
        image["id"]: ObjectList(image["file_name"], image["width"], image["height"], problems)
        for image in content["images"]
    }
    for record in content["annotations"]:
        _add_object(record, objects, class_of, problems)
    image_paths: list[Path] = []
    image_ids: list[int] = []
    annotations: list[Annotation] = []
    for image in content["images"]:
        image_path = folder / image["file_name"]
        if not image_path.is_file():
            problems.add(image["file_name"], f"no such image in {folder}: left out")
            continue
        image_paths.append(image_path)
        image_ids.append(image["id"])
        annotations.append(objects[image["id"]].annotation())
    return Dataset(
        path,
        split,
        names,
        tuple(image_paths),
        tuple(annotations),
        problems.report(),
        image_ids=tuple(image_ids),
        category_ids=tuple(category_of.get(name, -1) for name in names),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    for key, fields in FIELDS.items():
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DatasetError(f"{path} is not COCO JSON: it has no list of {key}")
        for record in records:
            _check_record(path, key, record, fields)
        if "id" in fields:
            for number, count in Counter(record["id"] for record in records).most_common(1):
                if count > 1:
                    raise DatasetError(f"{path}: {count} entries of {key} have the id {number}")
    return content


def _check_record(path: Path, key: str, record: Any, fields: dict[str, Any]) -> None:
    if not isinstance(record, dict):
        raise DatasetError(f"{path}: an entry of {key} is {record!r}, not an object")
    for name, kind in fields.items():
        if name not in record:
            raise DatasetError(f"{path}: an entry of {key} has no {name!r}: {record}")
        if not isinstance(record[name], kind):
            raise DatasetError(f"{path}: {name!r} cannot be {record[name]!r} in {key}: {record}")


def _split_files(path: Path) -> dict[str, Path]:
    """Split name to file: annotations/instances_val2017.json is split val2017, and val for
    short.
    """
    files: dict[str, Path] = {}
    found = sorted(path.glob("annotations/*.json"))
    instances = [p for p in found if p.stem.startswith("instances")]
    for file in instances or found:
        name = file.stem.removeprefix("instances").lstrip("_") or file.stem
        files[name] = file
    for file in sorted(path.glob("*/_annotations.coco.json")):
        files[file.parent.name] = file
    for name in list(files):
        short = name.rstrip("0123456789")
        if short and sum(n.rstrip("0123456789") == short for n in files) == 1:
            files.setdefault(short, files[name])
    return files


def _image_folder(root: Path, path: Path, images: list[dict[str, Any]], split: str | None) -> Path:
    """The folder that holds the most of a sample of the images."""
    stem = path.stem.removeprefix("instances").lstrip("_")
    names = [n for n in dict.fromkeys((stem, split)) if n]
    likely = (path.parent, *(root / "images" / n for n in names), *(root / n for n in names),
              root / "images", root)  # fmt: skip
    folders = [folder for folder in dict.fromkeys(likely) if folder.is_dir()]
    sample = images[:: max(len(images) // 20, 1)]
    there = [sum((folder / i["file_name"]).is_file() for i in sample) for folder in folders]
    if not any(there):
        looked = ", ".join(map(str, folders))
        raise DatasetError(f"none of the images of {path} is there; looked in {looked}")
    return folders[there.index(max(there))]


def _add_object(
    record: dict[str, Any],
    objects: dict[int, ObjectList],
    class_of: dict[int, int | None],
    problems: Problems,
) -> None:
    where = f"annotation {record.get('id', '?')}"
    image = objects.get(record["image_id"])
    if image is None:
        return problems.add(where, f"there is no image {record['image_id']}: dropped")
    class_id = class_of.get(record["category_id"])
    if class_id is None:
        return problems.add(
            where, f"category {record['category_id']} is of an unknown class: dropped"
        )
    try:
        x, y, width, height = (float(v) for v in record["bbox"])
        area = float(record.get("area", width * height))
    except (TypeError, ValueError):
        return problems.add(where, f"has no box of four numbers but {record['bbox']!r}: dropped")
    label = f"{where} box ({x:g}, {y:g}, {width:g}, {height:g})"
    crowd = bool(record.get("iscrowd", 0))
    return image.add((x, y, x + width, y + height), class_id, label, crowd=crowd, area=area)
