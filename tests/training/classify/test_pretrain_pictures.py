"""What a classifier is trained on: folders of pictures, crops, CutMix, Mosaic, their order."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.classify.config import PretrainConfig
from training.classify.examples import (
    CACHES,
    Batch,
    Batches,
    EpochKeys,
    Key,
    Pictures,
    TrainingExamples,
    ValidationExamples,
    collate,
    validation_requests,
)
from training.classify.folder import counts, open_folder
from training.classify.mixing import central_crop, cutmix, mosaic, random_crop
from yolov4_fast.datasets import DatasetError

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))
NAMES = ("amber", "blue", "coral", "dune")


def flat(colour: tuple[int, int, int], height: int = 40, width: int = 48) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes of one flat colour each: three pictures to train on, one to validate on."""
    for name, colour in zip(NAMES, COLOURS, strict=True):
        for split, numbers in (("train", 3), ("val", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(numbers):
                cv2.imwrite(str(tmp_path / split / name / f"{number}.png"), flat(colour[::-1]))
    return tmp_path


def examples(folder: Path, *, cache: str = "memory", **settings: object) -> TrainingExamples:
    plain = {"hue": 0.0, "saturation": 1.0, "exposure": 1.0, "cutmix": 0.0, "mosaic": 0.0}
    config = PretrainConfig(width=64, height=32, batch_size=5, **plain | settings)
    split = open_folder(folder, "train")
    return TrainingExamples(Pictures(split, 32, 64, cache=cache, cache_folder=folder), config)


class TestFolder:
    def test_classes_and_pictures_are_sorted(self, folder: Path) -> None:
        found = open_folder(folder, "train")
        assert found.class_names == NAMES
        assert found.class_ids == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
        assert [p.name for p in found.image_paths[:3]] == ["0.png", "1.png", "2.png"]
        assert counts(found) == (3, 3)

    def test_what_is_no_picture_is_passed_over(self, folder: Path) -> None:
        (folder / "train/amber/notes.txt").write_text("hello")
        (folder / "train/amber/.hidden.png").write_bytes(b"")
        (folder / "train/.cache").mkdir()
        (folder / "train/readme.md").write_text("hello")
        (folder / "train/amber/deeper").mkdir()
        cv2.imwrite(str(folder / "train/amber/deeper/9.JPG"), flat(COLOURS[0]))
        found = open_folder(folder, "train")
        assert len(found) == 13 and found.class_names == NAMES
        assert found.image_paths[3].name == "9.JPG"

    def test_validation_has_the_classes_of_training(self, folder: Path) -> None:
        (folder / "val/amber/0.png").unlink()
        found = open_folder(folder, "val", NAMES)
        assert found.class_names == NAMES and found.class_ids == (1, 2, 3)

    @pytest.mark.parametrize(
        ("make", "split", "names", "words"),
        [
            ("", "test", None, "there is no folder .*test.*holds train, val"),
            ("train/empty", "train", None, "empty: holds no pictures of that class"),
            ("bare", "bare", None, "bare: holds no pictures in folders named after"),
            ("", "val", NAMES[:3], "holds the class 'dune', which is not among those trained on"),
        ],
    )
    def test_a_folder_that_cannot_serve_is_named(
        self, folder: Path, make: str, split: str, names: tuple[str, ...] | None, words: str
    ) -> None:
        (folder / make).mkdir(exist_ok=True)
        with pytest.raises(DatasetError, match=words):
            open_folder(folder, split, names)


class TestMixing:
    @pytest.mark.parametrize("size", [(32, 64), (33, 35), (1, 1), (2, 7)])
    def test_shares_are_the_pixels_of_each_picture(self, size: tuple[int, int]) -> None:
        images = [flat(colour, *size) for colour in COLOURS]
        cut = []
        for seed in range(200):
            rng = np.random.default_rng(seed)
            for mixture, made_of in ((cutmix(*images[:2], rng), images[:2]),
                                     (mosaic(images, rng), images)):  # fmt: skip
                shown = [float((mixture.image == i[0, 0]).all(2).mean()) for i in made_of]
                assert shown == pytest.approx(mixture.shares, abs=1e-9)
                assert sum(mixture.shares) == pytest.approx(1)
            cut.append(cutmix(*images[:2], rng).shares[1])
        if size == (32, 64):
            # A rectangle of u of the area, u uniform, keeps (sqrt(u) - u / 4)^2 of it within the
            # borders on the mean over its centres: 1/2 - 1/5 + 1/48 over all u.
            assert np.mean(cut) == pytest.approx(0.321, abs=0.05)
            assert min(cut) < 0.03 and max(cut) > 0.7
        assert all((image == image[0, 0]).all() for image in images)  # not painted into

    def test_a_mosaic_shows_each_corner_where_it_stands(self) -> None:
        rng = np.random.default_rng(1)
        images = [rng.integers(0, 256, (30, 50, 3), dtype=np.uint8) for _ in range(4)]
        mixed = mosaic(images, rng).image
        for image, place in zip(images, ((0, 0), (0, -1), (-1, 0), (-1, -1)), strict=True):
            assert (mixed[place] == image[place]).all()
        for pixel in np.ndindex(30, 50):
            assert any((mixed[pixel] == image[pixel]).all() for image in images)

    @pytest.mark.parametrize("least", [0.05, 0.5, 1.0])
    @pytest.mark.parametrize("shape", [(60, 90), (90, 20), (1, 1), (7, 300)])
    def test_a_random_crop_shows_at_least_its_share(
        self, least: float, shape: tuple[int, int]
    ) -> None:
        """Read off an image of coordinates: the range that is shown of each axis."""
        y, x = np.mgrid[: shape[0], : shape[1]]
        ramps = np.stack([y * 255 / max(shape[0] - 1, 1), x * 255 / max(shape[1] - 1, 1), 0 * x], 2)
        for seed in range(20):
            crop = random_crop(ramps.astype(np.uint8), 64, 64, least, np.random.default_rng(seed))
            assert crop.shape == (64, 64, 3) and crop.dtype == np.uint8
            if shape == (60, 90):
                span = np.ptp(crop[..., :2].reshape(-1, 2).astype(float), axis=0) / 255
                assert span.prod() > (least - 0.08 if least < 1 else 0.6)

    def test_the_middle(self) -> None:
        image = np.zeros((40, 100, 3), np.uint8)
        image[4:36, 34:66] = 255
        assert (central_crop(image, 32, 32, 0.8) == 255).all()
        assert (central_crop(image, 32, 32, 0.9)[0] < 255).all()
        assert central_crop(image[:1, :1], 32, 64, 0.875).shape == (32, 64, 3)


class TestExamples:
    def test_a_picture_is_a_function_of_seed_epoch_and_number(self, folder: Path) -> None:
        settings = {"cutmix": 0.3, "mosaic": 0.3, "hue": 0.1, "saturation": 1.5, "exposure": 1.5}
        first, again, third = (examples(folder, cache=cache, **settings) for cache in CACHES)
        other = examples(folder, seed=1, **settings)
        for number in range(12):
            one = first[Key(3, number)]
            for same in (again[Key(3, number)], third[Key(3, number)]):
                assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
        keys = [(Key(3, n), Key(4, n)) for n in range(12)]
        assert any(not np.array_equal(first[a].image, first[b].image) for a, b in keys)
        assert any(not np.array_equal(first[a].image, other[a].image) for a, _ in keys)

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [({}, {1}), ({"cutmix": 1.0}, {1, 2}), ({"mosaic": 1.0}, {1, 2, 3, 4}),
         ({"cutmix": 0.5, "mosaic": 0.5}, {1, 2, 3, 4})],
    )  # fmt: skip
    def test_labels_are_the_pixels_of_each_colour(
        self, folder: Path, settings: dict[str, float], parts: set[int]
    ) -> None:
        data = examples(folder, **settings)
        met = set()
        for epoch in range(6):
            for number in range(len(data)):
                image, classes, shares, unreadable = data[Key(epoch, number)]
                assert image.shape == (32, 64, 3) and not unreadable
                assert shares.sum() == pytest.approx(1) and shares.dtype == np.float32
                label = np.bincount(classes, shares, 4)
                shown = [(image == colour).all(2).mean() for colour in COLOURS]
                assert label == pytest.approx(shown, abs=1e-6)
                met.add(sum(value > 0 for value in shown))
        assert met <= parts and max(met) >= min(max(parts), 3)

    def test_settings_of_the_view_show(self, folder: Path) -> None:
        halves = np.zeros((40, 80, 3), np.uint8)
        halves[:, 40:] = (10, 200, 90)
        for path in (folder / "train").rglob("*.png"):
            cv2.imwrite(str(path), halves)
        whole = {"crop": 1.0, "flip": 0.0}

        def images(**settings: float) -> list[np.ndarray]:
            data = examples(folder, **whole | settings)
            return [data[Key(0, number)].image for number in range(12)]

        base = images()
        assert all((image[16, 60] > 9).all() and not image[16, 3].any() for image in base)
        assert all(image[16, 3].all() for image in images(flip=1.0))
        assert any(not image[16, 3].any() == image[16, 60].any() for image in images(crop=0.05))
        for name, value in (("hue", 0.2), ("saturation", 2.0), ("exposure", 2.0)):
            changed = images(**{name: value})
            assert any(not np.array_equal(a, b) for a, b in zip(base, changed, strict=True))

    @pytest.mark.parametrize("cache", CACHES)
    def test_a_picture_that_cannot_be_decoded_gives_its_place_to_the_next(
        self, folder: Path, cache: str
    ) -> None:
        (folder / "train/blue/1.png").write_bytes(b"no picture")
        (folder / "train/blue/2.png").write_bytes(b"")
        (folder / "val/blue/0.png").write_bytes(b"")
        data = examples(folder, cache=cache)
        assert data.pictures.unreadable == (() if cache == "none" else (4, 5))
        example = data[Key(0, 4)]
        assert example.unreadable == (4, 5)
        assert (example.image == COLOURS[2]).all() and example.classes[0] == 2
        assert data[Key(0, 3)].unreadable == ()
        assert (data[Key(0, 3)].image == COLOURS[1]).all()
        shown = ValidationExamples(Pictures(open_folder(folder, "val", NAMES), 32, 64))
        assert shown[1].shares.sum() == 0 and shown[1].unreadable == (1,)
        assert shown[2].shares.tolist() == [1, 0, 0, 0] and shown[2].classes[0] == 2

    def test_nothing_but_unreadable_pictures_is_an_error(self, folder: Path) -> None:
        for path in (folder / "train").rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"none of the 12 pictures of .*train can be decoded"):
            examples(folder)[Key(0, 7)]

    def test_large_pictures_are_kept_small(self, folder: Path) -> None:
        cv2.imwrite(str(folder / "train/amber/0.png"), flat(COLOURS[0], 500, 300))
        cv2.imwrite(str(folder / "train/amber/1.png"), flat(COLOURS[0], 20, 900))
        pictures = examples(folder).pictures
        shapes = [image.shape[:2] for image in map(pictures.read, range(2)) if image is not None]
        assert shapes == [(213, 128), (20, 900)]

    def test_the_cache_ends_where_its_memory_does(self, folder: Path) -> None:
        split = open_folder(folder, "train")
        size = 40 * 48 * 3
        pictures = Pictures(split, 32, 64, cache_bytes=2 * size)
        for path in split.image_paths:
            path.write_bytes(b"")
        found = [pictures.read(number) is not None for number in range(12)]
        assert found == [True, True] + [False] * 10


class TestBatches:
    def test_an_epoch_is_a_permutation_and_drops_what_fills_no_batch(self) -> None:
        batches = list(EpochKeys(12, 5, seed=0, epoch=2))
        assert len(EpochKeys(12, 5, 0, 2)) == len(batches) == 2
        numbers = [key.number for batch in batches for key in batch]
        assert len(set(numbers)) == 10 and {key.epoch for batch in batches for key in batch} == {2}
        assert batches == list(EpochKeys(12, 5, seed=0, epoch=2))
        assert batches != list(EpochKeys(12, 5, seed=1, epoch=2))
        assert batches != list(EpochKeys(12, 5, seed=0, epoch=3))

    def test_processes_share_each_batch(self) -> None:
        whole = list(EpochKeys(12, 4, 0, 0))
        shares = [list(EpochKeys(12, 4, 0, 0, rank, 2)) for rank in (0, 1)]
        assert len(whole) == 3
        for batch, zero, one in zip(whole, *shares, strict=True):
            assert zero == batch[0::2] and one == batch[1::2]

    def test_workers_give_the_same_batches(self, folder: Path) -> None:
        data = examples(folder, cutmix=0.5, mosaic=0.5)
        alone, ahead = Batches(data.prepare), Batches(data.prepare, workers=2)
        for epoch in (1, 2):
            keys = EpochKeys(12, 5, 0, epoch)
            pairs = list(zip(alone(keys), ahead(keys), strict=True))
            assert len(pairs) == 2
            for one, two in pairs:
                assert torch.equal(one.images, two.images) and torch.equal(one.shares, two.shares)
                assert torch.equal(one.classes, two.classes)
        batch = pairs[0][1]
        assert isinstance(batch, Batch)
        assert batch.images.shape == (5, 3, 32, 64) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.classes.shape == (5, 4) and batch.classes.dtype == torch.int64

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_error_of_a_worker_is_one_sentence(self, folder: Path, workers: int) -> None:
        for path in (folder / "train").rglob("*.png"):
            path.write_bytes(b"")
        batches = Batches(examples(folder).prepare, workers)
        with pytest.raises(ValueError, match=r"^none of the 12 pictures of \S+ can be decoded$"):
            list(batches(EpochKeys(12, 5, 0, 0)))

    @pytest.mark.parametrize("world", [1, 2, 3, 5])
    def test_validation_sees_each_picture_once(self, folder: Path, world: int) -> None:
        data = ValidationExamples(Pictures(open_folder(folder, "val", NAMES), 32, 64))
        classes = [
            batch.classes[:, 0].tolist()
            for rank in range(world)
            for batch in Batches(data.prepare)(validation_requests(4, 3, rank, world))
        ]
        assert sorted(number for part in classes for number in part) == [0, 1, 2, 3]
        assert all(classes) and max(map(len, classes)) <= 3

    def test_a_batch_names_what_could_not_be_decoded(self, folder: Path) -> None:
        (folder / "train/dune/2.png").write_bytes(b"")
        data = examples(folder)
        batch = collate([data[Key(0, n)] for n in (11, 0, 11)])
        assert batch.unreadable == (11, 11)
        assert batch.classes[:, 0].tolist() == [0, 0, 0]  # after the last comes the first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cutmix": 0.7, "mosaic": 0.7}, "cutmix 0.7 and mosaic 0.7 add up to more than 1"),
        ({"crop": 0.0}, "crop must be above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be .*below 1"),
        ({"steps": (0.5,)}, "give one scale a step"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PretrainConfig(**settings)
