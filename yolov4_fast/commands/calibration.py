"""What `yolov4-fast build --calibrate` names: pictures to find scales with and, where they are
annotated, what the precision costs in AP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from yolov4_fast.datasets import Dataset, DatasetError, open_dataset
from yolov4_fast.sources import frames, read_image

if TYPE_CHECKING:
    from yolov4_fast.engines.engine import Engine
    from yolov4_fast.model import Model

IMAGES = 64  # the scales are hardly different from more


@dataclass(frozen=True)
class Calibration:
    """paths: of the pictures, spread over what was named. dataset: to measure AP on, if any."""

    source: str
    paths: tuple[Path, ...]
    dataset: Dataset | None

    def images(self) -> Iterator[Tensor]:
        """[H, W, 3] uint8 RGB, one by one."""
        for path in self.paths:
            yield torch.from_numpy(read_image(path))


def open_calibration(source: str) -> Calibration:
    """A data set (its training images are looked at, its AP is of the ones to evaluate on), a
    folder or a glob of pictures. Raises DatasetError, ValueError, FileNotFoundError.
    """
    try:
        dataset = open_dataset(source)
    except DatasetError as error:
        if Path(source).is_file():
            raise DatasetError(f"{error}; nor is it a folder of pictures") from None
        return Calibration(source, _spread(frames(source).files), None)
    try:
        seen = open_dataset(source, "train")
    except DatasetError:
        seen = dataset
    return Calibration(source, _spread(seen.image_paths), dataset)


def measure_loss(
    engine: Engine, model: Model, dataset: Dataset, *, progress: bool
) -> dict[str, Any]:
    """AP50 of the engine and of the model in float32 on the same device, by VOC's rule."""
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines.build import build_engine
    from yolov4_fast.evaluation import evaluate

    reference = build_engine(
        model.network,
        model.state,
        model.class_names,
        engine="torch",
        precision="f32",
        max_batch=engine.max_batch,
        resize=engine.resize,
        device=str(engine.device),
    )
    with reference:
        exact, ours = (
            evaluate(Detector(each), dataset, progress=progress).mAP50
            for each in (reference, engine)
        )
    return {"images": len(dataset), "f32": exact, engine.precision: ours, "loss": exact - ours}


def _spread(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """At most IMAGES of them, evenly chosen."""
    count = min(len(paths), IMAGES)
    return tuple(paths[number * len(paths) // count] for number in range(count))
