"""The model repository for Triton Inference Server: its layout and configurations against the
server's own schema and the ONNX in it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from triton_server import parse, schema, served, write

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.tensorrt.plugins import OUTPUTS, DetectionOutputs
from yolov4_fast.engines.triton_repository import BACKENDS, Backend, write_repository

ONNX_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT32: "TYPE_INT32"}


def tensors(values: Any) -> dict[str, tuple[str, list[int]]]:
    return {
        value.name: (schema().DataType.Name(value.data_type), [*value.dims]) for value in values
    }


def of_onnx(values: Any) -> dict[str, tuple[str, list[int]]]:
    """Types and shapes without the batch, which must be free."""
    found = {}
    for value in values:
        batch, *dims = value.type.tensor_type.shape.dim
        assert batch.dim_param == "N"
        kind = ONNX_TYPES[value.type.tensor_type.elem_type]
        found[value.name] = (kind, [dim.dim_value for dim in dims])
    return found


@pytest.mark.parametrize(
    ("backend", "nms"), [*((backend, False) for backend in BACKENDS), ("tensorrt", True)]
)
def test_the_layout_is_the_servers(mini: Any, tmp_path: Path, backend: Backend, nms: bool) -> None:
    detect = DetectionOutputs(max_detections=20) if nms else None
    model = served(mini, backend, detect=detect)
    detector, network = write(mini, tmp_path / "models", model)
    assert (detector.name, network.name) == ("mini", "mini_network")
    file = {"tensorrt": "model.plan"}.get(backend, "model.onnx")
    found = {str(path.relative_to(tmp_path / "models")) for path in tmp_path.rglob("*.*")}
    assert found == {
        "mini/config.pbtxt", "mini/labels.txt", "mini/1/model.py", "mini/1/network.cfg",
        "mini_network/config.pbtxt", f"mini_network/1/{file}",
    }  # fmt: skip
    config = parse(network)
    assert (config.name, config.backend, config.platform) == ("mini_network", backend, "")
    assert (config.default_model_filename, config.max_batch_size) == (file, 4)
    assert config.HasField("dynamic_batching")
    graph = onnx.load_from_string((network / "1" / file).read_bytes()).graph
    assert tensors(config.input) == of_onnx(graph.input)
    assert tensors(config.output) == of_onnx(graph.output)
    assert list(tensors(config.output)) == [value.name for value in graph.output]
    (group,) = config.instance_group
    kind = schema().ModelInstanceGroup.Kind.Name(group.kind)
    places = {"onnxruntime": "KIND_AUTO", "openvino": "KIND_CPU", "tensorrt": "KIND_GPU"}
    assert (kind, group.count) == (places[backend], 1)
    padding = {"ENABLE_BATCH_PADDING": "YES"} if backend == "openvino" else {}
    assert {key: value.string_value for key, value in config.parameters.items()} == padding


@pytest.mark.parametrize("nms", [False, True])
def test_the_detector_is_configured_for_its_model_py(mini: Any, tmp_path: Path, nms: bool) -> None:
    detect = DetectionOutputs() if nms else None
    model = served(mini, "tensorrt" if nms else "openvino", detect=detect)
    folder, _ = write(mini, tmp_path, model)
    config = parse(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("mini", "python", 4)
    assert config.HasField("dynamic_batching")
    assert tensors(config.input) == {
        "image_bytes": ("TYPE_STRING", [1]), "image": ("TYPE_UINT8", [-1, -1, 3]),
    }  # fmt: skip
    assert all(value.optional for value in config.input)
    assert [value.allow_ragged_batch for value in config.input] == [False, True]
    assert tensors(config.output) == {
        "num_detections": ("TYPE_INT32", [1]),
        "detection_boxes": ("TYPE_FP32", [-1, 4]),
        "detection_scores": ("TYPE_FP32", [-1]),
        "detection_classes": ("TYPE_INT32", [-1]),
    }
    values = {key: value.string_value for key, value in config.parameters.items()}
    assert values["network_outputs"].split() == list(OUTPUTS if nms else ("map_16", "map_8"))
    assert values["network_has_nms"] == ("yes" if nms else "no")
    assert values.get("confidence") == (None if nms else "0.3")
    assert (folder / "labels.txt").read_text().split() == list(mini.class_names)


@pytest.mark.parametrize("taken", ["mini", "mini_network"])
def test_what_is_there_stays(mini: Any, tmp_path: Path, taken: str) -> None:
    (tmp_path / taken / "1").mkdir(parents=True)
    (tmp_path / taken / "1" / "model.onnx").write_text("another")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EngineError, match=f"{taken}: is there already"):
        write(mini, tmp_path, served(mini))
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_half_written(
    mini: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> None:
        path.write_text("half")
        raise EngineError("the plan could not be built")

    for folder in (tmp_path / "new" / "models", tmp_path):
        with pytest.raises(EngineError, match="could not be built"):
            write_repository(folder, served(mini), stop)
        assert [path.name for path in tmp_path.rglob("*")] in (["new"], [])

    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if target.name == "mini":
            raise OSError(28, "No space left on device", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write(mini, tmp_path, served(mini))
    assert [path.name for path in tmp_path.rglob("*")] in (["new"], [])


def test_other_models_in_the_repository_stay(mini: Any, tmp_path: Path) -> None:
    write(mini, tmp_path, served(mini))
    write(mini, tmp_path, served(mini, name="second"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mini", "mini_network", "second", "second_network"]


def test_two_may_write_at_once(mini: Any, tmp_path: Path) -> None:
    """Also with the same process number, as two containers over one folder may have it."""

    def meanwhile(path: Path) -> None:
        write(mini, tmp_path, served(mini, name="second"))
        path.write_bytes(b"network")

    write_repository(tmp_path, served(mini), meanwhile)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mini", "mini_network", "second", "second_network"]
    assert (tmp_path / "mini_network" / "1" / "model.onnx").read_bytes() == b"network"


def test_wrong_wishes_are_refused(mini: Any) -> None:
    with pytest.raises(EngineError, match=r"model name 'a b': letters"):
        served(mini, name="a b")
    with pytest.raises(EngineError, match="no backend 'tvm'; there are onnxruntime, openvino"):
        replace(served(mini), backend="tvm")
    with pytest.raises(EngineError, match="ONNX Runtime has no bfloat16 convolution"):
        served(mini, precision="bf16")
    served(mini, "openvino", precision="bf16")
    with pytest.raises(EngineError, match="the backend openvino cannot run NMS"):
        served(mini, "openvino", detect=DetectionOutputs())


def test_onnxruntime_has_no_bfloat16_convolution(mini: Any) -> None:
    """Else the refusal above would be out of date."""
    model = export_onnx(mini.network, mini.state, precision="bf16").SerializeToString()
    with pytest.raises(Exception, match="Could not find an implementation for Conv"):
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
