"""Batches: their form, and that neither workers nor resuming change them."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.augment import AugmentConfig
from training.loader import EpochBatches, Key, TrainingSet, batches
from yolov4_fast.datasets import Annotation, Dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Ten noise pictures of different sizes; number i has i % 3 objects, and 5 a difficult one
    and a crowd.
    """
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths, annotations = [], []
    for number in range(10):
        height, width = 60 + 10 * number, 200 - 10 * number
        paths.append(folder / f"{number}.png")
        assert cv2.imwrite(str(paths[-1]), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        n = 3 if number == 5 else number % 3
        boxes = np.array([[10, 20, 10 + 0.5 * width, 20 + 0.5 * height]] * n, np.float32)
        difficult, crowd = np.zeros(n, bool), np.zeros(n, bool)
        if number == 5:
            difficult[1] = crowd[2] = True
        areas = np.ones(n, np.float32)
        annotations.append(Annotation(boxes.reshape(-1, 4), np.arange(n), difficult, crowd, areas))
    return Dataset(Path(folder), "train", ("a", "b", "c"), tuple(paths), tuple(annotations))


def same(one, two) -> bool:
    return torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets)


def test_the_form_of_a_batch(dataset):
    batch = next(iter(batches(TrainingSet(dataset, 64, 96), 4, 0)))
    assert batch.images.shape == (4, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.targets.ndim == 2 and batch.targets.shape[1] == 6
    assert batch.targets.dtype == torch.float32
    assert set(batch.targets[:, 0].tolist()) <= {0, 1, 2, 3}
    centre, size = batch.targets[:, 2:4], batch.targets[:, 4:6]
    assert (size > 0).all() and (centre - size / 2 > -1e-6).all()
    assert (centre + size / 2 < 1 + 1e-6).all()


def test_targets_are_normalised_centres(dataset):
    training = TrainingSet(dataset, 64, 96, AugmentConfig.off())
    targets = next(iter(batches(training, 10, 0))).targets
    order = [key.number for key in next(iter(EpochBatches(training, 10, 0)))]
    position = order.index(4)
    (row,) = targets[targets[:, 0] == position].tolist()
    height, width = 100, 160
    expected = [position, 0, (10 + width / 4) / width, (20 + height / 4) / height, 0.5, 0.5]
    assert row == pytest.approx(expected, abs=1e-5)
    assert sorted(order) == list(range(10))
    difficult = targets[targets[:, 0] == order.index(5)]
    assert difficult[:, 1].tolist() == [0]


def test_a_batch_without_objects_has_an_empty_table(dataset):
    training = TrainingSet(dataset, 64, 64, AugmentConfig.off())
    keys = EpochBatches(training, 1, 0)
    empty = next(i for i, (key,) in enumerate(keys) if key.number == 0)
    batch = list(batches(training, 1, 0))[empty]
    assert batch.targets.shape == (0, 6)


def test_workers_change_nothing(dataset):
    training = TrainingSet(dataset, 64, 64, seed=3)
    alone = list(batches(training, 3, 1))
    helped = list(batches(training, 3, 1, workers=2))
    assert len(alone) == len(helped) == len(batches(training, 3, 1)) == 3
    assert all(map(same, alone, helped))


@pytest.mark.slow  # the loader waits 5 s for the worker to end
def test_a_worker_that_hangs_is_an_error(dataset, monkeypatch):
    monkeypatch.setattr("training.loader.WORKER_TIMEOUT", 0.5)
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda self, key: time.sleep(30))
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
        next(iter(batches(TrainingSet(dataset, 64, 64), 3, 0, workers=1)))


def test_the_cache_changes_nothing_but_speed(dataset):
    training = TrainingSet(dataset, 64, 64)
    without = TrainingSet(dataset, 64, 64, cache=False)
    little = TrainingSet(dataset, 64, 64, cache_bytes=50_000)
    assert 0 < len(little._cache) < len(dataset) == len(training._cache)
    for other in (without, little):
        assert all(map(same, batches(training, 5, 0), batches(other, 5, 0)))


def test_cached_pictures_are_at_most_half_as_large_again_as_the_input(dataset):
    sample = TrainingSet(dataset, 40, 40).read(1)  # 70 x 190
    assert sample.image.shape == (60, 163, 3)
    np.testing.assert_allclose(
        sample.boxes, [[10 * 163 / 190, 20 * 60 / 70, 105 * 163 / 190, 55 * 60 / 70]], rtol=1e-5
    )
    assert TrainingSet(dataset, 64, 64).read(1).image.shape == (70, 190, 3)


def test_epochs_and_seeds_differ_and_resuming_goes_on_exactly(dataset):
    training = TrainingSet(dataset, 64, 64, seed=1)
    epoch = list(batches(training, 2, 4))
    resumed = list(batches(TrainingSet(dataset, 64, 64, seed=1), 2, 4, first_batch=3))
    assert len(resumed) == 2 and all(map(same, epoch[3:], resumed))
    assert not same(epoch[0], next(iter(batches(training, 2, 5))))
    assert not same(epoch[0], next(iter(batches(TrainingSet(dataset, 64, 64, seed=2), 2, 4))))
    assert list(batches(training, 2, 4, first_batch=9)) == []


def test_processes_share_each_batch(dataset):
    training = TrainingSet(dataset, 64, 64)
    whole = list(EpochBatches(training, 4, 0))
    parts = [list(EpochBatches(training, 2, 0, rank=rank, world=2)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(first + second)


def test_a_key_chooses_the_size(dataset):
    training = TrainingSet(dataset, 64, 64)
    assert training[Key(0, 1, 96, 32)].image.shape == (96, 32, 3)


def test_letterbox(dataset):
    training = TrainingSet(dataset, 64, 64, AugmentConfig.off(), resize="letterbox")
    (row,) = training[Key(0, 1, 64, 64)].boxes.tolist()  # 70 x 190 becomes 23 x 64
    scale = 64 / 190
    top = (64 - 23) // 2
    expected = [10 * scale, top + 20 * 23 / 70, 105 * scale, top + 55 * 23 / 70]
    assert row == pytest.approx(expected, abs=0.1)


def test_what_cannot_be_raises(dataset):
    training = TrainingSet(dataset, 64, 64)
    with pytest.raises(ValueError, match="10 images do not fill a batch of 11"):
        batches(training, 11, 0)
    with pytest.raises(ValueError, match="resize must be one of stretch, letterbox, not 'crop'"):
        TrainingSet(dataset, 64, 64, resize="crop")
    with pytest.raises(ValueError, match="height and width must be positive"):
        TrainingSet(dataset, 0, 64)


def test_an_undecodable_picture_is_named(dataset, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    changed = Dataset(tmp_path, None, ("a",), (broken,), dataset.annotations[:1])
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        TrainingSet(changed, 64, 64)
