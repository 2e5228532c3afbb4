"""The model.py of a Triton Inference Server repository, run with a stand-in for the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from triton_server import Response, Server, Value, served, start, write

from yolov4_fast import Detections, Detector, build_engine
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.tensorrt.plugins import OUTPUTS, DetectionOutputs
from yolov4_fast.sources import read_image

NAMES = ("square.png", "tall.png", "wide.png")


def session(mini: Any) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        export_onnx(mini.network, mini.state).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )


@pytest.fixture
def detector(mini: Any) -> Iterator[Detector]:
    with build_engine(
        *mini, engine="torch", precision="f32", resize="letterbox", confidence=0.3, iou=0.5
    ) as engine:
        yield Detector(engine, max_detections=300)


@pytest.fixture
def server(mini: Any) -> Server:
    return Server(session(mini))


@pytest.fixture
def model(mini: Any, tmp_path: Path, server: Server) -> Any:
    folder, _ = write(mini, tmp_path, served(mini))
    return start(folder, server)


def encoded(*paths: Path) -> dict[str, Value]:
    contents = np.array([path.read_bytes() for path in paths], np.object_)
    return {"image_bytes": Value("image_bytes", contents.reshape(-1, 1))}


def arrays(*images: np.ndarray) -> dict[str, Value]:
    return {"image": Value("image", np.stack(images))}


def assert_found(response: Response, row: int, expected: Detections, atol: float = 1e-2) -> None:
    """A row of the response is what the detector finds, and nothing after it."""
    assert not response.has_error() and [v.name() for v in response.output_tensors] == [*OUTPUTS]
    count, boxes, scores, classes = (value.array for value in response.output_tensors)
    assert (count.dtype, boxes.dtype, scores.dtype, classes.dtype) == (
        np.int32, np.float32, np.float32, np.int32,
    )  # fmt: skip
    assert boxes.shape[1:] == (scores.shape[1], 4) and scores.shape == classes.shape
    n = len(expected)
    assert count.shape[1:] == (1,) and count[row, 0] == n
    np.testing.assert_allclose(boxes[row, :n], expected.boxes, atol=atol)
    np.testing.assert_allclose(scores[row, :n], expected.scores, atol=1e-4)
    np.testing.assert_array_equal(classes[row, :n], expected.class_ids)
    assert not boxes[row, n:].any() and not scores[row, n:].any()
    assert (classes[row, n:] == -1).all()


def test_pictures_of_any_size_give_what_the_detector_finds(
    model: Any, server: Server, detector: Detector, darknet_reference: Path
) -> None:
    paths = [darknet_reference / name for name in NAMES]
    expected = detector.detect(paths)
    assert min(map(len, expected)) > 0
    square, tall = (read_image(path) for path in paths[:2])
    responses = model.execute([encoded(paths[2], paths[0]), arrays(square), arrays(tall)])
    assert server.batches == [4]  # one batch of all
    assert_found(responses[0], 0, expected[2])
    assert_found(responses[0], 1, expected[0])
    assert_found(responses[1], 0, expected[0])
    assert_found(responses[2], 0, expected[1])


def test_a_picture_with_nothing_in_it(model: Any) -> None:
    model.confidence = 1.0
    (response,) = model.execute([arrays(np.zeros((40, 30, 3), np.uint8))])
    shapes = [value.array.shape for value in response.output_tensors]
    assert shapes == [(1, 1), (1, 1, 4), (1, 1), (1, 1)]
    assert response.output_tensors[0].array[0, 0] == 0
    assert response.output_tensors[3].array[0, 0] == -1


def test_a_bad_request_fails_alone(
    model: Any, server: Server, detector: Detector, darknet_reference: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    good = darknet_reference / NAMES[0]
    grey = {"image": Value("image", np.zeros((1, 8, 8, 1), np.uint8))}
    both = encoded(good) | arrays(read_image(good))
    requests = [encoded(good), encoded(good, broken), grey, both, {}]
    fine, *failed = model.execute(requests)
    assert_found(fine, 0, detector.detect(good)[0])
    messages = [response.error().message() for response in failed]
    assert messages[0] == "picture 1 is not a readable image: its content cannot be decoded"
    assert "picture 0 is a numpy array [8, 8, 1] uint8" in messages[1]
    assert messages[2:] == ["a request brings either image_bytes or image, and not both"] * 2
    assert server.batches == [1]
    assert all(response.has_error() for response in model.execute([{}]))
    assert server.batches == [1]  # the network was not asked


def test_a_failing_network_fails_its_requests(model: Any, server: Server) -> None:
    server.fails = True
    responses = model.execute([arrays(np.zeros((9, 9, 3), np.uint8)), {}])
    messages = [response.error().message() for response in responses]
    assert messages[0] == "mini_network: out of memory"
    assert "either image_bytes or image" in messages[1]


def test_a_plan_with_nms_gives_the_same(
    mini: Any, tmp_path: Path, detector: Detector, darknet_reference: Path
) -> None:
    """The plugin is stood in for by our own decode and NMS, relative to the network's input."""
    detect = DetectionOutputs(
        confidence=0.3, iou=0.5, beta=mini.network.nms_beta, max_detections=300
    )

    def plugin(maps: list[np.ndarray]) -> list[np.ndarray]:
        candidates = detector.decode(tuple(map(torch.from_numpy, maps)), None)
        keep, kept = detector.suppress(candidates)
        boxes = np.zeros((len(keep), 300, 4), np.float32)
        scores, classes = np.zeros((len(keep), 300), np.float32), np.full((len(keep), 300), -1)
        for row, count in enumerate(kept.tolist()):
            chosen = keep[row, :count]
            boxes[row, :count] = candidates.boxes[row, chosen]
            scores[row, :count] = candidates.scores[row, chosen]
            classes[row, :count] = candidates.class_ids[row, chosen]
        return [kept.numpy()[:, None].copy(), boxes, scores, classes.astype(np.int32)]

    folder, _ = write(mini, tmp_path, served(mini, "tensorrt", detect=detect))
    model = start(folder, Server(session(mini), plugin))
    for name in NAMES:
        (response,) = model.execute([encoded(darknet_reference / name)])
        (found,) = found_in_input(detector, darknet_reference / name)
        assert_found(response, 0, found)


def found_in_input(detector: Detector, path: Path) -> list[Detections]:
    """As the plugin sees it: NMS before the letterbox is undone, where DIoU measures otherwise."""
    batch = detector.preprocess([torch.from_numpy(read_image(path))])
    maps = detector.engine.run(batch.images)
    keep, kept = detector.suppress(detector.decode(maps, None))
    return detector.collect(detector.decode(maps, batch.placement), keep, kept, batch.sizes)


def test_jpeg_and_png_are_read_upright_and_in_colour(
    model: Any, detector: Detector, darknet_reference: Path, tmp_path: Path
) -> None:
    picture = cv2.imread(str(darknet_reference / NAMES[2]))
    cv2.imwrite(str(tmp_path / "x.jpg"), picture)
    (response,) = model.execute([encoded(tmp_path / "x.jpg")])
    assert_found(response, 0, detector.detect(tmp_path / "x.jpg")[0])
