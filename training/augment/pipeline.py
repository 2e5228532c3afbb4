"""From annotated pictures to one training picture of the network's size: what is done, in which
order, how often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from training.augment.colour import jitter_colour
from training.augment.geometric import Window, jitter, letterbox, view, whole
from training.augment.mosaic import mosaic
from training.augment.sample import Sample

RESIZES = ("stretch", "letterbox")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training pictures are varied. The defaults are those of Darknet's yolov4.cfg."""

    mosaic: float = 0.5  # probability
    flip: float = 0.5  # probability of mirroring left to right
    flip_vertical: float = (
        0.0  # the same, top to bottom: for pictures without an up, such as microscopy
    )
    jitter: float = 0.3  # each side of the crop moves by up to this share
    hue: float = 0.1  # of the colour circle
    saturation: float = 1.5  # factor or divisor
    exposure: float = 1.5  # factor or divisor
    min_visible: float = 0.1  # boxes that keep a smaller share of their area are dropped

    def __post_init__(self) -> None:
        for name in ("mosaic", "flip", "flip_vertical", "hue", "min_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.jitter < 0.5:
            raise ValueError(f"jitter must be at least 0 and below 0.5, not {self.jitter}")
        for name in ("saturation", "exposure"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> AugmentConfig:
        """From names and values; an unknown name raises ValueError."""
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(f"unknown augmentation {key!r}; known are {', '.join(known)}")
        return cls(**options)

    @classmethod
    def off(cls) -> AugmentConfig:
        """Resizing only."""
        return cls(mosaic=0, flip=0, jitter=0, hue=0, saturation=1, exposure=1)


def augmented(
    read: Callable[[int], Sample],
    index: int,
    count: int,
    height: int,
    width: int,
    config: AugmentConfig,
    rng: np.random.Generator,
    resize: str = "stretch",
) -> Sample:
    """Training picture `index` of `count` at height x width, alone or in a mosaic with three
    others.

    `read(i)` gives sample i. All chance comes from `rng`: the same state gives the same picture.
    """

    def window(sample: Sample) -> Window:
        letterboxed = resize == "letterbox"
        base = letterbox(sample.image, height, width) if letterboxed else whole(sample.image)
        return jitter(base, config.jitter, rng)

    def recolour(image: np.ndarray) -> np.ndarray:
        return jitter_colour(image, config.hue, config.saturation, config.exposure, rng)

    if rng.random() < config.mosaic:
        samples = [read(i) for i in (index, *rng.integers(count, size=3).tolist())]
        windows = [window(sample) for sample in samples]
        flips = (rng.random(4) < config.flip).tolist()
        result = mosaic(samples, windows, flips, height, width, rng, config.min_visible, recolour)
    else:
        sample = read(index)
        flip = bool(rng.random() < config.flip)
        result = view(sample, window(sample), height, width, flip, config.min_visible)
        result = result._replace(image=recolour(result.image))
    if rng.random() < config.flip_vertical:
        result = _flip_vertical(result)
    return result


def _flip_vertical(sample: Sample) -> Sample:
    boxes = sample.boxes.copy()
    boxes[:, [1, 3]] = sample.image.shape[0] - sample.boxes[:, [3, 1]]
    return Sample(np.ascontiguousarray(sample.image[::-1]), boxes, sample.class_ids)
