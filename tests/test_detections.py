"""Detections: frozen, and equal to themselves in every form."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import supervision
import torch

from yolov4_fast.detections import Detections, class_color

NAMES = ("cell", "dot", "übergroß")


def detections(**changes: object) -> Detections:
    values = {
        "boxes": np.array([[10, 20, 60, 50], [0, 0, 100, 80], [90, 70, 100, 80]], np.float32),
        "scores": np.array([0.9, 0.5, 0.25], np.float32),
        "class_ids": np.array([2, 0, 1]),
        "class_names": NAMES,
        "image_size": (80, 100),
    }
    return Detections(**(values | changes))


def empty() -> Detections:
    return detections(boxes=np.empty((0, 4)), scores=np.empty(0), class_ids=np.empty(0, int))


def test_length_and_iteration() -> None:
    found = detections()
    assert len(found) == 3
    first, *_, last = found
    assert first.box.tolist() == [10, 20, 60, 50]
    assert (first.score, first.class_id, first.class_name) == (pytest.approx(0.9), 2, "übergroß")
    assert last.class_name == "dot"
    assert len(empty()) == 0
    assert list(empty()) == []


def test_dtypes() -> None:
    found = detections(boxes=[[1, 2, 3, 4]], scores=[0.5], class_ids=np.array([1], np.int32))
    assert found.boxes.dtype == np.float32
    assert found.scores.dtype == np.float32
    assert found.class_ids.dtype == np.int64


def test_is_frozen() -> None:
    boxes = np.zeros((3, 4), np.float32)
    found = detections(boxes=boxes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.boxes = boxes
    with pytest.raises(ValueError, match="read-only"):
        found.boxes[0] = 1
    boxes[0] = 1  # the caller's own array stays writable


@pytest.mark.parametrize(
    "changes",
    [{"boxes": np.zeros((2, 4))}, {"boxes": np.zeros((3, 5))}, {"class_ids": np.zeros(4, int)}],
)
def test_refuses_lengths_that_differ(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 4\], \[N\] and \[N\]"):
        detections(**changes)


def test_to_json() -> None:
    entries = json.loads(json.dumps(detections().to_json()))
    assert entries[0] == {
        "class_id": 2,
        "class_name": "übergroß",
        "score": pytest.approx(0.9),
        "box": [10, 20, 60, 50],
    }
    assert len(entries) == 3
    assert empty().to_json() == []


def test_to_coco() -> None:
    entries = json.loads(json.dumps(detections().to_coco(7, category_ids=(5, 6, 90))))
    assert entries[0] == {
        "image_id": 7,
        "category_id": 90,
        "bbox": [10, 20, 50, 30],
        "score": pytest.approx(0.9),
    }
    assert [entry["category_id"] for entry in detections().to_coco(7)] == [2, 0, 1]
    with pytest.raises(ValueError, match="2 category ids for 3 classes"):
        detections().to_coco(7, category_ids=(1, 2))


def test_to_supervision() -> None:
    found = detections()
    other = found.to_supervision()
    assert isinstance(other, supervision.Detections)
    np.testing.assert_array_equal(other.xyxy, found.boxes)
    np.testing.assert_array_equal(other.confidence, found.scores)
    np.testing.assert_array_equal(other.class_id, found.class_ids)
    assert list(other["class_name"]) == ["übergroß", "cell", "dot"]
    assert len(empty().to_supervision()) == 0


def test_to_supervision_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        detections().to_supervision()


def test_draw_marks_a_copy() -> None:
    image = np.full((80, 100, 3), 128, np.uint8)
    drawn = detections().draw(image)
    assert (image == 128).all()
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    for box, class_id in (([10, 20, 60, 50], 2), ([0, 0, 100, 80], 0)):
        x1, _, _, y2 = box
        assert tuple(drawn[min(y2, 79), x1]) == class_color(class_id)  # a corner without label
    np.testing.assert_array_equal(empty().draw(image), image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    np.testing.assert_array_equal(detections().draw(tensor), drawn)
    np.testing.assert_array_equal(detections().draw(tensor / 255), drawn)


@pytest.mark.parametrize("size", [(600, 800), (2000, 3000)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_labels_stay_inside(size: tuple[int, int], corner: tuple[int, int]) -> None:
    """A label at the border is moved, not cut: its patch is as large as that of a box in the
    middle.
    """
    height, width = size
    color = class_color(0)

    def label_pixels(left: float, top: float) -> int:
        box = np.array([[left, top, left + 6, top + 6]])
        found = detections(
            boxes=box, scores=[0.5], class_ids=[0], class_names=("cell",), image_size=size
        )
        drawn = found.draw(np.zeros((*size, 3), np.uint8))
        return int((drawn == color).all(-1).sum())

    middle = label_pixels(width / 2, height / 2)
    at_border = label_pixels(corner[1] * (width - 6), corner[0] * (height - 6))
    assert at_border >= 0.85 * middle


def test_draw_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="belong to an image of 100x80 px, not 80x100"):
        detections().draw(np.zeros((100, 80, 3), np.uint8))


def test_colors_of_the_first_classes_differ_well() -> None:
    colors = np.array([class_color(index) for index in range(24)])
    distance = np.abs(colors[:, None] - colors).sum(-1) + 999 * np.eye(24, dtype=int)
    assert distance.min() > 40
    assert class_color(3) == class_color(3)
