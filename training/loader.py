"""Batches of augmented training pictures.

The picture of (seed, epoch, index, size) is always the same: each has its own random generator, so
neither the number of workers nor a resumed run changes what is trained on. Decoded images are kept,
shrunk until they only just cover 1.5 times the network's input: in memory, filled before any worker
is forked, so that workers share it, or in a file that all processes map. Workers stay for all
epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from training.augment.pipeline import RESIZES, AugmentConfig, augmented
from training.augment.sample import Sample
from training.cache import Picture, in_memory, on_disk
from training.workers import Workers
from yolov4_fast.datasets import Dataset

CACHES = ("memory", "disk", "none")
CACHE_SCALE = 1.5  # jitter zooms in by at most 1 / (1 - 2 * 0.3) = 2.5, on average by much less
CACHE_BYTES = 4 << 30
LONGEST = 32766  # px of a side; OpenCV's warps take no more

Sizes = Callable[[int], tuple[int, int]]


class Batch(NamedTuple):
    images: Tensor  # [B, 3, H, W] uint8 RGB, in channels_last memory
    targets: (
        Tensor  # [M, 6] float32: image index, class, cx, cy, width, height, the last four in 0..1
    )


class Key(NamedTuple):
    """Which training picture, and at which size."""

    epoch: int
    number: int  # of the picture in the data set
    height: int
    width: int


Request = tuple[AugmentConfig, list[Key]]  # the first: workers keep no configuration


class TrainingSet(TorchDataset[Sample]):
    """The pictures of a data set as the network is trained on them, one `Sample` for each `Key`.

    height, width: the network's input. largest: height and width of the largest pictures that will
    be asked for, if that is another size (multi-scale training). Crowd regions are left out, and
    difficult objects unless `difficult` is set (Darknet leaves them out too).

    cache: "memory" decodes images once, as many as fit into `cache_bytes`; "disk" keeps all of them
    in one file in `cache_folder`, which later runs and other processes use too; "none" decodes each
    time.
    """

    def __init__(
        self,
        dataset: Dataset,
        height: int,
        width: int,
        config: AugmentConfig | None = None,
        *,
        seed: int = 0,
        resize: str = "stretch",
        largest: tuple[int, int] | None = None,
        cache: str = "memory",
        cache_folder: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        difficult: bool = False,
        progress: bool = False,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, not {resize!r}")
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, not {cache!r}")
        if min(height, width) < 1:
            raise ValueError(f"height and width must be positive, not {height} and {width}")
        self.dataset = dataset
        self.height = height
        self.width = width
        self.config = config or AugmentConfig()
        self.seed = seed
        self.resize = resize
        self.difficult = difficult
        self._covered = largest or (height, width)
        self._cache: Mapping[int, Picture] = {}
        if cache == "memory":
            self._cache = in_memory(len(dataset), self._decode, cache_bytes, progress)
        elif cache == "disk":
            if cache_folder is None:
                raise ValueError("a cache on disk needs a folder")
            file = cache_folder / "pictures-{1}x{0}.cache".format(*self._covered)
            self._cache = on_disk(file, dataset.image_paths, self._covered, self._decode, progress)
        self.idle: dict[tuple[int, bool], Workers[Request, Batch]] = {}  # between epochs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"idle": {}}  # a copy, for workers to use, has none of its own

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample:
        return self._augmented(key, self.config)

    def misfits(self) -> tuple[str, ...]:
        """Which cached pictures are not as large as their annotations note, a sentence each: those
        boxes lie elsewhere in them. So it is with pictures that were resized after they had been
        annotated, or annotated without regard to the turn that their EXIF data asks for.
        """
        noted = self.dataset.annotations
        return tuple(
            f"{self.dataset.image_paths[index].name}: is {kept.width}x{kept.height}, its boxes are "
            f"for {size[1]}x{size[0]}"
            for index, kept in self._cache.items()
            if (size := noted[index].size) and size != (kept.height, kept.width)
        )

    def prepare(self, request: Request) -> Batch:
        """The batch of some keys, all of one size."""
        config, keys = request
        return collate([self._augmented(key, config) for key in keys])

    def _augmented(self, key: Key, config: AugmentConfig) -> Sample:
        rng = np.random.default_rng((self.seed, key.epoch, key.number))
        return augmented(
            self.read, key.number, len(self), key.height, key.width, config, rng, self.resize
        )

    def read(self, index: int) -> Sample:
        """Image `index` and its boxes before any augmentation; where both its sides are over
        `CACHE_SCALE` x the largest input's, shrunk until one of them is not; so is one whose longer
        side is over `LONGEST`.
        """
        image, height, width = self._cache.get(index) or self._decode(index)
        annotation = self.dataset.annotation(index, (height, width))
        keep = ~annotation.crowd
        if not self.difficult:
            keep &= ~annotation.difficult
        boxes = annotation.boxes[keep]
        if image.shape[:2] != (height, width):
            ratio = (image.shape[1] / width, image.shape[0] / height)
            boxes = boxes * np.array([*ratio, *ratio], dtype=np.float32)
        return Sample(image, boxes, annotation.class_ids[keep])

    def _decode(self, index: int) -> Picture:
        image = self.dataset.read_image(index)
        height, width = image.shape[:2]
        largest_height, largest_width = self._covered
        scale = max(largest_height * CACHE_SCALE / height, largest_width * CACHE_SCALE / width)
        scale = min(scale, LONGEST / max(height, width))
        if scale < 1:
            size = (max(round(width * scale), 1), max(round(height * scale), 1))
            # Bilinear, not area: inference resizes without averaging either.
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        return Picture(image, height, width)


class EpochBatches:
    """The keys of each batch of an epoch: a permutation of the data set that depends on seed and
    epoch alone.

    `batch_size` is per process: of `world` processes, the one of `rank` gets every `world`-th
    picture of each whole batch. The last images that do not fill a batch are left out.
    `first_batch` skips what a resumed run has already seen. `sizes` gives height and width of the
    pictures of each batch by its number in the epoch; None: the set's own.
    """

    def __init__(
        self,
        training_set: TrainingSet,
        batch_size: int,
        epoch: int,
        *,
        first_batch: int = 0,
        rank: int = 0,
        world: int = 1,
        sizes: Sizes | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(training_set) // world:
            raise ValueError(
                f"{len(training_set)} images do not fill a batch of {batch_size} "
                f"on each of {world} process(es)"
            )
        self.training_set = training_set
        self.batch_size = batch_size
        self.epoch = epoch
        self.first_batch = first_batch
        self.rank = rank
        self.world = world
        self.sizes = sizes

    def __len__(self) -> int:
        return max(len(self.training_set) // (self.batch_size * self.world) - self.first_batch, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        data = self.training_set
        order = np.random.default_rng((data.seed, self.epoch)).permutation(len(data)).tolist()
        step = self.batch_size * self.world
        for batch in range(self.first_batch, self.first_batch + len(self)):
            mine = order[batch * step + self.rank : (batch + 1) * step : self.world]
            height, width = self.sizes(batch) if self.sizes else (data.height, data.width)
            yield [Key(self.epoch, i, height, width) for i in mine]


def collate(samples: list[Sample]) -> Batch:
    """Samples of one size as a batch."""
    height, width = samples[0].image.shape[:2]
    images = _empty(len(samples), height, width, 3)
    pixels = images.numpy()
    size = np.array([width, height], dtype=np.float32)
    rows = []
    for number, sample in enumerate(samples):
        pixels[number] = sample.image
        corners = sample.boxes.reshape(-1, 2, 2) / size
        row = np.empty((len(sample.boxes), 6), dtype=np.float32)
        row[:, 0] = number
        row[:, 1] = sample.class_ids
        row[:, 2:4] = corners.mean(axis=1)
        row[:, 4:6] = corners[:, 1] - corners[:, 0]
        rows.append(row)
    return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(rows)))


def _empty(*shape: int) -> Tensor:
    """uint8, not initialised. In a worker it lies in shared memory, as torch's own collate has it:
    sending it then copies nothing.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def batches(
    training_set: TrainingSet,
    batch_size: int,
    epoch: int,
    *,
    workers: int = 0,
    first_batch: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    sizes: Sizes | None = None,
) -> Epoch:
    """The batches of one epoch, each a `Batch`; `len()` of it is their number. See `EpochBatches`.

    `training_set.config` may be changed between epochs. `workers` processes prepare batches ahead;
    0 prepares each when it is asked for. With workers, OpenCV goes on without threads of its own,
    in this process too. An image that cannot be read raises ValueError or OSError naming it.
    """
    keys = EpochBatches(
        training_set,
        batch_size,
        epoch,
        first_batch=first_batch,
        rank=rank,
        world=world,
        sizes=sizes,
    )
    return Epoch(keys, workers, pin_memory)


class Epoch:
    """Iterates over the batches of an epoch; made by `batches`."""

    def __init__(self, keys: EpochBatches, workers: int, pin_memory: bool) -> None:
        self.keys = keys
        self.workers = workers
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        data = self.keys.training_set
        requests = ((data.config, keys) for keys in self.keys)
        if self.workers:
            return self._prepared_ahead(data, requests)
        prepared = map(data.prepare, requests)
        return map(_pinned, prepared) if self.pin_memory else prepared

    def _prepared_ahead(self, data: TrainingSet, requests: Iterable[Request]) -> Iterator[Batch]:
        kind = self.workers, self.pin_memory
        workers = data.idle.pop(kind, None) or Workers(copy(data).prepare, *kind)
        try:
            yield from workers.results(requests)
        except GeneratorExit:  # left early
            data.idle[kind] = workers
            raise
        data.idle[kind] = workers  # after an error they are not used again


def _pinned(batch: Batch) -> Batch:
    return Batch(*(part.pin_memory() for part in batch))
