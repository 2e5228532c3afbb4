"""INT8 as users meet it: the OpenVINO engine of precision int8, of the sample model and others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_network import CLASSES, pictures, small_network, small_state

from benchmarks.agreement import agreement
from benchmarks.quantization import OnnxRuntimeEngine
from yolov4_fast import Detector, build_engine, load_engine
from yolov4_fast.commands import calibration_options
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.openvino_engine import MODEL, OpenVinoEngine
from yolov4_fast.engines.quantize import METHODS, quantize
from yolov4_fast.model import open_model
from yolov4_fast.ops.resize import resize
from yolov4_fast.sources import read_image

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


def frames(count: int) -> list[torch.Tensor]:
    """Pictures as a user has them, [H, W, 3] uint8 of other sizes than the input."""
    return [(255 * image[0].permute(1, 2, 0)).to(torch.uint8) for image in pictures(count, 96, 120)]


def test_built_written_and_read(tmp_path: Path) -> None:
    network = small_network()
    path = tmp_path / "small.engine"
    settings = {"engine": "openvino", "precision": "int8", "max_batch": 3, "path": path}
    built = build_engine(network, small_state(network), CLASSES, calibration=frames(3), **settings)
    loaded = load_engine(path)
    assert built.precision == loaded.precision == "int8"
    images = torch.cat(pictures(3))
    for ours, theirs in zip(built.run(images), loaded.run(images), strict=True):
        assert torch.equal(ours, theirs)
    alone = torch.cat([built.run(images[i : i + 1])[0] for i in range(3)])
    assert (alone - built.run(images)[0]).abs().max() < 0.1 * alone.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_near_float32(method: str) -> None:
    network, state = small_network(), small_state(small_network())
    exact = build_engine(network, state, CLASSES, engine="openvino", precision="f32")
    rounded = build_engine(
        network, state, CLASSES, engine="openvino", precision="int8", calibration=frames(2),
        calibration_method=method,
    )  # fmt: skip
    image = pictures(1)[0]
    (first,), (second,) = exact.run(image), rounded.run(image)
    error = float((first - second).norm() / first.norm())
    assert 1e-4 < error < 0.25


def test_no_picture_is_one_message_and_nothing_is_written(tmp_path: Path) -> None:
    network = small_network()
    path = tmp_path / "none.engine"
    with pytest.raises(EngineError, match="no calibration images: INT8 needs some to find its"):
        build_engine(
            network, small_state(network), CLASSES, engine="openvino", precision="int8",
            calibration=[], path=path,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    network = small_network()
    with pytest.raises(EngineError, match=r"pip install 'yolov4_fast\[int8\]'"):
        quantize(network, small_state(network), pictures(1), method="minmax", keep=())


def test_the_command_line_knows_the_methods() -> None:
    assert calibration_options.METHODS == METHODS


def test_the_sample_model_finds_the_same_in_onnxruntime_openvino_and_float32() -> None:
    model = open_model(str(SAMPLES / "shapes-nano.safetensors"))
    files = sorted((SAMPLES / "images").glob("*.jpg"))
    scenes = [read_image(path) for path in files]
    scenes += [scene[:, ::-1] for scene in scenes] + [scene[::-1] for scene in scenes]
    seen = [torch.from_numpy(scene) for scene in scenes[:4]]
    height, width = model.network.height, model.network.width
    images = [resize([each], height, width, "stretch") for each in seen]
    quantised = quantize(model.network, model.state, images, method="percentile", keep=())
    exact = build_engine(
        model.network, model.state, model.class_names, engine="openvino", precision="f32"
    )
    manifest = replace(exact.manifest, precision="int8")
    payload = {MODEL: quantised.model.SerializeToString()}
    ours, theirs, floats = (
        Detector(each, confidence=0.05).detect(scenes)
        for each in (
            OpenVinoEngine(manifest, payload),
            OnnxRuntimeEngine(manifest, payload),
            exact,
        )
    )
    same = agreement(theirs, ours, overlap=0.9)
    assert same.boxes > 60
    assert same.matched >= 0.98 * same.boxes, str(same)
    near = agreement(floats, ours, overlap=0.75)  # INT8 moves boxes more than a runtime does
    assert near.matched >= 0.95 * near.boxes, str(near)
