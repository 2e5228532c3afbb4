"""Batches: their form, and that neither workers nor resuming change them."""

import gc
import time
import weakref
from dataclasses import replace
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
    monkeypatch.setattr("training.workers.TIMEOUT", 0.5)
    monkeypatch.setattr(TrainingSet, "prepare", lambda self, request: time.sleep(30))
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
        next(iter(batches(TrainingSet(dataset, 64, 64), 3, 0, workers=1)))


def test_the_cache_changes_nothing_but_speed(dataset, tmp_path):
    training = TrainingSet(dataset, 64, 64)
    without = TrainingSet(dataset, 64, 64, cache="none")
    little = TrainingSet(dataset, 64, 64, cache_bytes=50_000)
    on_disk = TrainingSet(dataset, 64, 64, cache="disk", cache_folder=tmp_path)
    assert 0 < len(little._cache) < len(dataset) == len(training._cache) == len(on_disk._cache)
    for other in (without, little, on_disk):
        assert all(map(same, batches(training, 5, 0), batches(other, 5, 0)))
    assert all(map(same, batches(training, 5, 0), batches(on_disk, 5, 0, workers=2)))


def test_a_second_run_decodes_nothing(dataset, tmp_path, monkeypatch):
    TrainingSet(dataset, 64, 64, cache="disk", cache_folder=tmp_path)
    monkeypatch.setattr(Dataset, "read_image", lambda self, index: pytest.fail("decoded again"))
    again = TrainingSet(dataset, 64, 64, cache="disk", cache_folder=tmp_path)
    list(batches(again, 5, 0))


def test_normalised_boxes_need_no_decoding_where_pictures_are_cached(dataset, tmp_path):
    """Darknet's boxes are scaled by the image's size, which the cache notes."""
    image = dataset.image_paths[1]
    box = np.array([[0.1, 0.2, 0.5, 0.6]], np.float32)
    flags = np.zeros(1, bool)
    shares = Annotation(box, np.zeros(1, int), flags, flags, np.ones(1), normalized=True)
    darknet = Dataset(tmp_path, None, ("a",), (image,), (shares,))
    for cache in ("none", "memory", "disk", "disk"):
        fresh = replace(darknet, _sizes={})
        training = TrainingSet(fresh, 40, 40, cache=cache, cache_folder=tmp_path)
        boxes = training.read(0).boxes
        np.testing.assert_allclose(boxes, box * (163, 60, 163, 60), rtol=1e-6)
    assert fresh._sizes == {}


def test_cached_pictures_are_at_most_half_as_large_again_as_the_input(dataset):
    sample = TrainingSet(dataset, 40, 40).read(1)  # 70 x 190
    assert sample.image.shape == (60, 163, 3)
    np.testing.assert_allclose(
        sample.boxes, [[10 * 163 / 190, 20 * 60 / 70, 105 * 163 / 190, 55 * 60 / 70]], rtol=1e-5
    )
    assert TrainingSet(dataset, 64, 64).read(1).image.shape == (70, 190, 3)


def test_cached_pictures_cover_the_largest_size(dataset):
    small = TrainingSet(dataset, 40, 40, largest=(44, 44)).read(1)
    assert small.image.shape == (66, 179, 3)
    assert TrainingSet(dataset, 40, 40, largest=(64, 64)).read(1).image.shape == (70, 190, 3)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_change_from_batch_to_batch(dataset, workers):
    training = TrainingSet(dataset, 64, 64, largest=(96, 64))

    def sizes(batch):
        return (32 + 32 * batch, 64)

    made = list(batches(training, 3, 2, sizes=sizes, workers=workers))
    assert [tuple(batch.images.shape[2:]) for batch in made] == [(32, 64), (64, 64), (96, 64)]
    resumed = list(batches(training, 3, 2, sizes=sizes, first_batch=1))
    assert all(map(same, made[1:], resumed))
    assert same(made[1], list(batches(training, 3, 2))[1])  # by seed, epoch, index and size alone


def test_workers_stay_between_epochs(dataset):
    training = TrainingSet(dataset, 64, 64)

    def processes():
        (workers,) = training.idle.values()
        return [process.pid for process in workers._loader._iterator._workers]

    list(batches(training, 3, 0, workers=2))
    first = processes()
    assert len(first) == 2
    next(iter(batches(training, 2, 1, workers=2)))  # an epoch that is left early
    training.config = AugmentConfig.off()
    made = list(batches(training, 5, 2, workers=2))
    assert processes() == first
    assert all(map(same, made, batches(training, 5, 2)))


def test_workers_end_with_the_set(dataset):
    """By counting references: collected as a cycle, each would take five seconds to end."""
    training = TrainingSet(dataset, 64, 64)
    list(batches(training, 3, 0, workers=2))
    (workers,) = training.idle.values()
    processes = workers._loader._iterator._workers
    gone = weakref.ref(training)
    gc.disable()
    try:
        del training, workers
        assert gone() is None
    finally:
        gc.enable()
    assert not any(process.is_alive() for process in processes)


def test_epochs_at_the_same_time_do_not_disturb_each_other(dataset):
    training = TrainingSet(dataset, 64, 64)
    list(batches(training, 3, 2, workers=1))  # leaves its worker to one of them
    pairs = list(
        zip(batches(training, 3, 0, workers=1), batches(training, 3, 1, workers=1), strict=True)
    )
    for epoch in range(2):
        assert all(map(same, (pair[epoch] for pair in pairs), batches(training, 3, epoch)))


def test_workers_leave_the_global_generator_alone(dataset):
    state = torch.get_rng_state()
    list(batches(TrainingSet(dataset, 64, 64), 3, 0, workers=1))
    assert torch.equal(state, torch.get_rng_state())


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
    with pytest.raises(ValueError, match="cache must be one of memory, disk, none, not 'ram'"):
        TrainingSet(dataset, 64, 64, cache="ram")
    with pytest.raises(ValueError, match="a cache on disk needs a folder"):
        TrainingSet(dataset, 64, 64, cache="disk")


def test_an_undecodable_picture_is_named(dataset, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    changed = Dataset(tmp_path, None, ("a",), (broken,), dataset.annotations[:1])
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        TrainingSet(changed, 64, 64)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no picture", None])
def test_an_undecodable_picture_is_one_clear_error(dataset, tmp_path, workers, content):
    broken = tmp_path / "broken.jpg"
    paths = (*dataset.image_paths[:9], broken)
    changed = Dataset(tmp_path, None, ("a",), paths, dataset.annotations)
    if content is not None:
        broken.write_bytes(content)
    training = TrainingSet(changed, 64, 64, AugmentConfig.off(), cache="none")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        list(batches(training, 5, 0, workers=workers))
    assert "broken.jpg" in str(caught.value) and "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    cv2.imwrite(str(broken), np.zeros((60, 60, 3), np.uint8))
    assert len(list(batches(training, 5, 0, workers=workers))) == 2  # with new workers


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_pictures_of_another_size_than_annotated_are_named(dataset, tmp_path, cache):
    noted = tuple(
        replace(annotation, size=(60 + 10 * number, 200 - 10 * number))
        for number, annotation in enumerate(dataset.annotations[:9])
    )
    noted += (dataset.annotations[9],)  # without a size
    wrong = replace(noted[3], size=noted[3].size[::-1])  # as if annotated before it was turned
    for annotations, named in (
        (noted, ()),
        ((*noted[:3], wrong, *noted[4:]), ("3.png: is 170x90, its boxes are for 90x170",)),
    ):
        pictures = replace(dataset, annotations=annotations)
        # So small an input that pictures are kept shrunk.
        examples = TrainingSet(pictures, 32, 32, cache=cache, cache_folder=tmp_path)
        assert examples.misfits() == named


def test_a_picture_longer_than_opencv_can_warp(tmp_path):
    path = tmp_path / "scroll.png"
    assert cv2.imwrite(str(path), np.full((8, 40000, 3), 90, np.uint8))
    box = np.array([[10000, 2, 30000, 6]], np.float32)
    no = np.zeros(1, bool)
    scroll = Annotation(box, np.zeros(1, np.int64), no, no, np.ones(1, np.float32))
    dataset = Dataset(tmp_path, "train", ("a",), (path,), (scroll,))
    batch = next(iter(batches(TrainingSet(dataset, 64, 64, AugmentConfig.off()), 1, 0)))
    assert batch.targets[0, 2:].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5])
