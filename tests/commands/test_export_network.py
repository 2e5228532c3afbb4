"""`yolov4-fast export`: the flags of the ONNX, and a repository for Triton Inference Server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from yolov4_fast.cli import main

MODEL = ["export", "mini.safetensors"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_flags_of_onnx(files: Any, tmp_path: Path) -> None:
    output, facts = tmp_path / "m.onnx", tmp_path / "facts.json"
    words = [*MODEL, "--format", "onnx", "-o", str(output), "--json", str(facts)]
    assert main([*words, "--precision", "bf16", "--dynamic-size", "--uint8"]) == 0
    model = onnx.load(output)
    (image,) = model.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
    assert shape == ["N", "H", "W", 3]
    weights = [value for value in model.graph.initializer if value.name.endswith(".weight")]
    assert {value.data_type for value in weights} == {onnx.TensorProto.BFLOAT16}
    found = read(facts)
    assert found["files"] == [str(output)] and found["format"] == "onnx"
    assert (found["precision"], found["opset"]) == ("bf16", 22)
    assert (found["inputs"], found["outputs"]) == (["images"], ["map_16", "map_8"])


def test_nms_in_the_graph(files: Any, tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    words = [*MODEL, "--format", "onnx", "-o", str(output), "--with-nms", "--iou", "0.6"]
    assert main([*words, "--confidence", "0.1", "--max-detections", "7"]) == 0
    *_, node = onnx.load(output).graph.node
    values = {
        attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute
    }
    assert values["confidence"] == pytest.approx(0.1) and values["iou"] == pytest.approx(0.6)
    assert values["max_detections"] == 7
    assert values["beta"] == pytest.approx(0.6)  # greedynms of mini.cfg


def test_a_repository_for_the_server(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, facts = tmp_path / "models", tmp_path / "facts.json"
    words = [*MODEL, "--triton-repository", str(folder), "--json", str(facts)]
    assert main([*words, "--precision", "fp16", "--confidence", "0.3", "--max-batch", "3"]) == 0
    detector, network = folder / "mini", folder / "mini_network"
    assert "max_batch_size: 3" in (detector / "config.pbtxt").read_text()
    assert (
        'key: "confidence" value { string_value: "0.3" }' in (detector / "config.pbtxt").read_text()
    )
    assert 'backend: "onnxruntime"' in (network / "config.pbtxt").read_text()
    model = onnx.load(network / "1" / "model.onnx")
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT16
    found = read(facts)
    assert (found["model"], found["network"], found["backend"]) == (
        "mini", "mini_network", "onnxruntime",
    )  # fmt: skip
    assert sorted(found["files"]) == sorted(str(p) for p in folder.rglob("*") if p.is_file())
    out = capsys.readouterr().out
    assert all(name in out for name in found["files"])
    assert main(words) == 2
    assert "mini_network: is there already" in capsys.readouterr().err
    other = ["--model-name", "other", "--backend", "openvino", "--resize", "letterbox"]
    assert main([*words, *other, "--precision", "bf16"]) == 0
    assert 'backend: "openvino"' in (folder / "other_network" / "config.pbtxt").read_text()
    assert '"letterbox"' in (folder / "other" / "config.pbtxt").read_text()


def test_a_plan_for_the_server(files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands in for the plan: tests/engines/trt has how one is built."""

    def write_plan(model: Any, path: Path, arguments: Any, detect: Any) -> dict[str, Any]:
        assert (arguments.precision, arguments.max_batch) == ("fp16", 8)
        assert (detect.confidence, detect.iou, detect.max_detections) == (0.25, 0.45, 9)
        path.write_bytes(b"plan")
        return {}

    monkeypatch.setattr("yolov4_fast.commands.export_plan.write_plan", write_plan)
    words = [*MODEL, "--triton-repository", str(tmp_path), "--format", "tensorrt", "--with-nms"]
    assert main([*words, "--max-detections", "9"]) == 0
    config = (tmp_path / "mini_network" / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"' in config and "KIND_GPU" in config and "dims: [ 9, 4 ]" in config
    assert (tmp_path / "mini_network" / "1" / "model.plan").read_bytes() == b"plan"


def test_an_absent_tensorrt_leaves_nothing(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for words in (["-o", str(tmp_path / "m.plan")], ["--triton-repository", str(tmp_path / "r")]):
        assert main([*MODEL, "--format", "tensorrt", *words]) == 2
        assert "needs TensorRT: pip install tensorrt" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "x.onnx"], "--format is needed, one of onnx, tensorrt, darknet, safetensors"),
        (["--format", "onnx"], "-o is needed, or --triton-repository"),
        (["--format", "darknet", "-o", "x.cfg", "--precision", "fp16"],
         "--precision goes with --format onnx or tensorrt"),
        (["--format", "safetensors", "-o", "x.safetensors", "--uint8"],
         "--uint8 goes with --format onnx"),
        (["--format", "onnx", "-o", "x.onnx", "--iou", "0.5"],
         "--iou goes with --with-nms or --triton-repository"),
        (["--format", "onnx", "-o", "x.onnx", "--iou", "0"],
         "--iou goes with --with-nms or --triton-repository"),
        (["--format", "onnx", "-o", "x.onnx", "--dla", "0"], "--dla goes with --format tensorrt"),
        (["--format", "onnx", "-o", "x.onnx", "--max-batch", "4"],
         "--max-batch goes with --format tensorrt or --triton-repository"),
        (["--format", "onnx", "-o", "x.onnx", "--model-name", "x"],
         "--model-name goes with --triton-repository"),
        (["--triton-repository", "new", "-o", "x.onnx"], "give one of the two"),
        (["--triton-repository", "new", "--format", "darknet"], "goes with --format onnx"),
        (["--triton-repository", "new", "--dynamic-size"], "of one size"),
        (["--triton-repository", "new", "--format", "tensorrt", "--with-decode"], "raw maps or"),
        (["--triton-repository", "new", "--format", "tensorrt", "--min-batch", "2"], "be 1"),
        (["--triton-repository", "new", "--format", "tensorrt", "--backend", "openvino"],
         "--backend goes with --format onnx"),
        (["--format", "onnx", "-o", "x.onnx", "--workspace", "9"],
         "--workspace goes with --format tensorrt"),
        (["--triton-repository", "mini.cfg"], "mini.cfg: is a file, not a folder"),
        (["--triton-repository", "new", "--precision", "bf16"], "no bfloat16 convolution"),
        (["--triton-repository", "new", "--with-nms"], "onnxruntime cannot run NMS"),
        (["--triton-repository", "new", "--model-name", "../x"], "model name '../x'"),
        (["--format", "onnx", "-o", "x.onnx", "--with-nms", "--max-detections", "5000"],
         "max_detections 5000: a plan reports 1 to 4096"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(
    refused: Callable[..., str], words: list[str], says: str
) -> None:
    assert says in refused(*MODEL, *words)
