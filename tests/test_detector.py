"""Detector: what Darknet finds, batches of any kind and size, thresholds, threads, memory, bad
input.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from yolov4_fast import Detections, Detector, build_engine
from yolov4_fast.engines import Engine, EngineFileError
from yolov4_fast.sources import read_image

NAMES = ("square.png", "tall.png", "wide.png")


@pytest.fixture(scope="module", params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest, mini) -> Engine:
    return build_engine(*mini, engine=request.param, precision="f32", max_batch=2)


@pytest.fixture(scope="module")
def detector(engine: Engine) -> Detector:
    return Detector(engine)


@pytest.fixture(scope="module")
def paths(darknet_reference: Path) -> list[Path]:
    return [darknet_reference / name for name in NAMES]


def assert_same(ours: list[Detections], theirs: list[Detections], tolerance: float = 0) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.image_size == other.image_size
        np.testing.assert_array_equal(one.class_ids, other.class_ids)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=tolerance)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=tolerance * 1000)


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_finds_what_darknet_finds(
    engine: Engine, paths: list[Path], darknet_reference: Path, mode: str
) -> None:
    """Every detection matched one to one; boxes clipped to the image as ours are."""
    tolerance = 1e-4 if engine.kind == "torch" else 2e-3
    reference = json.loads((darknet_reference / f"detections-{mode}.json").read_text())
    found = Detector(engine, resize=mode).detect(paths)
    expected = {entry["image"]: entry["detections"] for entry in reference}
    for name, detections in zip(NAMES, found, strict=True):
        height, width = detections.image_size
        ours = np.column_stack(
            (
                detections.class_ids,
                detections.boxes / (width, height, width, height),
                detections.scores,
            )
        )
        theirs = np.array([as_row(entry) for entry in expected[name]])
        assert ours.shape == theirs.shape
        for row in theirs:
            distance = np.abs(ours - row).max(1)
            nearest = distance.argmin()
            assert distance[nearest] < tolerance
            ours = np.delete(ours, nearest, 0)


def as_row(entry: dict[str, Any]) -> list[float]:
    x, y, w, h = (entry[key] for key in ("center_x", "center_y", "width", "height"))
    box = np.clip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 0, 1)
    return [entry["class_id"], *box, entry["confidence"]]


def test_result(detector: Detector, paths: list[Path], mini) -> None:
    (found,) = detector.detect(paths[1])
    assert len(found) > 0
    assert found.image_size == (420, 240)
    assert found.class_names == mini.class_names
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores > 0.25).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= (240, 420, 240, 420)).all()


def test_every_kind_of_image_finds_the_same(detector: Detector, paths: list[Path]) -> None:
    path = paths[2]
    array = read_image(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = detector.detect(path)
    for image in (str(path), Image.open(path), array, tensor, tensor.contiguous()):
        assert_same(detector.detect(image), expected)
        assert_same(detector.detect([image]), expected)
    assert_same(detector.detect(tensor / 255), expected, 1e-4)
    assert_same(detector.detect((tensor / 255).double()), expected, 1e-4)


def test_mixed_batch_in_chunks_equals_one_by_one(detector: Detector, paths: list[Path]) -> None:
    array = read_image(paths[0])
    batch = [
        paths[0],
        array[:200, 50:],
        Image.open(paths[1]),
        torch.from_numpy(array).permute(2, 0, 1),
        str(paths[2]),
    ]
    assert detector.engine.max_batch == 2  # so that this takes three runs, the last of one image
    one_by_one = [found for image in batch for found in detector.detect(image)]
    assert_same(detector.detect(batch), one_by_one, 1e-5)
    assert_same(detector.detect(tuple(batch)), one_by_one, 1e-5)
    assert_same(detector.detect(iter(batch)), one_by_one, 1e-5)


@pytest.mark.parametrize(
    "batch", [[], (), torch.empty(0, 3, 8, 8), np.empty((0, 8, 8, 3), np.uint8)]
)
def test_empty_batch(detector: Detector, batch: Any) -> None:
    assert detector.detect(batch) == []


def test_array_of_images(detector: Detector, paths: list[Path]) -> None:
    array = read_image(paths[0])
    pair = np.stack((array, array[:, ::-1]))
    expected = detector.detect([array, array[:, ::-1]])
    assert_same(detector.detect(pair), expected)
    assert_same(detector.detect(torch.from_numpy(pair).permute(0, 3, 1, 2)), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2)])
def test_odd_sizes(detector: Detector, size: tuple[int, int]) -> None:
    for mode in ("stretch", "letterbox"):
        other = Detector(detector.engine, resize=mode, confidence=0.01)
        (found,) = other.detect(np.zeros((*size, 3), np.uint8))
        assert found.image_size == size


def test_nothing_found(detector: Detector, paths: list[Path]) -> None:
    (found,) = Detector(detector.engine, confidence=1.0).detect(paths[0])
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


def test_thresholds_and_limits(engine: Engine, paths: list[Path]) -> None:
    everything = Detector(engine, confidence=0.05, iou=1.0).detect(paths[0])[0]
    usual = Detector(engine, confidence=0.05).detect(paths[0])[0]
    plain_iou = Detector(engine, confidence=0.05, beta=None).detect(paths[0])[0]
    confident = Detector(engine, confidence=0.5).detect(paths[0])[0]
    top = Detector(engine, max_detections=3).detect(paths[0])[0]
    assert len(everything) > len(usual) > len(plain_iou) > len(confident) > 0
    np.testing.assert_array_equal(confident.scores, usual.scores[usual.scores > 0.5])
    np.testing.assert_array_equal(top.boxes, usual.boxes[:3])


def test_takes_its_defaults_from_the_file(mini, tmp_path: Path, paths: list[Path]) -> None:
    path = tmp_path / "mini.engine"
    build_engine(*mini, engine="torch", confidence=0.4, iou=0.3, resize="letterbox", path=path)
    detector = Detector(path)
    assert (detector.confidence, detector.iou, detector.resize) == (0.4, 0.3, "letterbox")
    assert detector.beta == 0.6
    assert_same(
        detector.detect(paths),
        Detector(str(path), confidence=0.4, iou=0.3, resize="letterbox").detect(paths),
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"confidence": 2.0}, "confidence 2.0: it must lie in 0..1"),
        ({"confidence": float("nan")}, "confidence nan"),
        ({"iou": -0.1}, "iou -0.1"),
        ({"resize": "crop"}, "resize 'crop' is not one of stretch, letterbox"),
        ({"max_detections": -1}, "max_detections -1"),
        ({"beta": -1.0}, "beta -1.0"),
    ],
)
def test_refuses_settings(engine: Engine, settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Detector(engine, **settings)


def test_no_engine_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such engine file"):
        Detector(tmp_path / "none.engine")
    (tmp_path / "x.engine").write_bytes(b"x")
    with pytest.raises(EngineFileError, match="is not an engine file"):
        Detector(tmp_path / "x.engine")


def test_names_the_bad_image(detector: Detector, paths: list[Path], tmp_path: Path) -> None:
    good = read_image(paths[0])
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for bad, error, says in (
        (good / 255, ValueError, r"image 2 of the batch is a numpy array \[320, 320, 3\] float64"),
        (torch.from_numpy(good), ValueError, r"image 2 of the batch is a tensor \[320, 320, 3\]"),
        (empty, ValueError, r"image 2 of the batch: .*empty\.jpg is not a readable image"),
        (tmp_path / "none.jpg", FileNotFoundError, r"image 2 of the batch: no such .*none\.jpg"),
    ):
        with pytest.raises(error, match=says):
            detector.detect([good, paths[0], bad])


@pytest.mark.parametrize("batch", [None, 3, b"abc", {"a": 1}])
def test_refuses_what_is_no_batch(detector: Detector, batch: Any) -> None:
    with pytest.raises(ValueError, match="a batch cannot be a"):
        detector.detect(batch)


def test_threads_share_a_detector(detector: Detector, paths: list[Path]) -> None:
    expected = detector.detect(paths)

    def detect(number: int) -> None:
        index = number % 3
        assert_same(detector.detect(paths[index]), [expected[index]], 1e-5)
        if number % 4 == 0:
            assert_same(detector.detect(paths), expected, 1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(detect, range(24)))


def test_stages_are_what_detect_runs(detector: Detector, paths: list[Path]) -> None:
    images = [torch.from_numpy(read_image(path)) for path in paths[:2]]
    batch = detector.preprocess(images)
    assert batch.images.shape == (2, 3, 128, 160)
    candidates = detector.decode(detector.engine.run(batch.images), batch.placement)
    found = detector.collect(candidates, *detector.suppress(candidates), batch.sizes)
    assert_same(found, detector.detect(paths[:2]))


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow(detector: Detector, paths: list[Path]) -> None:
    images = [read_image(path) for path in paths]
    images += [np.resize(images[0], (100 + 30 * n, 90 + 40 * n, 3)) for n in range(5)]

    def detect(count: int) -> None:
        for number in range(count):
            detector.detect(images[number % len(images)])

    detect(200)  # buffers of every size have been needed once
    before = resident_megabytes()
    detect(1000)
    # Leaking no more than the 80 kB of maps each time would make 80 MB.
    assert resident_megabytes() - before < 16
