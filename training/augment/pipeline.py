"""From annotated pictures to one training picture of the network's size: what is done, in which
order, how often.

Each picture is cropped, scaled, turned, mirrored and recoloured on its own; one picture or a mosaic
of four is the base; CutMix and MixUp add another picture to it; then all of it may be mirrored top
to bottom, and parts of it hidden. A setting that is off draws nothing from the generator, so adding
one leaves pictures without it as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from training.augment.colour import add_noise, jitter_colour, jitter_tone, random_scale
from training.augment.config import AugmentConfig
from training.augment.erase import cutout, drop_hidden, grid_mask, random_erase
from training.augment.geometric import Window, jitter, letterbox, rescale, view, whole
from training.augment.mix import cutmix, cutmix_rectangle, mixup
from training.augment.mosaic import mosaic, patch
from training.augment.sample import Sample

RESIZES = ("stretch", "letterbox")


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
    """Training picture `index` of `count` at height x width, alone or put together with others.

    `read(i)` gives sample i. All chance comes from `rng`: the same state gives the same picture.
    """
    draw = _Draw(height, width, config, rng, resize)
    if rng.random() < config.mosaic:
        result = draw.mosaic([read(i) for i in (index, *rng.integers(count, size=3).tolist())])
    else:
        result = draw.alone(read(index))
    if config.cutmix and rng.random() < config.cutmix:
        result = draw.cutmix(result, read(int(rng.integers(count))))
    if config.mixup and rng.random() < config.mixup:
        result = mixup(result, draw.alone(read(int(rng.integers(count)))), rng)
    if rng.random() < config.flip_vertical:
        result = _flip_vertical(result)
    return _with_parts_hidden(result, config, rng)


class _Draw(NamedTuple):
    """Draws how pictures are changed, and changes them."""

    height: int
    width: int
    config: AugmentConfig
    rng: np.random.Generator
    resize: str

    def alone(self, sample: Sample) -> Sample:
        config = self.config
        flip = bool(self.rng.random() < config.flip)
        window = self.window(sample)
        (angle,) = self.angles(1)
        result = view(sample, window, self.height, self.width, flip, config.min_visible, angle)
        return result._replace(image=self.recoloured(result.image))

    def mosaic(self, samples: list[Sample]) -> Sample:
        windows = [self.window(sample) for sample in samples]
        flips = (self.rng.random(4) < self.config.flip).tolist()
        angles = self.angles(4)
        return mosaic(
            samples,
            windows,
            flips,
            self.height,
            self.width,
            self.rng,
            self.config.min_visible,
            self.recoloured,
            angles,
        )

    def cutmix(self, sample: Sample, other: Sample) -> Sample:
        height, width, config, rng, _ = self
        place = cutmix_rectangle(height, width, rng)
        flip = bool(rng.random() < config.flip)
        window = self.window(other)
        (angle,) = self.angles(1)
        part = patch(other, window, flip, angle, place, height, width, config.min_visible)
        part = part._replace(image=self.recoloured(part.image))
        return cutmix(sample, part, place, config.min_visible)

    def window(self, sample: Sample) -> Window:
        letterboxed = self.resize == "letterbox"
        image = sample.image
        base = letterbox(image, self.height, self.width) if letterboxed else whole(image)
        if self.config.scale > 1:
            base = rescale(base, random_scale(self.config.scale, self.rng), self.rng)
        return jitter(base, self.config.jitter, self.rng)

    def angles(self, count: int) -> list[float]:
        limit = self.config.rotation
        return self.rng.uniform(-limit, limit, count).tolist() if limit else [0.0] * count

    def recoloured(self, image: np.ndarray) -> np.ndarray:
        config, rng = self.config, self.rng
        image = jitter_colour(image, config.hue, config.saturation, config.exposure, rng)
        if config.brightness or config.contrast > 1:
            image = jitter_tone(image, config.brightness, config.contrast, rng)
        if config.noise:
            image = add_noise(image, config.noise, rng)
        return image


def _flip_vertical(sample: Sample) -> Sample:
    boxes = sample.boxes.copy()
    boxes[:, [1, 3]] = sample.image.shape[0] - sample.boxes[:, [3, 1]]
    return Sample(np.ascontiguousarray(sample.image[::-1]), boxes, sample.class_ids)


def _with_parts_hidden(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> Sample:
    wanted = (
        (config.random_erase, random_erase),
        (config.cutout, cutout),
        (config.grid_mask, grid_mask),
    )
    chosen = [hide for share, hide in wanted if share and rng.random() < share]
    if not chosen:
        return sample
    image = sample.image.copy()
    hidden = np.zeros(image.shape[:2], dtype=np.uint8)
    for hide in chosen:
        hide(image, hidden, rng)
    return drop_hidden(sample._replace(image=image), hidden, config.min_visible)
