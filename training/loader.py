"""Batches of augmented training pictures.

The picture of (seed, epoch, index) is always the same: each has its own random generator, so
neither the number of workers nor a resumed run changes what is trained on. Decoded images are kept
in memory, shrunk until they only just cover 1.5 times the network's input, before any worker is
forked, so that workers share them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from training.augment.pipeline import RESIZES, AugmentConfig, augmented
from training.augment.sample import Sample
from yolov4_fast.datasets import Dataset

CACHE_SCALE = 1.5  # jitter zooms in by at most 1 / (1 - 2 * 0.3) = 2.5, on average by much less
CACHE_BYTES = 4 << 30
WORKER_TIMEOUT = 300  # s without a batch: an error then, rather than a wait for ever


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


class TrainingSet(TorchDataset[Sample]):
    """The pictures of a data set as the network is trained on them, one `Sample` for each `Key`.

    `height` and `width` are the network's input. Crowd regions are left out, and difficult objects
    unless `difficult` is set (Darknet leaves them out too). With `cache`, images are decoded once,
    as many as fit into `cache_bytes`; without, each time they are needed.
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
        cache: bool = True,
        cache_bytes: int = CACHE_BYTES,
        difficult: bool = False,
        progress: bool = False,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, not {resize!r}")
        if min(height, width) < 1:
            raise ValueError(f"height and width must be positive, not {height} and {width}")
        self.dataset = dataset
        self.height = height
        self.width = width
        self.config = config or AugmentConfig()
        self.seed = seed
        self.resize = resize
        self.difficult = difficult
        self._cache: dict[int, Sample] = {}
        if cache:
            self._fill_cache(cache_bytes, progress)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample:
        rng = np.random.default_rng((self.seed, key.epoch, key.number))
        return augmented(
            self.read, key.number, len(self), key.height, key.width, self.config, rng, self.resize
        )

    def read(self, index: int) -> Sample:
        """Image `index` and its boxes before any augmentation; where both its sides are over
        `CACHE_SCALE` x the input's, shrunk until one of them is not.
        """
        return self._cache[index] if index in self._cache else self._load(index)

    def _load(self, index: int) -> Sample:
        image = self.dataset.read_image(index)
        annotation = self.dataset.annotation(index)
        keep = ~annotation.crowd
        if not self.difficult:
            keep &= ~annotation.difficult
        boxes = annotation.boxes[keep]
        height, width = image.shape[:2]
        scale = max(self.height * CACHE_SCALE / height, self.width * CACHE_SCALE / width)
        if scale < 1:
            size = (max(round(width * scale), 1), max(round(height * scale), 1))
            # Bilinear, not area: inference resizes without averaging either.
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            ratio = (size[0] / width, size[1] / height)
            boxes = boxes * np.array([*ratio, *ratio], dtype=np.float32)
        return Sample(image, boxes, annotation.class_ids[keep])

    def _fill_cache(self, cache_bytes: int, progress: bool) -> None:
        left = cache_bytes
        with (
            ThreadPoolExecutor(max_workers=4) as pool,
            tqdm(total=len(self), desc="reading images", disable=not progress) as bar,
        ):
            for start in range(0, len(self), 64):
                chunk = range(start, min(start + 64, len(self)))
                for index, sample in zip(chunk, pool.map(self._load, chunk), strict=True):
                    left -= sample.image.nbytes
                    if left < 0:
                        return
                    self._cache[index] = sample
                    bar.update()


class EpochBatches:
    """The keys of each batch of an epoch: a permutation of the data set that depends on seed and
    epoch alone.

    The last images that do not fill a batch are left out. Of `world` processes, the one of `rank`
    gets its share of each batch. `first_batch` skips what a resumed run has already seen.
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

    def __len__(self) -> int:
        return max(len(self.training_set) // (self.batch_size * self.world) - self.first_batch, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        data = self.training_set
        order = np.random.default_rng((data.seed, self.epoch)).permutation(len(data)).tolist()
        step = self.batch_size * self.world
        for batch in range(self.first_batch, self.first_batch + len(self)):
            mine = order[batch * step + self.rank : (batch + 1) * step : self.world]
            yield [Key(self.epoch, i, data.height, data.width) for i in mine]


def collate(samples: list[Sample]) -> Batch:
    """Samples of one size as a batch."""
    height, width = samples[0].image.shape[:2]
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    size = np.array([width, height], dtype=np.float32)
    rows = []
    for number, sample in enumerate(samples):
        corners = sample.boxes.reshape(-1, 2, 2) / size
        row = np.empty((len(sample.boxes), 6), dtype=np.float32)
        row[:, 0] = number
        row[:, 1] = sample.class_ids
        row[:, 2:4] = corners.mean(axis=1)
        row[:, 4:6] = corners[:, 1] - corners[:, 0]
        rows.append(row)
    return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(rows)))


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
) -> DataLoader[Batch]:
    """The batches of one epoch, each a `Batch`; `len()` of it is their number. See `EpochBatches`.

    `training_set.config` may be changed between epochs. `workers` processes prepare batches ahead;
    0 prepares each when it is asked for. With workers, OpenCV goes on without threads of its own,
    in this process too.
    """
    if workers:
        # OpenCV's threads do not survive a fork: a worker would wait for them for ever.
        cv2.setNumThreads(0)
    keys = EpochBatches(
        training_set,
        batch_size,
        epoch,
        first_batch=first_batch,
        rank=rank,
        world=world,
    )
    return DataLoader(
        training_set,  # type: ignore[arg-type]  # DataLoader's type takes the set's for the batch's
        batch_sampler=keys,  # type: ignore[arg-type]  # our samples are looked up by Key, not int
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT if workers else 0,
        worker_init_fn=_without_threads,
        # Forked workers share the cache; elsewhere each gets a copy.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def _without_threads(_: int) -> None:
    """A worker is one thread; one that was not forked would start OpenCV with one a core."""
    cv2.setNumThreads(0)
