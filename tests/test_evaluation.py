"""AP against values worked by hand and against pycocotools."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from yolov4_fast.average_precision import (
    EvaluationError,
    Prediction,
    average_precision,
    box_iou,
    coco_ap,
    match,
    voc_ap,
)
from yolov4_fast.datasets import Annotation, Dataset
from yolov4_fast.evaluation import ALIASES, evaluate, evaluate_predictions, match_classes
from yolov4_fast.zoo import COCO_NAMES


def objects(boxes, class_ids=None, difficult=None, crowd=None) -> Annotation:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    n = len(boxes)
    return Annotation(
        boxes,
        np.zeros(n, np.int64) if class_ids is None else np.asarray(class_ids, np.int64),
        np.zeros(n, bool) if difficult is None else np.asarray(difficult, bool),
        np.zeros(n, bool) if crowd is None else np.asarray(crowd, bool),
        (boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
    )


def found(boxes, scores, class_ids=None) -> Prediction:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    ids = np.zeros(len(boxes), np.int64) if class_ids is None else np.asarray(class_ids)
    return Prediction(boxes, np.asarray(scores, np.float32), ids)


def dataset_of(truths, class_names=("a",)) -> Dataset:
    paths = tuple(Path(f"{i}.png") for i in range(len(truths)))
    return Dataset(Path("d"), None, tuple(class_names), paths, tuple(truths))


HITS = np.array([True, True, False, True, False], dtype=bool)  # of 4 objects: recall .25 .5 .5 .75


class TestAveragePrecision:
    def test_by_hand(self):
        # Precision 1, 1, 2/3, 3/4, 3/5; made monotone 1, 1, 3/4, 3/4, 3/5.
        assert average_precision(HITS, 4) == pytest.approx(0.25 + 0.25 + 0.25 * 0.75)
        # Recalls 0 to .5 (6 of 11) have precision 1, .6 and .7 have 3/4, the rest 0.
        assert average_precision(HITS, 4, 11) == pytest.approx((6 + 2 * 0.75) / 11)
        assert average_precision(HITS, 4, 101) == pytest.approx((51 + 25 * 0.75) / 101)

    def test_nothing_found_is_zero_and_nothing_to_find_is_nan(self):
        none = np.zeros(0, bool)
        for points in ("area", 11, 101):
            assert average_precision(none, 3, points) == 0
            assert math.isnan(average_precision(none, 0, points))

    def test_eleven_points_reach_a_recall_that_is_a_multiple_of_a_tenth(self):
        # 3 / 10 is less than 3 * 0.1 in floating point: that point must not be lost.
        assert average_precision(np.ones(3, bool), 10, 11) == pytest.approx(4 / 11)


class TestMatch:
    def test_duplicates_are_false_and_the_likelier_is_the_hit(self):
        truth = objects([[0, 0, 10, 10]])
        predicted = found([[0, 0, 10, 9], [0, 0, 10, 10]], [0.6, 0.9])
        matches = match([predicted], [truth], 1, 0.5)
        np.testing.assert_allclose(matches.scores, [0.9, 0.6])
        assert matches.hits.tolist() == [True, False]

    def test_a_detection_is_held_against_its_best_object_only(self):
        # The second one overlaps both; its best is taken, and it does not get the other.
        truth = objects([[0, 0, 10, 10], [0, 3, 10, 13]])
        predicted = found([[0, 0, 10, 10], [0, 1, 10, 11]], [0.9, 0.8])
        assert match([predicted], [truth], 1, 0.5).hits.tolist() == [True, False]

    def test_the_threshold_itself_is_no_hit(self):
        truth, half = objects([[0, 0, 10, 10]]), found([[0, 0, 10, 5]], [1.0])
        assert match([half], [truth], 1, 0.5).hits.tolist() == [False]
        assert match([half], [truth], 1, 0.4999).hits.tolist() == [True]

    def test_difficult_and_crowd_count_neither_way(self):
        boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
        truth = objects(boxes, difficult=[1, 0, 0], crowd=[0, 1, 0])
        matches = match([found(boxes, [0.9, 0.8, 0.7])], [truth], 1, 0.5)
        assert matches.ignored.tolist() == [True, True, False]
        assert matches.positives.tolist() == [1]
        assert voc_ap([found(boxes, [0.9, 0.8, 0.7])], [truth], 1).tolist() == [1.0]

    def test_classes_and_images_do_not_mix(self):
        truths = [objects([[0, 0, 10, 10]], [1]), objects([]), objects([[0, 0, 10, 10]], [0])]
        box = [[0, 0, 10, 10]]
        predictions = [found(box, [0.9], [0]), found(box, [0.8], [1]), found(box, [0.7], [0])]
        matches = match(predictions, truths, 3, 0.5)
        assert matches.hits.tolist() == [False, False, True]
        ap = voc_ap(predictions, truths, 3)
        assert ap[:2].tolist() == [0.5, 0.0]
        assert math.isnan(ap[2])

    def test_as_many_predictions_as_images(self):
        with pytest.raises(EvaluationError, match="1 predictions for 2 images"):
            match([found([], [])], [objects([]), objects([])], 1, 0.5)


def test_iou_by_hand():
    iou = box_iou(
        np.array([[0, 0, 2, 2], [5, 5, 5, 5]]), np.array([[1, 1, 3, 3], [0, 0, 2, 2], [5, 5, 5, 5]])
    )
    np.testing.assert_allclose(iou, [[1 / 7, 1, 0], [0, 0, 0]])


def random_data(seed: int, images: int = 30, classes: int = 4):
    """Objects on a grid, too far apart for a detection to touch two, and detections near them."""
    rng = np.random.default_rng(seed)
    truths, predictions = [], []
    for _ in range(images):
        cells = rng.permutation(36)[: rng.integers(0, 12)]
        corner = np.stack([cells % 6, cells // 6], axis=1) * 100.0
        boxes = np.concatenate([corner, corner + rng.uniform(10, 60, corner.shape)], axis=1)
        class_ids = rng.integers(classes, size=len(boxes))
        truths.append(objects(boxes, class_ids))
        copies = np.repeat(np.arange(len(boxes)), rng.integers(0, 4, len(boxes)))
        moved = boxes[copies] + rng.normal(0, 4, (len(copies), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        ids = np.where(rng.random(len(copies)) < 0.8, class_ids[copies], rng.integers(classes))
        predictions.append(found(moved, rng.random(len(copies)), ids))
    return predictions, truths


def pycocotools_precision(predictions, truths, classes: int) -> np.ndarray:
    """[IoU thresholds, recalls, classes], all sizes, 100 detections."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        x1, y1, x2, y2 = (float(v) for v in box)
        return [x1, y1, x2 - x1, y2 - y1]

    def rows(items):
        return [
            {"image_id": i, "category_id": int(c), "bbox": xywh(b)}
            for i, item in enumerate(items)
            for b, c in zip(item.boxes, item.class_ids, strict=True)
        ]

    annotations = rows(truths)
    for number, row in enumerate(annotations, start=1):
        row |= {"id": number, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
    results = rows(predictions)
    for row, score in zip(results, np.concatenate([p.scores for p in predictions]), strict=True):
        row["score"] = float(score)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": c} for c in range(classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][:, :, :, 0, -1]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_pycocotools(seed):
    pytest.importorskip("pycocotools")
    predictions, truths = random_data(seed)
    precision = pycocotools_precision(predictions, truths, 4)
    ours = voc_ap(predictions, truths, 4, 0.5, 101)
    assert 0.05 < ours.min() and ours.max() < 0.95
    np.testing.assert_allclose(ours, precision[0].mean(axis=0), atol=1e-9)
    numbers, ap = coco_ap(predictions, truths, 4)
    np.testing.assert_allclose(ap, precision.mean(axis=(0, 1)), atol=1e-9)
    assert numbers["AP"] == pytest.approx(precision.mean(), abs=1e-9)
    assert numbers["AP50"] == pytest.approx(ours.mean(), abs=1e-9)


class FakeDetector:
    """Finds given boxes, by image number, those with a score over its confidence."""

    def __init__(self, class_names, predictions):
        self.class_names = tuple(class_names)
        self.confidence = 0.25
        self.predictions = predictions
        self.batches = []

    def detect(self, batch):
        self.batches.append(len(batch))
        results = []
        for path in batch:
            prediction = self.predictions[int(path.stem)]
            keep = prediction.scores >= self.confidence
            results.append(Prediction(*(array[keep] for array in prediction)))
        return results


class TestEvaluate:
    truths = (
        objects([[0, 0, 10, 10], [20, 0, 30, 10]], [0, 1]),
        objects([]),
        objects([[5, 5, 9, 9]], [1]),
    )
    # The detector numbers the classes the other way round.
    predictions = (
        found([[0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.01], [1, 0]),
        found([[0, 0, 3, 3]], [0.5], [0]),
        found([[5, 5, 9, 9]], [0.8], [0]),
    )

    @pytest.mark.parametrize("metric", ["voc", "coco"])
    def test_matches_classes_by_name_and_sees_unlikely_detections(self, metric):
        detector = FakeDetector(["b", "a"], self.predictions)
        dataset = dataset_of(self.truths, ["a", "b"])
        result = evaluate(detector, dataset, metric=metric, points=101, batch=2, progress=False)
        assert detector.batches == [2, 1]
        assert detector.confidence == 0.25
        # b: hit, miss, hit of 2 objects: precision 1 up to recall .5, then 2/3.
        b = (51 + 50 * 2 / 3) / 101
        np.testing.assert_allclose(result.ap, [1, b], atol=1e-9)
        assert result.mAP50 == pytest.approx((1 + b) / 2)
        assert result.objects == (1, 2) and result.detections == (1, 3)
        assert (result.precision, result.recall) == (2 / 3, 2 / 3)
        assert result.f1 == pytest.approx(2 / 3)
        assert result.AP == (pytest.approx(result.mAP) if metric == "coco" else None)
        written = json.loads(json.dumps(result.to_json()))
        assert written["mAP50"] == result.mAP50
        assert ("AP" in written) == (metric == "coco")
        assert [c["name"] for c in written["classes"]] == ["a", "b"]
        assert "mean" in str(result) and "mAP50" in str(result)

    def test_confidence_none_leaves_the_detector_alone(self):
        detector = FakeDetector(["b", "a"], self.predictions)
        result = evaluate(
            detector, dataset_of(self.truths, ["a", "b"]), confidence=None, progress=False
        )
        assert result.detections == (1, 2)

    def test_different_classes_raise_and_both_are_named(self):
        detector = FakeDetector(["cat", "a"], self.predictions)
        with pytest.raises(EvaluationError, match=r"has \[cat\], .* has \[b\]"):
            evaluate(detector, dataset_of(self.truths, ["a", "b"]), progress=False)

    def test_a_class_without_objects_is_left_out_of_the_mean(self):
        dataset = dataset_of([objects([[0, 0, 9, 9]])], ["a", "b"])
        for metric in ("voc", "coco"):
            result = evaluate_predictions(
                [found([[0, 0, 9, 9], [0, 0, 9, 9]], [1, 1], [0, 1])], dataset, metric=metric
            )
            assert result.mAP50 == pytest.approx(1)
            assert math.isnan(result.ap[1])
            assert result.to_json()["classes"][1]["AP"] is None

    def test_no_detections_at_all(self):
        for metric in ("voc", "coco"):
            result = evaluate_predictions(
                [found([], [])], dataset_of([objects([[0, 0, 9, 9]])]), metric=metric
            )
            assert result.mAP50 == 0
            assert result.to_json()["precision"] is None

    def test_map50_stays_at_one_half(self):
        dataset = dataset_of([objects([[0, 0, 10, 10]])])
        result = evaluate_predictions([found([[0, 0, 10, 6]], [1])], dataset, iou_threshold=0.75)
        assert (result.mAP, result.mAP50) == (0, 1)

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ({"metric": "x"}, "metric must be voc or coco, not 'x'"),
            ({"points": 12}, "points must be 'area', 11 or 101, not 12"),
            ({"iou_threshold": 50}, "iou_threshold must be between 0 and 1, not 50"),
        ],
    )
    def test_unknown_options_raise(self, option, words):
        with pytest.raises(EvaluationError, match=words):
            evaluate_predictions([], dataset_of([]), **option)


def test_classes_are_matched_by_name_in_any_order() -> None:
    assert match_classes(("a", "b", "c"), ("c", "a", "b")).tolist() == [1, 2, 0]


def test_both_spellings_of_coco_match() -> None:
    """Darknet's coco.names against the names in COCO's JSON."""
    theirs = [ALIASES.get(name, name) for name in COCO_NAMES]
    assert sum(a != b for a, b in zip(theirs, COCO_NAMES, strict=True)) == 6
    assert match_classes(COCO_NAMES, theirs[::-1]).tolist() == list(range(79, -1, -1))
    assert match_classes(theirs, COCO_NAMES).tolist() == list(range(80))
    assert match_classes(("sofa", "tv"), ("tvmonitor", "couch")).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (("a", "b"), ("a", "c"), r"only the detector has \[b\], only the data set has \[c\]"),
        (("a", "b"), ("a",), r"detector \(2\).*data set \(1\).*has \[b\].*has \[\]"),
        (("sofa", "couch"), ("sofa", "couch"), "a class occurs twice"),
        (tuple("abcdefg"), ("z",), r"\[a, b, c, d, e and 2 more\]"),
    ],
)
def test_classes_that_differ_are_named(ours, theirs, told) -> None:
    with pytest.raises(EvaluationError, match=told):
        match_classes(ours, theirs)
