"""CutMix and MixUp."""

import numpy as np
import pytest

from training.augment import Sample
from training.augment.mix import cutmix, cutmix_rectangle, mixup, uncovered


def sample(level: int, *boxes, height=60, width=80) -> Sample:
    return Sample(
        np.full((height, width, 3), level, np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.arange(len(boxes)) + level,
    )


class TestCutMix:
    def test_rectangles_take_a_tenth_to_a_half_anywhere(self):
        rng = np.random.default_rng(0)
        drawn = np.array([cutmix_rectangle(200, 300, rng) for _ in range(500)])
        width, height = drawn[:, 2] - drawn[:, 0], drawn[:, 3] - drawn[:, 1]
        share = width * height / 60_000
        assert 0.098 < share.min() < 0.12 and 0.48 < share.max() < 0.51
        np.testing.assert_allclose(width / height, 1.5, rtol=0.02)
        assert drawn.min() == 0 and drawn[:, 2].max() == 300 and drawn[:, 3].max() == 200

    def test_pixels_and_objects_of_both(self):
        first = sample(1, [0, 0, 10, 10], [30, 20, 50, 40])
        patch = sample(7, [2, 3, 12, 13], height=30, width=40)
        result = cutmix(first, patch, (20, 10, 60, 40), 0.1)
        expected = first.image.copy()
        expected[10:40, 20:60] = 7
        np.testing.assert_array_equal(result.image, expected)
        assert (first.image == 1).all()
        assert result.boxes.tolist() == [[0, 0, 10, 10], [22, 13, 32, 23]]
        assert result.class_ids.tolist() == [1, 7]

    @pytest.mark.parametrize(
        ("box", "left"),
        [
            ([0, 0, 20, 20], [0, 0, 20, 20]),  # beside it
            ([10, 25, 30, 35], [10, 25, 20, 35]),  # its right half covered
            ([50, 25, 70, 35], [60, 25, 70, 35]),  # its left half
            ([30, 5, 40, 20], [30, 5, 40, 10]),  # its lower part
            ([30, 35, 40, 50], [30, 40, 40, 50]),  # its upper part
            ([10, 5, 30, 20], [10, 5, 30, 20]),  # a corner: what is left still has this bound
            ([10, 20, 70, 30], [10, 20, 70, 30]),  # its middle
            ([5, 5, 75, 55], [5, 5, 75, 55]),  # it lies around the rectangle
            ([30, 8.5, 40, 20], None),  # a strip of 1.5 px is left
            ([10, 9.2, 30, 40.6], [10, 9.2, 20, 40.6]),  # what sticks out is too thin to count
            ([20, 10, 60, 40], None),  # all covered
            ([59, 36, 63, 44], [59, 36, 63, 44]),  # a small corner
        ],
    )
    def test_what_is_left_of_a_box(self, box, left):
        boxes, keep = uncovered(np.array([box], np.float32), (20, 10, 60, 40), 0.1)
        assert keep.tolist() == [left is not None]
        if left is not None:
            np.testing.assert_allclose(boxes, [left], rtol=1e-6)

    def test_the_share_that_must_be_visible(self):
        boxes = np.array([[0, 20, 25, 30]], np.float32)  # 20 of 25 px can be seen
        assert uncovered(boxes, (20, 10, 60, 40), 0.8)[1].tolist() == [True]
        assert uncovered(boxes, (20, 10, 60, 40), 0.81)[1].tolist() == [False]
        corner = np.array([[15, 5, 25, 15]], np.float32)  # a quarter is covered
        assert uncovered(corner, (20, 10, 60, 40), 0.75)[1].tolist() == [True]
        assert uncovered(corner, (20, 10, 60, 40), 0.76)[1].tolist() == [False]

    def test_against_counting_pixels(self):
        rng = np.random.default_rng(1)
        for _ in range(300):
            rectangle = cutmix_rectangle(60, 80, rng)
            low = rng.integers(0, (70, 50))
            high = low + rng.integers(3, 30, 2)
            for side in range(4):  # what sticks out by less than two pixels does not count
                sides = (*low, *high)
                if abs(rectangle[side] - sides[side]) < 2:
                    rectangle = (*rectangle[:side], int(sides[side]), *rectangle[side + 1 :])
            x1, y1, x2, y2 = rectangle
            painted = np.zeros((100, 120), bool)
            painted[low[1] : high[1], low[0] : high[0]] = True
            area = painted.sum()
            painted[y1:y2, x1:x2] = False
            box = np.array([[*low, *high]], np.float32)
            (left,), (keep,) = uncovered(box, rectangle, 0.2)
            rows, columns = np.nonzero(painted)
            if keep:
                bounds = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                np.testing.assert_array_equal(left, bounds)
            else:
                thin = not len(rows) or min(np.ptp(rows), np.ptp(columns)) < 2
                assert painted.sum() < 0.2 * area or thin


class TestMixUp:
    def test_both_are_seen_and_all_boxes_kept(self):
        first, second = sample(0, [0, 0, 10, 10]), sample(200, [5, 5, 9, 9], [1, 2, 3, 4])
        weights = []
        for seed in range(300):
            result = mixup(first, second, np.random.default_rng(seed))
            level = result.image[0, 0, 0] / 200
            assert (result.image == result.image[0, 0, 0]).all()
            weights.append(1 - level)
            assert level == pytest.approx(1 - np.random.default_rng(seed).beta(8, 8), abs=0.005)
        assert 0.05 < min(weights) < 0.3 and 0.7 < max(weights) < 0.95
        assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
        assert result.boxes.tolist() == [[0, 0, 10, 10], [5, 5, 9, 9], [1, 2, 3, 4]]
        assert result.class_ids.tolist() == [0, 200, 201]
