"""Scaled crops and rotation."""

import cv2
import numpy as np
import pytest

from training.augment import Sample
from training.augment.geometric import GREY, Window, rescale, view, whole


def ellipse(height, width, box, colour=(255, 0, 0)) -> Sample:
    """A black picture with a filled ellipse, drawn sixteen times as fine and averaged."""
    fine = np.zeros((height * 16, width * 16, 3), np.uint8)
    x1, y1, x2, y2 = (16 * side for side in box)
    centre, axes = ((x1 + x2) // 2, (y1 + y2) // 2), ((x2 - x1) // 2, (y2 - y1) // 2)
    cv2.ellipse(fine, centre, axes, 0, 0, 360, colour, -1)
    image = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return Sample(image, np.array([box], np.float32), np.array([0]))


def bounds(image: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(image[..., 0] > image[..., 1] + 100)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


class TestRescale:
    @pytest.mark.parametrize("factor", [0.5, 0.99, 1.7])
    def test_a_window_lies_within_or_around_the_old_one(self, factor):
        old = Window(-10, 20, 190, 120)
        new = np.array([rescale(old, factor, np.random.default_rng(s)) for s in range(300)])
        np.testing.assert_allclose(new[:, 2] - new[:, 0], 200 * factor)
        np.testing.assert_allclose(new[:, 3] - new[:, 1], 100 * factor)
        inward = (new - old) * (1, 1, -1, -1) * (1 if factor < 1 else -1)
        assert inward.min() >= -1e-9
        room = np.abs(1 - factor) * np.array([200, 100, 200, 100])
        assert (inward.min(axis=0) < 0.05 * room).all()  # it reaches every side
        assert (inward.max(axis=0) > 0.95 * room).all()

    def test_one_changes_nothing(self):
        assert rescale(Window(1, 2, 5, 9), 1.0, np.random.default_rng(0)) == (1, 2, 5, 9)


class TestRotation:
    def test_a_quarter_turn_is_exact_and_clockwise(self):
        image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        sample = Sample(image, np.array([[5, 7, 25, 17]], np.float32), np.array([3]))
        result = view(sample, whole(image), 48, 48, False, 0.1, angle=90)
        np.testing.assert_array_equal(result.image, np.rot90(image, -1))
        np.testing.assert_allclose(result.boxes, [[31, 5, 41, 25]], atol=1e-4)
        mirrored = view(sample, whole(image), 48, 48, True, 0.1, angle=90)
        np.testing.assert_array_equal(mirrored.image, np.rot90(image, -1)[:, ::-1])
        np.testing.assert_allclose(mirrored.boxes, [[7, 5, 17, 25]], atol=1e-4)

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("angle", [-170, -45, 3, 30, 60, 120])
    @pytest.mark.parametrize("size", [(100, 100), (60, 150), (180, 90)])
    def test_the_box_bounds_the_ellipse(self, angle, flip, size):
        sample = ellipse(100, 120, (40, 40, 90, 60))
        result = view(sample, whole(sample.image), *size, flip, 0.1, angle=angle)
        assert result.image.shape == (*size, 3)
        np.testing.assert_allclose(result.boxes[0], bounds(result.image), atol=1.5)

    def test_a_small_angle_is_close_to_none(self):
        sample = ellipse(64, 80, (20, 20, 50, 44))
        window = Window(-5, 3, 70, 60)
        straight = view(sample, window, 96, 90, True, 0.1)
        turned = view(sample, window, 96, 90, True, 0.1, angle=1e-6)
        np.testing.assert_allclose(turned.boxes, straight.boxes, atol=1e-3)
        inside = (slice(None), slice(None, -15))  # the border of the picture is blended, not cut
        difference = turned.image[inside].astype(int) - straight.image[inside]
        assert np.abs(difference).max() <= 1

    def test_what_lies_outside_is_grey_and_objects_there_are_dropped(self):
        image = np.full((100, 100, 3), 255, np.uint8)
        sample = Sample(image, np.array([[0, 0, 12, 12], [40, 40, 60, 60]], np.float32),
                        np.array([5, 6]))  # fmt: skip
        result = view(sample, whole(image), 100, 100, False, 0.1, angle=45)
        corners = result.image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == GREY).all()
        assert (result.image[50, 50] == 255).all()
        assert result.class_ids.tolist() == [6]
