"""`export --format tensorrt` over the double of TensorRT."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from trt_double import Double

from yolov4_fast.commands import export_plan
from yolov4_fast.commands.arguments import share
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt import aot_decode, plugins
from yolov4_fast.engines.tensorrt.plugins import DetectionOutputs
from yolov4_fast.model import Model
from yolov4_fast.network.layers import NetworkError


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = SimpleNamespace(
        properties=SimpleNamespace(name="NVIDIA H200", sm=90), active=nullcontext
    )
    monkeypatch.setattr("yolov4_fast.engines.cuda.device.open_device", lambda *_: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(mini: Any) -> Model:
    return SimpleNamespace(network=mini.network, state=mini.state, class_names=mini.class_names)


def arguments(*flags: str) -> argparse.Namespace:
    """As the command `export` has them; export.py adds the first ones."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="tensorrt")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--max-batch", type=int, default=4)
    parser.add_argument("--confidence", type=share, default=0.3)
    for flag in ("--with-nms", "--dynamic-size", "--uint8"):
        parser.add_argument(flag, action="store_true")
    export_plan.add_flags(parser)
    return parser.parse_args(flags)


def test_raw_maps(trt_double: Double, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    facts = export_plan.write_plan(model, path, arguments("--min-batch", "2"), None)
    assert path.read_bytes().startswith(b"double of a plan:")
    assert facts["outputs"] == [f"map_{head.stride}" for head in model.network.heads]
    assert facts["precision"] == "fp16" and facts["plugins"] == []
    assert facts["plan"]["max_batch"] == 4 and facts["plan"]["options"]["min_batch"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["model.plan"]


def test_with_nms_loads_the_plugin(
    trt_double: Double, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "plugin.so"
    library.touch()
    asked: list[int] = []
    monkeypatch.setattr(plugins, "plugin_library", lambda major: asked.append(major) or library)
    trt_double.script["IPluginRegistry.load_library"] = object()
    path = tmp_path / "model.plan"
    facts = export_plan.write_plan(model, path, arguments("--with-nms"), DetectionOutputs())
    assert asked == [int(trt_double.major)]
    loaded = trt_double.arguments("IPluginRegistry.load_library")
    assert loaded == [{"plugin_path": str(library)}]
    assert facts["outputs"] == list(plugins.OUTPUTS)
    assert facts["plugins"] == [str(library)] and path.is_file()


def test_without_the_plugin_nothing_is_written(
    trt_double: Double, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(major: int) -> Path:
        return original(major, tmp_path)

    original = plugins.plugin_library
    monkeypatch.setattr(plugins, "plugin_library", missing)
    path = tmp_path / "model.plan"
    with pytest.raises(EngineError, match="plugin YoloV4Detect was not built for TensorRT 1"):
        export_plan.write_plan(model, path, arguments("--with-nms"), DetectionOutputs())
    assert not path.exists() and not trt_double.calls


@pytest.mark.parametrize(
    ("flags", "sm"), [((), 90), (("--hardware-compatible", "ampere-plus"), 80)]
)
def test_with_decode_changes_the_network(
    trt_double: Double,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    sm: int,
) -> None:
    asked: list[int] = []

    def decode(raw: Any, **attributes: Any) -> Any:
        asked.append(int(attributes["integers"][-1]))
        return lambda: None

    plugin = ModuleType("tensorrt.plugin")
    vars(plugin)["op"] = SimpleNamespace(yolov4_fast=SimpleNamespace(decode=decode))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    trt_double.script |= {
        "INetworkDefinition.add_plugin": lambda double, on, func, aot: double.make(
            "IPluginV3Layer", outputs=[]
        ),
        "INetworkDefinition.add_concatenation": lambda double, on, inputs: double.make(
            "IConcatenationLayer"
        ),
        "ILayer.get_output": lambda double, on, index: double.make("ITensor"),
    }
    path = tmp_path / "model.plan"
    facts = export_plan.write_plan(model, path, arguments("--with-decode", *flags), None)
    assert facts["outputs"] == list(aot_decode.OUTPUTS)
    assert asked == [sm] * len(model.network.heads)


def test_a_build_that_fails_leaves_nothing(
    trt_double: Double, model: Model, tmp_path: Path
) -> None:
    trt_double.script["Builder.build_serialized_network"] = None
    path = tmp_path / "model.plan"
    with pytest.raises(EngineError):
        export_plan.write_plan(model, path, arguments(), None)
    assert not path.exists()


@pytest.mark.parametrize("sizes", [(100, 128, 160), (64, 100, 160), (64, 96, 100)])
def test_sizes_are_the_networks(
    trt_double: Double, model: Model, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    names = ("--min-size", "--opt-size", "--max-size")
    flags = [word for name, size in zip(names, sizes, strict=True) for word in (name, str(size))]
    path = tmp_path / "model.plan"
    with pytest.raises(NetworkError, match="100x100 does not fit: both sides must be multiples of"):
        export_plan.write_plan(model, path, arguments("--dynamic-size", *flags), None)
    assert not path.exists() and not trt_double.calls


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "onnx", "--dla", "0"), "--dla goes with --format tensorrt"),
        (("--format", "onnx", "--with-decode"), "--with-decode goes with --format tensorrt"),
        (("--format", "onnx", "--min-batch", "2"), "--min-batch goes with --format tensorrt"),
        (("--format", "darknet", "--device", "cuda:1"), "--device goes with --format tensorrt"),
        (("--with-decode", "--with-nms"), "give one of the two"),
        (("--dynamic-size",), "go together"),
        (("--min-size", "320", "--opt-size", "416", "--max-size", "608"), "go together"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_plan.check_flags(arguments(*flags))


def test_flags_that_do() -> None:
    sizes = ("--min-size", "320", "--opt-size", "416", "--max-size", "608")
    for flags in ((), ("--with-decode",), ("--dynamic-size", *sizes), ("--format", "onnx")):
        export_plan.check_flags(arguments(*flags))
