"""Augmentation: boxes follow the pixels, chance comes from the generator alone."""

from dataclasses import replace

import numpy as np
import pytest

from training.augment import AugmentConfig, Sample, augmented
from training.augment.colour import add_noise, jitter_colour, jitter_tone, random_scale
from training.augment.geometric import GREY, Window, clip, jitter, letterbox, view, whole
from training.augment.mosaic import mosaic

PLAIN = AugmentConfig.off()
EVERYTHING = {
    "mosaic": 0.5, "cutmix": 0.6, "mixup": 0.6, "flip": 0.5, "flip_vertical": 0.5, "jitter": 0.3,
    "scale": 1.5, "rotation": 20, "hue": 0.1, "saturation": 1.5, "exposure": 1.5,
    "brightness": 0.2, "contrast": 1.5, "noise": 8, "random_erase": 0.6, "cutout": 0.6,
    "grid_mask": 0.6,
}  # fmt: skip


def assert_same(one: Sample, two: Sample) -> None:
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)


def block(height, width, box, colour=(255, 0, 0), class_id=0) -> Sample:
    """A black picture with a coloured block, annotated exactly."""
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = colour
    return Sample(image, np.array([box], np.float32), np.array([class_id], np.int64))


def extent(image, channel=0) -> np.ndarray:
    """Where one colour channel is brighter than half: xyxy, to the fraction of a pixel at its
    edges.
    """
    bright = image[..., channel].astype(np.float64) / 255
    columns, rows = bright.max(axis=0), bright.max(axis=1)
    edges = []
    for line in (columns, rows):
        inside = np.flatnonzero(line > 0.5)
        first, last = inside[0], inside[-1]
        before = line[first - 1] if first else 0
        after = line[last + 1] if last + 1 < len(line) else 0
        edges.append((first + 1 - line[first] - before, last + line[last] + after))
    (x1, x2), (y1, y2) = edges
    return np.array([x1, y1, x2, y2])


class TestView:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("size", [(120, 160), (60, 90), (200, 400), (33, 31)])
    def test_the_box_covers_exactly_the_pixels(self, flip, size):
        sample = block(120, 160, (40, 30, 100, 70))
        result = view(sample, whole(sample.image), *size, flip, 0.1)
        assert result.image.shape == (*size, 3)
        np.testing.assert_allclose(extent(result.image), result.boxes[0], atol=0.6)

    def test_a_flip_mirrors_exactly(self):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        sample = Sample(image, np.array([[5, 7, 20, 30]], np.float32), np.array([4]))
        result = view(sample, whole(image), 40, 60, True, 0.1)
        np.testing.assert_array_equal(result.image, image[:, ::-1])
        assert result.boxes.tolist() == [[40, 7, 55, 30]]
        assert result.class_ids.tolist() == [4]
        twice = view(result, whole(image), 40, 60, True, 0.1)
        np.testing.assert_array_equal(twice.image, image)
        np.testing.assert_array_equal(twice.boxes, sample.boxes)

    def test_a_whole_pixel_crop_is_the_slice_and_grey_outside(self):
        rng = np.random.default_rng(1)
        image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        sample = Sample(image, np.array([[5, 7, 20, 30]], np.float32), np.array([0]))
        result = view(sample, Window(10, -5, 70, 35), 40, 60, False, 0.1)
        np.testing.assert_array_equal(result.image[5:, :50], image[:35, 10:])
        assert (result.image[:5] == GREY).all() and (result.image[:, 50:] == GREY).all()
        assert result.boxes.tolist() == [[0, 12, 10, 35]]

    def test_boxes_that_keep_little_or_become_thin_are_dropped(self):
        boxes = np.array([[-9, 0, 1, 9], [-8, 0, 2, 9], [-1, 0, 1.5, 9], [0, 0, 9, 9]], np.float32)
        clipped, keep = clip(boxes, 20, 20, 0.2)
        assert keep.tolist() == [False, True, False, True]
        assert clipped.tolist() == [[0, 0, 2, 9], [0, 0, 9, 9]]
        assert clip(boxes[:0], 20, 20, 0.2)[0].shape == (0, 4)

    @pytest.mark.parametrize("size", [(50, 200), (200, 50), (101, 67), (64, 64)])
    def test_letterbox_keeps_the_shape(self, size):
        sample = block(*size, (size[1] // 4, size[0] // 4, size[1] // 2, size[0] // 2))
        result = view(sample, letterbox(sample.image, 128, 160), 128, 160, False, 0.1)
        x1, y1, x2, y2 = result.boxes[0]
        aspect = (
            (x2 - x1) / (y2 - y1) / ((size[1] // 2 - size[1] // 4) / (size[0] // 2 - size[0] // 4))
        )
        assert aspect == pytest.approx(1, abs=0.05)
        grey = (result.image == GREY).all(axis=-1)
        borders = grey.all(axis=1).sum(), grey.all(axis=0).sum()
        assert min(borders) == 0
        scale = min(128 / size[0], 160 / size[1])
        expected = 128 - int(size[0] * scale), 160 - int(size[1] * scale)
        assert borders == pytest.approx(expected, abs=1)

    def test_jitter_moves_each_side_by_at_most_its_share(self):
        rng = np.random.default_rng(2)
        windows = np.array([jitter(Window(0, 0, 200, 100), 0.3, rng) for _ in range(300)])
        moved = np.abs(windows - (0, 0, 200, 100)) / (200, 100, 200, 100)
        assert moved.max() <= 0.3 and moved.max(axis=0).min() > 0.29
        assert jitter(Window(1, 2, 3, 4), 0, rng) == (1, 2, 3, 4)


def keep_colour(image):
    return image


class TestMosaic:
    COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("amount", [0.0, 0.3])
    def test_boxes_cover_exactly_the_pixels(self, flip, amount):
        rng = np.random.default_rng(3)
        seen = 0
        for _ in range(20):
            samples = [
                block(100, 140, (35, 25, 110, 80), colour, number)
                for number, colour in enumerate(self.COLOURS[:3])
            ]
            samples.append(block(90, 70, (0, 0, 0, 0)))
            samples[3] = samples[3]._replace(
                boxes=np.zeros((0, 4), np.float32), class_ids=np.zeros(0, np.int64)
            )
            windows = [jitter(whole(s.image), amount, rng) for s in samples]
            result = mosaic(samples, windows, [flip] * 4, 160, 192, rng, 0.01, keep_colour)
            assert result.image.shape == (160, 192, 3)
            grey = (result.image == GREY).all(axis=-1, keepdims=True)
            image = np.where(grey, 0, result.image)
            for box, class_id in zip(result.boxes, result.class_ids, strict=True):
                np.testing.assert_allclose(extent(image, class_id), box, atol=2.0)
                seen += 1
            missing = set(range(3)) - set(result.class_ids.tolist())
            for class_id in missing:  # nothing to speak of is left of those without a box
                assert (image[..., class_id] > 128).sum() < 0.03 * image[..., 0].size
        assert seen > 40

    def test_the_four_meet_at_twenty_to_eighty_percent(self):
        rng = np.random.default_rng(4)
        cuts = []
        for _ in range(200):
            full = [
                block(50, 50, (0, 0, 50, 50), colour, number)
                for number, colour in enumerate(self.COLOURS)
            ]
            windows = [whole(sample.image) for sample in full]
            result = mosaic(full, windows, [False] * 4, 100, 200, rng, 0.0, keep_colour)
            assert result.class_ids.tolist() == [0, 1, 2, 3]
            x, y = result.boxes[0, 2:]
            np.testing.assert_allclose(
                result.boxes, [[0, 0, x, y], [x, 0, 200, y], [0, y, x, 100], [x, y, 200, 100]]
            )
            assert (result.image[int(y) - 1, int(x) - 1] == self.COLOURS[0]).all()
            assert (result.image[int(y), int(x)] == self.COLOURS[3]).all()
            cuts.append((x / 200, y / 100))
        assert 0.2 <= np.min(cuts) < 0.25 and 0.75 < np.max(cuts) <= 0.8

    def test_grey_is_avoided_where_the_picture_is_large_enough(self):
        white = block(80, 80, (0, 0, 80, 80), (255, 255, 255))
        window = Window(-20, -20, 60, 60)  # a quarter of it shows nothing
        rng = np.random.default_rng(5)
        result = mosaic([white] * 4, [window] * 4, [False] * 4, 96, 96, rng, 0.0, keep_colour)
        assert (result.image == 255).all()

    def test_each_quadrant_is_turned_about_its_own_middle(self):
        image = np.random.default_rng(6).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        sample = Sample(image, np.array([[0, 0, 30, 30]], np.float32), np.array([0]))
        straight, turned = (
            mosaic([sample] * 4, [whole(image)] * 4, [False] * 4, 100, 100,
                   np.random.default_rng(7), 0.0, keep_colour, [angle] * 4)
            for angle in (0.0, 180.0)
        )  # fmt: skip
        x, y = straight.boxes[0, 2:].astype(int)  # the top left object is cut nowhere
        cut_x, cut_y = turned.boxes[0, 2:].astype(int)
        assert (turned.boxes[0] == [cut_x - x, cut_y - y, cut_x, cut_y]).all() and cut_x > x
        corner = (slice(None, cut_y), slice(None, cut_x))
        np.testing.assert_array_equal(turned.image[corner], straight.image[corner][::-1, ::-1])


class TestColour:
    def test_nothing_to_change(self):
        image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        result = jitter_colour(image, 0, 1, 1, np.random.default_rng(0))
        np.testing.assert_array_equal(result, image)

    def test_exposure_scales_brightness_and_leaves_grey_grey(self):
        image = np.full((4, 4, 3), 100, np.uint8)
        values = []
        for seed in range(200):
            result = jitter_colour(image, 0.1, 1.5, 1.5, np.random.default_rng(seed))
            assert (result == result[..., :1]).all()
            values.append(int(result[0, 0, 0]))
        assert 66 <= min(values) < 72 and 140 < max(values) <= 150

    def test_hue_turns_colours(self):
        red = np.zeros((2, 2, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
        results = np.array(
            [jitter_colour(red, 1 / 3, 1, 1, np.random.default_rng(s))[0, 0] for s in range(60)]
        )
        assert (results.max(axis=1) == 255).all() and (results.min(axis=1) == 0).all()
        assert (results[:, 1] > 200).any() and (results[:, 2] > 200).any()

    def test_factors_are_as_often_inverse(self):
        rng = np.random.default_rng(0)
        factors = np.array([random_scale(1.5, rng) for _ in range(1000)])
        assert 1 / 1.5 <= factors.min() and factors.max() <= 1.5
        assert 0.45 < (factors < 1).mean() < 0.55

    def test_tone_moves_and_spreads_levels_about_the_middle(self):
        image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
        assert (jitter_tone(image, 0, 1, np.random.default_rng(0)) == image).all()
        shifts, slopes = [], []
        for seed in range(200):
            moved = jitter_tone(image, 0.2, 1, np.random.default_rng(seed)).astype(int)
            shifts.append(moved[0, 128, 0] - 128)
            assert (moved == np.clip(image.astype(int) + shifts[-1], 0, 255)).all()
            spread = jitter_tone(image, 0, 2, np.random.default_rng(seed)).astype(float)
            slopes.append((spread[0, 160, 0] - spread[0, 96, 0]) / 64)
            assert spread[0, 127:129, 0].mean() == pytest.approx(127.5, abs=0.51)
        assert -51 <= min(shifts) < -45 and 45 < max(shifts) <= 51
        assert 0.48 <= min(slopes) < 0.55 and 1.9 < max(slopes) <= 2.02

    def test_noise_has_the_deviation_drawn_and_no_mean(self):
        image = np.full((100, 100, 3), 128, np.uint8)
        assert (add_noise(image, 0, np.random.default_rng(0)) == image).all()
        deviations = []
        for seed in range(60):
            change = add_noise(image, 12, np.random.default_rng(seed)).astype(float) - 128
            deviations.append(change.std())
            assert change.mean() == pytest.approx(0, abs=0.5)
            if deviations[-1] > 1:  # each channel has its own
                assert abs(np.corrcoef(change.reshape(-1, 3).T)[0, 1]) < 0.05
            drawn = np.random.default_rng(seed).uniform(0, 12)
            assert deviations[-1] == pytest.approx(drawn, abs=0.3)
        assert max(deviations) > 10

    def test_noise_does_not_wrap_around(self):
        black, white = (np.full((50, 50, 3), level, np.uint8) for level in (0, 255))
        assert add_noise(black, 30, np.random.default_rng(1)).max() < 128
        assert add_noise(white, 30, np.random.default_rng(1)).min() > 127


class TestPipeline:
    samples = (block(60, 80, (10, 10, 40, 40)), block(50, 50, (5, 5, 20, 45), (0, 255, 0), 1))

    def run(self, seed, config, height=64, width=96):
        rng = np.random.default_rng(seed)
        return augmented(self.samples.__getitem__, 0, 2, height, width, config, rng)

    @pytest.mark.parametrize("probability", [0.0, 1.0])
    def test_the_generator_decides_everything(self, probability):
        config = AugmentConfig(mosaic=probability)
        first, again, other = self.run(1, config), self.run(1, config), self.run(2, config)
        assert_same(first, again)
        assert (first.image != other.image).any()
        assert first.image.shape == (64, 96, 3) and first.image.dtype == np.uint8
        assert first.boxes.dtype == np.float32 and first.class_ids.dtype == np.int64

    def test_settings_that_are_off_draw_nothing(self):
        """So a new setting leaves the pictures of all earlier runs as they were."""
        rng, replayed = np.random.default_rng(8), np.random.default_rng(8)
        augmented(self.samples.__getitem__, 0, 2, 64, 96, AugmentConfig(mosaic=0), rng)
        replayed.random(2)  # mosaic, flip
        replayed.uniform(size=4)  # the sides of the crop
        replayed.random(5)  # hue; saturation and exposure, each with its direction
        replayed.random()  # vertical flip
        assert rng.bit_generator.state == replayed.bit_generator.state

    @pytest.mark.parametrize("name", list(EVERYTHING))
    def test_each_setting_changes_pictures_and_is_decided_by_the_generator(self, name):
        config = replace(PLAIN, **{name: EVERYTHING[name]})
        changed = 0
        for seed in range(16):
            first, again = self.run(seed, config), self.run(seed, config)
            assert_same(first, again)
            changed += (first.image != self.run(seed, PLAIN).image).any()
        assert changed >= 3, f"{name} has no effect"

    def test_everything_at_once(self):
        config = AugmentConfig(**EVERYTHING)
        for seed in range(60):
            result = self.run(seed, config, 63, 97)
            assert_same(result, self.run(seed, config, 63, 97))
            assert result.image.shape == (63, 97, 3) and result.image.dtype == np.uint8
            assert result.boxes.dtype == np.float32 and result.class_ids.dtype == np.int64
            assert len(result.boxes) == len(result.class_ids)
            low, high = result.boxes[:, :2], result.boxes[:, 2:]
            assert (low >= 0).all() and (high <= (97, 63)).all() and (high - low >= 2).all()

    def test_each_picture_has_its_own_light(self):
        grey = Sample(np.full((50, 70, 3), 100, np.uint8), *self.samples[0][1:])
        for name, levels in (("cutmix", 2), ("mosaic", 4)):
            config = replace(PLAIN, exposure=1.5, **{name: 1.0})
            rng = np.random.default_rng(3)
            image = augmented(lambda _: grey, 0, 1, 64, 96, config, rng).image
            assert len(np.unique(image)) == levels and 100 not in image

    def test_pictures_without_objects(self):
        empty = Sample(np.zeros((50, 70, 3), np.uint8), np.zeros((0, 4), np.float32),
                       np.zeros(0, np.int64))  # fmt: skip
        for seed in range(30):
            rng = np.random.default_rng(seed)
            result = augmented(lambda _: empty, 0, 1, 64, 96, AugmentConfig(**EVERYTHING), rng)
            assert result.boxes.shape == (0, 4) and result.class_ids.shape == (0,)

    def test_samples_are_not_changed(self):
        before = [[array.copy() for array in sample] for sample in self.samples]
        for seed in range(20):
            self.run(seed, AugmentConfig(flip_vertical=0.5))
            self.run(seed, AugmentConfig(**EVERYTHING))
            self.run(seed, replace(PLAIN, cutout=1, grid_mask=1, random_erase=1), 60, 80)
        for old, sample in zip(before, self.samples, strict=True):
            for array, kept in zip(old, sample, strict=True):
                np.testing.assert_array_equal(array, kept)

    def test_off_only_resizes(self):
        result = self.run(0, PLAIN, 120, 160)
        np.testing.assert_allclose(result.boxes, [[20, 20, 80, 80]])
        np.testing.assert_allclose(extent(result.image), result.boxes[0], atol=0.6)

    def test_vertical_flip(self):
        result = self.run(0, AugmentConfig(mosaic=0, flip=0, flip_vertical=1, jitter=0, hue=0,
                                           saturation=1, exposure=1), 60, 80)  # fmt: skip
        assert result.boxes.tolist() == [[10, 20, 40, 50]]
        np.testing.assert_array_equal(result.image, self.samples[0].image[::-1])


class TestConfig:
    @pytest.mark.parametrize(
        "option",
        [
            {"mosaic": 1.1},
            {"flip": -0.1},
            {"jitter": 0.5},
            {"saturation": 0.9},
            {"hue": 2},
            {"cutmix": 2},
            {"scale": 0.5},
            {"rotation": 181},
            {"contrast": 0},
            {"noise": -1},
        ],
    )
    def test_impossible_values_raise(self, option):
        with pytest.raises(ValueError, match=next(iter(option))):
            AugmentConfig(**option)
