"""Random erasing, CutOut and GridMask."""

import numpy as np
import pytest

from training.augment import AugmentConfig, Sample, augmented
from training.augment.erase import cutout, drop_hidden, grid_mask, random_erase
from training.augment.geometric import GREY

KINDS = {"random_erase": random_erase, "cutout": cutout, "grid_mask": grid_mask}


def applied(kind, seed, height=120, width=200) -> tuple[np.ndarray, np.ndarray]:
    image = np.zeros((height, width, 3), np.uint8)
    hidden = np.zeros((height, width), np.uint8)
    kind(image, hidden, np.random.default_rng(seed))
    return image, hidden


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("size", [(120, 200), (33, 31), (1, 1), (5, 300)])
def test_hidden_is_what_was_painted(kind, size):
    for seed in range(30):
        image, hidden = applied(kind, seed, *size)
        painted = image.any(axis=-1)
        assert not (painted & (hidden == 0)).any()
        assert painted.sum() >= 0.99 * hidden.sum() - 1  # a random pixel may be black
        if kind is not random_erase:
            assert (image[hidden == 1] == GREY).all()


def test_a_rectangle_of_noise_is_erased():
    shares, aspects = [], []
    for seed in range(300):
        image, hidden = applied(random_erase, seed)
        rows, columns = np.nonzero(hidden)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert hidden.sum() == height * width
        shares.append(hidden.mean())
        aspects.append(height / 120 / (width / 200))
        if hidden.sum() > 1000:
            assert image[hidden == 1].std() > 60
    assert 0.018 < min(shares) < 0.03 and 0.18 < max(shares) < 0.21
    assert 0.28 < min(aspects) < 0.4 and 2.6 < max(aspects) < 3.5


def test_cutout_hides_a_few_squares():
    shares = [applied(cutout, seed)[1].mean() for seed in range(300)]
    assert 0 < min(shares) < 0.01 and 0.05 < max(shares) < 8 * 0.2**2
    one = next(h for h in (applied(cutout, s)[1] for s in range(99)) if 0 < h.mean() < 0.02)
    assert one.any()


def test_a_grid_hides_a_quarter_at_regular_places():
    starts = set()
    for seed in range(100):
        hidden = applied(grid_mask, seed, 400, 600)[1]
        assert hidden.mean() == pytest.approx(0.25, abs=0.13)
        columns, rows = hidden.any(axis=0), hidden.any(axis=1)
        np.testing.assert_array_equal(hidden, np.outer(rows, columns))
        steps = np.diff(np.flatnonzero(np.diff(columns.astype(int)) == 1))
        assert len(steps) == 0 or (np.ptp(steps) <= 1 and 59 <= steps[0] <= 201)
        starts.add(int(columns.argmax()))
    assert len(starts) > 20
    assert np.mean([applied(grid_mask, s, 400, 600)[1].mean() for s in range(200)]) == (
        pytest.approx(0.25, abs=0.02)
    )


def test_boxes_go_only_if_too_little_is_visible():
    hidden = np.zeros((50, 100), np.uint8)
    hidden[10:20, 10:30] = 1
    hidden[0:50, 60:70] = 1
    boxes = np.array(
        [[10, 10, 30, 20], [10, 10, 40, 20], [5, 5, 9, 9], [55, 0, 75, 50]], np.float32
    )
    sample = Sample(np.zeros((50, 100, 3), np.uint8), boxes, np.arange(4))
    assert drop_hidden(sample, hidden, 0.1).class_ids.tolist() == [1, 2, 3]
    assert drop_hidden(sample, hidden, 1 / 3).class_ids.tolist() == [1, 2, 3]
    assert drop_hidden(sample, hidden, 0.4).class_ids.tolist() == [2, 3]
    assert drop_hidden(sample, hidden, 0.6).class_ids.tolist() == [2]
    assert drop_hidden(sample, hidden, 0).class_ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(drop_hidden(sample, hidden, 0.4).boxes, boxes[2:])


@pytest.mark.parametrize("name", KINDS)
def test_boxes_keep_their_place_in_the_pipeline(name):
    image = np.full((100, 100, 3), 255, np.uint8)
    boxes = np.array([[10, 10, 90, 90], [20, 20, 24, 24]], np.float32)
    sample = Sample(image, boxes, np.array([0, 1]))
    config = AugmentConfig(
        mosaic=0, flip=0, jitter=0, hue=0, saturation=1, exposure=1, **{name: 1.0}
    )
    counts = []
    for seed in range(60):
        result = augmented(lambda _: sample, 0, 1, 100, 100, config, np.random.default_rng(seed))
        assert result.boxes[0].tolist() == [10, 10, 90, 90]
        assert (result.image != 255).any()
        counts.append(len(result.boxes))
    assert 2 in counts and (name == "cutout" or 1 in counts)  # the small one is hidden at times
