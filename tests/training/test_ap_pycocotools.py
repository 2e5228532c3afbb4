"""AP of a trained network's own detections against pycocotools, by way of COCO's file formats.

VOC's rule differs from COCO's where a detection overlaps two objects (COCO gives it to the best
that is still free), which decides no match of these scenes: at 101 points the two must agree to
rounding, and the area under the curve to what a sum at 101 points may be off.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from training.shapes import write_dataset
from yolov4_fast import Detections, Detector, build_engine
from yolov4_fast.checkpoint import read_checkpoint
from yolov4_fast.datasets import Dataset, open_dataset
from yolov4_fast.evaluation import evaluate_predictions

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "shapes-nano.safetensors"
MOST = 100  # detections of an image and class that COCO counts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_dataset(folder, {"val": 24}, 320, 320, seed=77)  # not what the sample was trained on
    return open_dataset(folder, "val")


@pytest.fixture(scope="module")
def found(dataset: Dataset) -> list[Detections]:
    """What the sample model finds, the unlikely too."""
    sample = read_checkpoint(SAMPLE)
    assert sample.class_names == dataset.class_names
    engine = build_engine(
        sample.network, sample.state, sample.class_names, engine="torch", size=320
    )
    detector = Detector(engine, confidence=0.001, max_detections=MOST)
    return detector.detect([dataset.image_path(i) for i in range(len(dataset))])


def truth_json(dataset: Dataset) -> dict[str, object]:
    annotations = []
    for image, truth in enumerate(dataset.annotations):
        for box, class_id in zip(truth.boxes.tolist(), truth.class_ids.tolist(), strict=True):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": class_id,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {},
        "images": [{"id": i, "width": 320, "height": 320} for i in range(len(dataset))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(dataset.class_names)],
        "annotations": annotations,
    }


def pycocotools_stats(
    dataset: Dataset, found: list[Detections], folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """-> COCO's twelve numbers, precision [IoU thresholds, recalls, classes] for all sizes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    (folder / "truth.json").write_text(json.dumps(truth_json(dataset)))
    rows = [row for i, detections in enumerate(found) for row in detections.to_coco(i)]
    (folder / "results.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"][:, :, :, 0, -1]


def test_ap_of_real_detections_is_that_of_pycocotools(
    dataset: Dataset, found: list[Detections], tmp_path: Path
) -> None:
    pytest.importorskip("pycocotools")
    stats, precision = pycocotools_stats(dataset, found, tmp_path)
    coco = evaluate_predictions(found, dataset, metric="coco")
    assert 0.3 < coco.mAP50 < 0.98 and sum(coco.detections) > 500  # there is something to compare
    np.testing.assert_allclose(list(coco.coco.values()), stats, atol=1e-9)
    np.testing.assert_allclose(coco.ap, precision.mean(axis=(0, 1)), atol=1e-9)

    theirs = precision[0].mean(axis=0)
    # A sum at 101 recalls is off by at most one hundredth from the area under the same curve.
    for points, tolerance in ((101, 1e-9), ("area", 0.01)):
        ours = evaluate_predictions(found, dataset, metric="voc", points=points)
        np.testing.assert_allclose(ours.ap, theirs, atol=tolerance)
        assert ours.mAP50 == pytest.approx(stats[1], abs=tolerance)
