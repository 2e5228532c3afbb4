"""Batches of pictures for the classifier.

The training picture of (seed, epoch, index) is always the same: each has its own random generator,
so neither the number of workers or processes nor a resumed run changes what is trained on. A
picture that cannot be decoded gives its place to the next one that can, and is named in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from training.augment.colour import jitter_colour
from training.cache import Picture, in_memory, on_disk
from training.classify.config import PretrainConfig
from training.classify.folder import ImageFolder
from training.classify.mixing import PARTS, Mixture, central_crop, cutmix, mosaic, random_crop
from training.workers import Workers
from yolov4_fast.sources import read_image

CACHES = ("memory", "disk", "none")
CACHE_BYTES = 4 << 30
KEPT_SCALE = 2.0  # x the input: crops of a quarter of a picture's area are still not enlarged
CENTRAL = 0.875  # share of a validation picture that is shown, 224 of 256 as is usual
UNREADABLE = Picture(np.empty((0, 0, 3), np.uint8), 0, 0)  # kept for what cannot be decoded

Request = TypeVar("Request")


class Key(NamedTuple):
    """Which training picture."""

    epoch: int
    number: int  # of the picture in the folder


class Example(NamedTuple):
    """One picture of the network's size and what it shows."""

    image: np.ndarray  # [H, W, 3] uint8 RGB
    classes: np.ndarray  # [PARTS] int64
    shares: np.ndarray  # [PARTS] float32, sum 1
    unreadable: tuple[int, ...] = ()  # pictures that were met and could not be decoded


class Batch(NamedTuple):
    images: Tensor  # [B, 3, H, W] uint8 RGB, in channels_last memory
    classes: Tensor  # [B, PARTS] int64
    shares: Tensor  # [B, PARTS] float32, of the pixels; each row's sum 1
    unreadable: tuple[int, ...]


class Pictures:
    """The pictures of a folder as they are kept: where both their sides are over `KEPT_SCALE` x the
    input's, shrunk until one is not.

    cache: "memory" decodes them once, as many as fit into `cache_bytes`, before workers are forked;
    "disk" keeps all of them in one file in `cache_folder`, which later runs and other processes use
    too; "none" decodes each time.
    """

    def __init__(
        self,
        folder: ImageFolder,
        height: int,
        width: int,
        *,
        cache: str = "memory",
        cache_bytes: int = CACHE_BYTES,
        cache_folder: Path | None = None,
        progress: bool = False,
    ) -> None:
        self.folder, self.height, self.width = folder, height, width
        self._cache: Mapping[int, Picture] = {}
        if cache == "memory":
            self._cache = in_memory(len(folder), self._decode, cache_bytes, progress)
        elif cache == "disk":
            if cache_folder is None:
                raise ValueError("a cache on disk needs a folder")
            size = round(height * KEPT_SCALE), round(width * KEPT_SCALE)
            file = cache_folder / f"{folder.split}-{size[1]}x{size[0]}.cache"
            self._cache = on_disk(file, folder.image_paths, size, self._decode, progress)

    def __len__(self) -> int:
        return len(self.folder)

    @property
    def unreadable(self) -> tuple[int, ...]:
        """Those among the cached ones that cannot be decoded."""
        return tuple(index for index, kept in self._cache.items() if not kept.image.size)

    def read(self, index: int) -> np.ndarray | None:
        """Picture `index`, [H, W, 3] uint8 RGB, or None where it cannot be decoded."""
        kept = self._cache.get(index) or self._decode(index)
        return kept.image if kept.image.size else None

    def readable(self, index: int) -> tuple[np.ndarray, int, tuple[int, ...]]:
        """The first picture from `index` on that can be decoded, its number, and those before it
        that cannot. Raises ValueError where there is none.
        """
        for passed in range(len(self)):
            number = (index + passed) % len(self)
            image = self.read(number)
            if image is not None:
                return image, number, tuple((index + i) % len(self) for i in range(passed))
        raise ValueError(f"none of the {len(self)} pictures of {self.where} can be decoded")

    @property
    def where(self) -> str:
        return str(self.folder.path / self.folder.split)

    def _decode(self, index: int) -> Picture:
        try:
            image = read_image(self.folder.image_paths[index])
        except FileNotFoundError:  # a data set that is gone is no matter of a bad picture
            raise
        except (ValueError, OSError):
            return UNREADABLE
        height, width = image.shape[:2]
        scale = KEPT_SCALE * max(self.height / height, self.width / width)
        if scale < 1:
            size = (max(round(width * scale), 1), max(round(height * scale), 1))
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        return Picture(image, height, width)


class TrainingExamples:
    """The pictures as the classifier is trained on them, one `Example` for each `Key`."""

    def __init__(self, pictures: Pictures, config: PretrainConfig) -> None:
        self.pictures, self.config = pictures, config

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> Example:
        config = self.config
        rng = np.random.default_rng((config.seed, key.epoch, key.number))
        choice = rng.random()
        count = 2 if choice < config.cutmix else 1
        if config.cutmix <= choice < config.cutmix + config.mosaic:
            count = PARTS
        numbers = [key.number, *rng.integers(len(self), size=count - 1).tolist()]
        images, classes = [], []
        unreadable: list[int] = []
        for number in numbers:
            image, taken, passed = self.pictures.readable(number)
            images.append(self._view(image, rng))
            classes.append(self.pictures.folder.class_ids[taken])
            unreadable += passed
        match count:
            case 1:
                mixture = Mixture(images[0], (1.0,))
            case 2:
                mixture = cutmix(images[0], images[1], rng)
            case _:
                mixture = mosaic(images, rng)
        return _example(mixture, classes, tuple(unreadable))

    def prepare(self, keys: list[Key]) -> Batch:
        return collate([self[key] for key in keys])

    def _view(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        config = self.config
        image = random_crop(image, config.height, config.width, config.crop, rng)
        if rng.random() < config.flip:
            image = cv2.flip(image, 1)
        return jitter_colour(image, config.hue, config.saturation, config.exposure, rng)


class ValidationExamples:
    """The middle of each picture, one `Example` for each number; a picture that cannot be decoded
    has no part in any class.
    """

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Example:
        height, width = self.pictures.height, self.pictures.width
        image = self.pictures.read(index)
        if image is None:
            black = np.zeros((height, width, 3), dtype=np.uint8)
            return _example(Mixture(black, (0.0,)), [0], (index,))
        shown = central_crop(image, height, width, CENTRAL)
        return _example(Mixture(shown, (1.0,)), [self.pictures.folder.class_ids[index]], ())

    def prepare(self, indices: list[int]) -> Batch:
        return collate([self[index] for index in indices])


def _example(mixture: Mixture, classes: list[int], unreadable: tuple[int, ...]) -> Example:
    """Unused parts are of the first one's class, with no share."""
    padding = PARTS - len(classes)
    return Example(
        mixture.image,
        np.array([*classes, *classes[:1] * padding], dtype=np.int64),
        np.array([*mixture.shares, *[0.0] * padding], dtype=np.float32),
        unreadable,
    )


class EpochKeys:
    """The keys of each batch of an epoch: a permutation that depends on seed and epoch alone.

    batch_size: of all processes together. The last pictures that do not fill a batch are left out.
    Process `rank` of `world` gets every world-th picture of each batch.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, epoch
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            mine = order[start + self.rank : start + self.batch_size : self.world]
            yield [Key(self.epoch, index) for index in mine]


def collate(examples: list[Example]) -> Batch:
    images = torch.from_numpy(np.stack([example.image for example in examples]))
    return Batch(
        images.permute(0, 3, 1, 2),
        torch.from_numpy(np.stack([example.classes for example in examples])),
        torch.from_numpy(np.stack([example.shares for example in examples])),
        tuple(index for example in examples for index in example.unreadable),
    )


def validation_requests(count: int, size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """The numbers of each batch of process `rank` of `world`: all pictures once, in order; the last
    batch may be small.
    """
    mine = range(rank, count, world)
    return [list(mine[start : start + size]) for start in range(0, len(mine), size)]


class Batches(Generic[Request]):
    """The batch of each request: prepared ahead by `workers` processes that stay between epochs, or
    in this process when it is asked for.
    """

    def __init__(
        self, prepare: Callable[[Request], Batch], workers: int = 0, pin_memory: bool = False
    ) -> None:
        self._prepare = prepare
        self._workers = Workers(prepare, workers, pin_memory) if workers else None

    def __call__(self, requests: Iterable[Request]) -> Iterator[Batch]:
        if self._workers is None:
            return map(self._prepare, requests)
        return self._workers.results(requests)
