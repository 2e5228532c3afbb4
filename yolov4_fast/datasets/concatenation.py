"""Several data sets as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from yolov4_fast.datasets.dataset import Annotation, Dataset, DatasetError, class_indices


def concatenated(datasets: Sequence[Dataset]) -> Dataset:
    """The images of all, in order, with classes by name; see `open_datasets`.

    `path` is the first set's. `image_ids` are kept if all sets have them and none occurs twice,
    `category_ids` if all sets have the same. Two sets of the same path and split raise
    `DatasetError`.
    """
    _check_different(datasets)
    names = _joint_names(datasets)
    indices = class_indices(names)
    annotations = [
        annotation
        for dataset in datasets
        for annotation in _renumbered(dataset, [indices[name] for name in dataset.class_names])
    ]
    image_ids = tuple(i for dataset in datasets for i in dataset.image_ids)
    category_ids = {_category_ids(dataset, names) for dataset in datasets}
    return Dataset(
        datasets[0].path,
        ", ".join(dict.fromkeys(str(dataset.split) for dataset in datasets)),
        names,
        tuple(path for dataset in datasets for path in dataset.image_paths),
        tuple(annotations),
        tuple(f"{d.path}: {problem}" for d in datasets for problem in d.problems),
        image_ids=image_ids if len(set(image_ids)) == len(annotations) else (),
        category_ids=category_ids.pop() if len(category_ids) == 1 else (),
        classes_found=any(dataset.classes_found for dataset in datasets),
    )


def _check_different(datasets: Sequence[Dataset]) -> None:
    seen: set[tuple[object, ...]] = set()
    for dataset in datasets:
        key = (dataset.path.resolve(), dataset.split)
        if key in seen:
            raise DatasetError(f"{dataset.path}, split {dataset.split!r}, is given twice")
        seen.add(key)


def _joint_names(datasets: Sequence[Dataset]) -> tuple[str, ...]:
    listed = [dataset for dataset in datasets if not dataset.classes_found]
    for other in listed[1:]:
        first = listed[0]
        odd = [
            f"{name!r}"
            for name in dict.fromkeys((*first.class_names, *other.class_names))
            if (name in first.class_names) != (name in other.class_names)
        ]
        if odd:
            raise DatasetError(
                f"{first.path} and {other.path} have different classes: only one of them has "
                f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}"
            )
    in_order = [*listed[:1], *datasets]
    return tuple(dict.fromkeys(name for dataset in in_order for name in dataset.class_names))


def _renumbered(dataset: Dataset, indices: list[int]) -> tuple[Annotation, ...]:
    """The annotations with class i become class indices[i]."""
    if indices == list(range(len(indices))):
        return dataset.annotations
    table = np.array(indices, dtype=np.int64)
    return tuple(replace(a, class_ids=table[a.class_ids]) for a in dataset.annotations)


def _category_ids(dataset: Dataset, names: Sequence[str]) -> tuple[int, ...]:
    """COCO's id of each of the names, in their order; empty for other formats."""
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=False))
    return tuple(ids.get(name, -1) for name in names) if ids else ()
