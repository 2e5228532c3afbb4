"""Builds against the double of TensorRT that fail: each is one clear error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trt_behaviour
from trt_double import Double
from trt_models import build

from yolov4_fast.engines.engine import DeviceError, EngineError


def test_parser_errors_name_the_nodes(trt_double: Double) -> None:
    def parse(double: Double, on: Any, model: bytes, path: str | None) -> bool:
        add = trt_behaviour.add_parser_error
        add(double, on, desc="no importer\nfor it", node_name="layer_7.conv", node_operator="Foo",
            code="UNSUPPORTED_NODE")  # fmt: skip
        for number in range(7):
            add(double, on, desc="bad", node=number)
        add(double, on, desc="bad", node=6)  # the same once more
        return False

    trt_double.script["OnnxParser.parse"] = parse
    with pytest.raises(EngineError) as caught:
        build()
    text = str(caught.value)
    assert text.startswith(f"TensorRT {trt_double.module.__version__} cannot read the ONNX: ")
    assert "layer_7.conv (Foo): no importer for it [UNSUPPORTED_NODE]; node 0: bad" in text
    assert "node 3" in text and "node 4" not in text and text.endswith("; and 3 more")
    assert "Builder.create_builder_config" not in trt_double.names()


def test_what_is_no_onnx(trt_double: Double) -> None:
    with pytest.raises(EngineError, match=r"the model: Failed to parse the ONNX model\. \[INVALID"):
        build(b"not an ONNX")


def failing(message: str) -> Any:
    def build_nothing(double: Double, on: Any, **_: Any) -> None:
        double.log(on.state["logger"], "INTERNAL_ERROR", f"{message}\n")
        double.log(on.state["logger"], "ERROR", "and so it went")
        double.log(on.state["logger"], "WARNING", "nothing to worry about")

    return build_nothing


def test_no_plan_tells_why(trt_double: Double) -> None:
    name = "Builder.build_serialized_network"
    trt_double.script[name] = failing("no implementation for layer_7.conv")
    with pytest.raises(EngineError) as caught:
        build()
    assert str(caught.value) == (
        "TensorRT built no plan: no implementation for layer_7.conv; and so it went"
    )
    trt_double.script[name] = None
    with pytest.raises(EngineError, match=r"^TensorRT built no plan: no reason given$"):
        build()


@pytest.mark.parametrize(
    "message",
    [
        "Error Code 1: Cuda Runtime (out of memory)",
        "OutOfMemory (no further information)",
        "There may not be enough free memory for allocation to succeed",
        "no implementation for conv due to insufficient workspace",
        "Device memory is insufficient to use tactic",
    ],
)
def test_too_little_memory(trt_double: Double, message: str) -> None:
    trt_double.script["Builder.build_serialized_network"] = failing(message)
    with pytest.raises(EngineError, match=r"memory did not suffice .*smaller max_batch, with"):
        build()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("std::bad_alloc"), "memory did not suffice for TensorRT"),
        (RuntimeError("it broke"), "TensorRT built no plan: no reason given; it broke"),
    ],
)
def test_exceptions_of_the_bindings(trt_double: Double, error: Exception, message: str) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise error

    trt_double.script["Builder.build_serialized_network"] = raising
    with pytest.raises(EngineError, match=message):
        build()


def test_no_gpu(trt_double: Double) -> None:
    def refuse(double: Double, on: Any, logger: Any) -> None:
        double.log(logger, "ERROR", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt_double.script["Builder.__init__"] = refuse
    with pytest.raises(DeviceError, match=r"failure with error: 35\): it needs an NVIDIA GPU"):
        build()


def test_plugins_that_cannot_be_had(trt_double: Double, tmp_path: Path) -> None:
    library = tmp_path / "libours.so"
    with pytest.raises(EngineError, match="there is no such plugin library"):
        build(plugins=[library])
    library.touch()
    trt_double.script["IPluginRegistry.load_library"] = None
    with pytest.raises(EngineError, match=r"libours\.so: TensorRT cannot load it as a plugin"):
        build(plugins=[library])


def test_dla(trt_double: Double) -> None:
    with pytest.raises(DeviceError, match=r"there is no DLA core 0: .* finds 0 here"):
        build(dla=0)
    trt_double.script["Builder.num_DLA_cores"] = 1
    with pytest.raises(EngineError, match=r"a DLA runs one shape, .*: give min_batch 4"):
        build(dla=0)


def test_compatibility_that_the_version_lacks(
    trt_double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = trt_double.module.HardwareCompatibilityLevel
    monkeypatch.delattr(levels, "SAME_COMPUTE_CAPABILITY")
    with pytest.raises(EngineError, match=r"TensorRT 1[\d.]+ has no hardware compatibility 'same"):
        build(hardware_compatible="same-sm")


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"needs TensorRT: pip install tensorrt$"):
        build()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "needs TensorRT: pip install"),  # a folder that happens to be called so
        ("__version__ = '10.12.0.36'", r"TensorRT 10\.12\.0\.36 is too old: .* 10\.13 or newer"),
        ("__version__ = '8.6.1.post1'", r"TensorRT 8\.6\.1\.post1 is too old"),
        (
            "raise ImportError('libnvinfer.so.10:\\n cannot open shared object file')",
            r"cannot be loaded \(libnvinfer\.so\.10: cannot open shared object file\): its lib",
        ),
    ],
)
def test_unusable(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    try:
        with pytest.raises(EngineError, match=message):
            build()
    finally:
        sys.modules.pop("tensorrt", None)
