"""What a run draws, and what TensorBoard is given."""

import math

import cv2
import numpy as np
import pytest
import torch

from training.board import Board
from training.loader import Batch
from training.losses import Losses
from training.pictures import (
    TILE,
    batch_sheet,
    class_curves,
    sheet,
    validation_picture,
    write_curves,
)
from yolov4_fast.average_precision import Prediction, average_precision, precision_recall_curve
from yolov4_fast.datasets import Annotation, Dataset
from yolov4_fast.detections import Detections, class_color
from yolov4_fast.evaluation import Evaluation, evaluate_predictions

NAMES = ("cat", "dog", "bird")


def boxes(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


def annotation(class_ids: list[int], *rows: tuple[float, ...]) -> Annotation:
    flags = np.zeros(len(rows), bool)
    return Annotation(boxes(*rows), np.array(class_ids), flags, flags, np.ones(len(rows)))


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Two pictures: two cats and a dog; no birds."""
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"{number}.png")
        cv2.imwrite(str(paths[-1]), np.full((60, 80, 3), 128, np.uint8))
    truths = (
        annotation([0, 1], (10, 10, 30, 30), (40, 10, 70, 50)),
        annotation([0], (5, 5, 25, 45)),
    )
    return Dataset(tmp_path, "val", NAMES, tuple(paths), truths)


@pytest.fixture
def evaluation(dataset) -> Evaluation:
    """Cats: hit, miss, hit, in descending order of score; the dog is not found."""
    predictions = [
        Prediction(
            boxes((10, 10, 30, 30), (50, 20, 60, 30)), np.array([0.9, 0.6]), np.array([0, 0])
        ),
        Prediction(boxes((5, 5, 25, 45)), np.array([0.3]), np.array([0])),
    ]
    return evaluate_predictions(predictions, dataset)


def test_the_curve_by_hand(evaluation):
    curves = class_curves(evaluation)
    assert list(curves) == ["cat", "dog"]  # there are no birds
    precision, recall, scores = curves["cat"]
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert recall.tolist() == [0.5, 0.5, 1]
    assert scores.tolist() == [0.9, 0.6, 0.3]
    assert all(not len(values) for values in curves["dog"])


def test_ap_is_the_area_under_the_curve_made_monotone():
    hits = np.array([True, False, True, True, False])
    precision, recall = precision_recall_curve(hits, 4)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4, 3 / 5])
    assert recall.tolist() == [0.25, 0.25, 0.5, 0.75, 0.75]
    assert average_precision(hits, 4) == pytest.approx(0.25 * 1 + 0.25 * 0.75 + 0.25 * 0.75)
    precision, recall = precision_recall_curve(hits, 0)
    assert len(precision) == 5 and np.isnan(recall).all()


def test_a_batch_is_drawn_with_its_boxes():
    images = torch.full((3, 3, 64, 96), 90, dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5], [2, 2, 0.5, 0.5, 0.25, 0.5]])
    drawn = batch_sheet(Batch(images, targets), NAMES)
    assert drawn.shape == (2 * 96, 2 * 96, 3) and drawn.dtype == np.uint8
    first, second, third = drawn[:64, :96], drawn[:64, 96:], drawn[96:160, :96]
    assert (second == 90).all()  # no objects
    assert (first[32, 24] == class_color(1)).all() and (first[32, 48] == 90).all()
    assert (third[32, 36] == class_color(2)).all()


def test_a_batch_without_objects_is_drawn():
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 6))
    assert not batch_sheet(batch, NAMES).any()


def test_large_pictures_are_shrunk_to_their_tiles():
    drawn = sheet([np.full((1000, 500, 3), 200, np.uint8), np.full((10, 900, 3), 100, np.uint8)])
    assert drawn.shape == (TILE, 2 * TILE, 3)
    assert (drawn[:, :160] == 200).all() and not drawn[:, 160:TILE].any()
    assert (drawn[:4, TILE:] == 100).all() and not drawn[4:, TILE:].any()


def test_what_is_found_and_what_there_is(dataset):
    image = np.full((60, 80, 3), 128, np.uint8)
    found = Detections(boxes((10, 10, 30, 30)), np.array([0.9]), np.array([0]), NAMES, (60, 80))
    drawn = validation_picture(image, found, dataset.annotation(0))
    assert (drawn[30, 55] == 128).all()
    assert (drawn[50, 55] == 255).all()  # the dog, that was not found


def test_the_board_holds_scalars_pictures_and_curves(tmp_path, dataset, evaluation):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Board(tmp_path / "board", step=0)
    losses = Losses(*torch.tensor([6.0, 1.0, 2.0, 3.0]))
    board.step(losses, 0.125, 40.0, 1)
    batch = Batch(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, 6))
    board.batch(batch, NAMES, 1)
    board.evaluation(evaluation, 1)
    board.close()
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0}).Reload()
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert scalars["loss/total"] == 6 and scalars["loss/classes"] == 3
    assert scalars["learning_rate"] == 0.125 and scalars["images_per_second"] == 40
    assert scalars["AP50/cat"] == pytest.approx(evaluation.ap[0])
    assert scalars["AP50/dog"] == 0 and "AP50/bird" not in scalars
    assert scalars["val/mAP50"] == pytest.approx(evaluation.mAP50)
    assert scalars["val/recall"] == pytest.approx(2 / 3)
    assert events.Tags()["images"] == ["batch"]
    curve = events.Tensors("precision-recall/cat")[0].tensor_proto
    values = np.frombuffer(curve.tensor_content, np.float32).reshape(6, -1)
    if not len(values[0]):
        values = np.array(curve.float_val).reshape(6, -1)
    precision, recall = values[4], values[5]
    at = {name: round(100 * score) for name, score in (("all", 0), ("two", 0.5), ("one", 0.8))}
    assert precision[at["all"]] == pytest.approx(2 / 3) and recall[at["all"]] == 1
    assert precision[at["two"]] == pytest.approx(1 / 2) and recall[at["two"]] == 0.5
    assert precision[at["one"]] == 1 and recall[at["one"]] == 0.5
    assert precision[-1] == 1 and recall[-1] == 0


def test_the_curves_are_drawn(tmp_path, evaluation):
    rows = [
        {"epoch": epoch, "total": 6 / epoch, "box": 3 / epoch, "objectness": 2.0, "classes": 1.0}
        | ({"mAP50": 0.1 * epoch} if epoch % 2 == 0 else {})
        for epoch in range(1, 7)
    ]
    rows[3]["mAP50"] = None  # as where there was nothing to measure
    pictures = []
    for name, content in (("few", rows[:2]), ("more", rows)):
        write_curves(tmp_path / f"{name}.png", content, evaluation)
        pictures.append(cv2.imread(str(tmp_path / f"{name}.png")))
    assert pictures[0].shape == pictures[1].shape and pictures[0].shape[1] > 1000
    assert not np.array_equal(pictures[0], pictures[1])
    for name, value in (("nothing", None), ("zero", 0.0)):  # which is a result too
        write_curves(tmp_path / f"{name}.png", [rows[0] | {"mAP50": value}], evaluation)
    drawn = [cv2.imread(str(tmp_path / f"{name}.png")) for name in ("nothing", "zero")]
    assert not np.array_equal(*drawn)
    write_curves(tmp_path / "none.png", [], None)
    assert cv2.imread(str(tmp_path / "none.png")) is not None


def test_an_evaluation_is_told_without_what_it_was_made_from(evaluation):
    assert "matches" not in evaluation.to_json() and "Matches" not in repr(evaluation)
    assert math.isnan(evaluation.ap[2])
