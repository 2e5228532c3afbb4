"""Boxes follow pixels through everything at once.

What can be seen of an object is found without looking at colours: the same picture is made twice
from the same random state, with the object and without it, and it is where the two differ.
"""

import cv2
import numpy as np
import pytest

from training.augment import AugmentConfig, Sample, augmented

PICTURES = 40
QUIET = {"mosaic": 0, "flip": 0, "jitter": 0, "hue": 0, "saturation": 1, "exposure": 1,
         "min_visible": 0}  # fmt: skip
MOVED = {"jitter": 0.3, "scale": 1.4, "flip": 0.5, "flip_vertical": 0.5}


def picture(number: int, without: int, ellipses: bool) -> Sample:
    """Picture `number` has objects 2 * number and 2 * number + 1, side by side; `without` is left
    out of the pixels alone.
    """
    rng = np.random.default_rng(number)
    height, width = rng.integers(80, 160, 2).tolist()
    image = np.full((height, width, 3), 60, np.uint8)
    boxes = []
    for half in range(2):
        w, h = (rng.uniform(0.2, 0.4) * width, rng.uniform(0.2, 0.5) * height)
        x = half * width / 2 + rng.uniform(0, width / 2 - w - 1)
        y = rng.uniform(0, height - h)
        x1, y1, x2, y2 = (int(side) for side in (x, y, x + w, y + h))
        boxes.append((x1, y1, x2, y2))
        if 2 * number + half == without:
            continue
        if ellipses:
            # OpenCV counts in pixel centres, here in sixteenths, and draws the outline too.
            centre, axes = (
                ((x1 + x2 - 1) * 8, (y1 + y2 - 1) * 8),
                ((x2 - x1 - 1) * 8, (y2 - y1 - 1) * 8),
            )
            cv2.ellipse(image, centre, axes, 0, 0, 360, (240, 200, 160), -1, shift=4)
        else:
            image[y1:y2, x1:x2] = (240, 200, 160)
    return Sample(image, np.array(boxes, np.float32), np.array([2 * number, 2 * number + 1]))


def visible(config: AugmentConfig, seed: int, ellipses: bool, resize: str):
    """The sample, and for each object that was read the pixels where it shows; None if a picture
    was read twice.
    """
    read: list[int] = []

    def run(without: int) -> Sample:
        read.clear()

        def take(number: int) -> Sample:
            read.append(number)
            return picture(number, without, ellipses)

        rng = np.random.default_rng((5, seed))
        return augmented(take, seed % PICTURES, PICTURES, 160, 200, config, rng, resize)

    result = run(-1)
    if len(set(read)) != len(read):
        return None
    shown = {}
    for number in [2 * n + half for n in read for half in range(2)]:
        change = np.abs(result.image.astype(int) - run(number).image).max(axis=-1)
        shown[number] = change > max(change.max() / 2, 8)
    return result, shown


def bounds(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        pytest.param(MOVED, 1.5, id="alone"),
        pytest.param(MOVED | {"mosaic": 1}, 1.5, id="mosaic"),
        # What sticks out of a pasted rectangle by less than two pixels does not count.
        pytest.param(MOVED | {"cutmix": 1}, 3, id="cutmix"),
        pytest.param(MOVED | {"mixup": 1}, 1.5, id="mixup"),
        pytest.param(MOVED | {"mosaic": 1, "cutmix": 1, "mixup": 1}, 3, id="all three"),
        pytest.param(MOVED | {"mixup": 1, "noise": 5, "contrast": 1.3}, 1.5, id="photometric"),
    ],
)
def test_boxes_bound_what_is_visible(settings, tolerance, resize):
    config = AugmentConfig(**(QUIET | settings))
    seen = missing = 0
    for seed in range(16):
        made = visible(config, seed, False, resize)
        if made is None:
            continue
        result, shown = made
        boxes = dict(zip(result.class_ids.tolist(), result.boxes, strict=True))
        assert set(boxes) <= set(shown) and len(boxes) == len(result.boxes)
        for number, mask in shown.items():
            if number in boxes:
                np.testing.assert_allclose(boxes[number], bounds(mask), atol=tolerance)
                seen += 1
            elif mask.any():  # only what is too thin has no box
                x1, y1, x2, y2 = bounds(mask)
                assert min(x2 - x1, y2 - y1) <= 2 + tolerance
                missing += 1
    assert seen > 20
    assert missing < 0.2 * seen


def test_boxes_bound_turned_ellipses_and_hold_all_of_them():
    config = AugmentConfig(**(QUIET | MOVED | {"rotation": 180}))
    whole = 0
    for seed in range(60):
        result, shown = visible(config, seed, True, "letterbox")
        for box, number in zip(result.boxes, result.class_ids.tolist(), strict=True):
            if not shown[number].any():  # the border cuts through its box, but not through itself
                continue
            found = bounds(shown[number])
            assert (found[:2] >= box[:2] - 1.5).all() and (found[2:] <= box[2:] + 1.5).all()
            if (box[:2] > 0).all() and (box[2:] < (200, 160)).all():
                np.testing.assert_allclose(box, found, atol=1.5)
                whole += 1
    assert whole > 40


@pytest.mark.parametrize("mosaic", [0, 1])
def test_boxes_hold_what_is_left_of_hidden_objects(mosaic):
    """Hiding parts moves no box, and drops those of objects of which nothing is visible."""
    hiding = {"random_erase": 1, "cutout": 1, "grid_mask": 1, "mosaic": mosaic}
    config = AugmentConfig(**(QUIET | MOVED | hiding | {"min_visible": 0.01}))
    seen = 0
    for seed in range(16):
        made = visible(config, seed, False, "stretch")
        if made is None:
            continue
        result, shown = made
        for box, number in zip(result.boxes, result.class_ids.tolist(), strict=True):
            if shown[number].any():
                found = bounds(shown[number])
                assert (found[:2] >= box[:2] - 1.5).all() and (found[2:] <= box[2:] + 1.5).all()
                seen += 1
        for number in set(shown) - set(result.class_ids.tolist()):
            assert shown[number].sum() < 300
    assert seen > 20
