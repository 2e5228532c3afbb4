"""Builds against the double of TensorRT, of both versions: the calls in order, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trt_behaviour
from trt_double import VERSIONS, Double
from trt_models import build, pixels_onnx, small_onnx

from yolov4_fast.engines.engine import EngineError


def test_the_calls_in_order(trt_double: Double, tmp_path: Path) -> None:
    build(timing_cache=tmp_path / "times", workspace_mb=512, alter=lambda network: network.name)
    assert [name for name in trt_double.names() if not name.startswith(("ILogger", "ILayer"))] == [
        "Builder.__init__",
        "Builder.create_network",
        "OnnxParser.__init__",
        "OnnxParser.parse",
        "Builder.create_builder_config",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.profiling_verbosity=",
        "IBuilderConfig.clear_flag",
        "INetworkDefinition.get_input",
        "Builder.create_optimization_profile",
        "IOptimizationProfile.set_shape",
        "IBuilderConfig.add_optimization_profile",
        "IProgressMonitor.__init__",
        "IBuilderConfig.progress_monitor=",
        "IBuilderConfig.create_timing_cache",
        "IBuilderConfig.set_timing_cache",
        "Builder.build_serialized_network",
        "IBuilderConfig.get_timing_cache",
        "ITimingCache.serialize",
        *["INetworkDefinition.get_layer"] * 3,
    ]


def test_the_network_is_strongly_typed(trt_double: Double) -> None:
    """Its bit is another in each version: 2 in version 10, 1 in version 11."""
    build()
    (asked,) = trt_double.arguments("Builder.create_network")
    assert asked == {"flags": {"10": 2, "11": 1}[trt_double.major]}


def test_what_is_told_of_the_plan(trt_double: Double) -> None:
    built = build(min_batch=2, opt_batch=3)
    assert built.plan.startswith(trt_behaviour.PLAN) and type(built.plan) is bytes
    facts = json.loads(json.dumps(built.facts))
    options = facts.pop("options")
    assert facts == {
        "tensorrt": VERSIONS[trt_double.major],
        "gpu": "NVIDIA H200",
        "sm": 90,
        "max_batch": 4,
        "shapes": {"images": [[2, 3, 8, 8], [3, 3, 8, 8], [4, 3, 8, 8]]},
        "types": {"FLOAT": 1, "HALF": 2},
    }
    assert options["opt_batch"] == 3 and "timing_cache" not in options


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (small_onnx(), {}, [(1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8)]),
        (small_onnx(), {"min_batch": 4}, [(4, 3, 8, 8)] * 3),
        (
            small_onnx(("n", 3, "h", "w")),
            {"opt_batch": 2, "min_size": (32, 64), "opt_size": (96, 64), "max_size": (128, 256)},
            [(1, 3, 64, 32), (2, 3, 64, 96), (4, 3, 256, 128)],
        ),
        (
            small_onnx((4, 3, "h", "w")),
            {"min_size": (32, 32), "opt_size": (32, 32), "max_size": (64, 32)},
            [(4, 3, 32, 32), (4, 3, 32, 32), (4, 3, 32, 64)],
        ),
        (pixels_onnx(), {}, [(1, 8, 8, 3), (4, 8, 8, 3), (4, 8, 8, 3)]),
        (
            pixels_onnx(("n", "h", "w", 3)),
            {"min_size": (32, 64), "opt_size": (96, 64), "max_size": (128, 256)},
            [(1, 64, 32, 3), (4, 64, 96, 3), (4, 256, 128, 3)],
        ),
    ],
)
def test_the_shapes_of_the_profile(
    trt_double: Double, model: bytes, options: dict[str, Any], expected: list[tuple[int, ...]]
) -> None:
    build(model, **options)
    (asked,) = trt_double.arguments("IOptimizationProfile.set_shape")
    assert [asked[name] for name in ("min", "opt", "max")] == expected
    assert asked["input"] == "images"


def test_a_model_with_nothing_open_has_no_profile(trt_double: Double) -> None:
    assert build(small_onnx((4, 3, 8, 8))).facts["shapes"] == {}
    assert "Builder.create_optimization_profile" not in trt_double.names()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (small_onnx((2, 3, 8, 8)), {}, r"batches of 2 only, not of up to 4: set max_batch 2"),
        (small_onnx(("n", 3, "h", "w")), {}, "height and width of the input images are open"),
        (small_onnx(("n", 3, 8, "w")), {}, "height and width of the input images are open"),
        (
            small_onnx(),
            {"min_size": (8, 8), "opt_size": (8, 8), "max_size": (8, 8)},
            r"\[-1, 3, 8, 8\], of a fixed height and width: leave out",
        ),
        (small_onnx(), {"min_batch": 5}, "a least batch of 5 and a usual one of 4"),
        (small_onnx(), {"opt_batch": 9}, "a usual one of 9 do not fit a largest of 4"),
        (pixels_onnx(("n", 8, 8, 4)), {}, r"images are \[N, 3, height, width\] or"),
    ],
)
def test_shapes_that_do_not_fit(
    trt_double: Double, model: bytes, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build(model, **options)
    assert "Builder.build_serialized_network" not in trt_double.names()


def test_options_reach_the_configuration(trt_double: Double, tmp_path: Path) -> None:
    trt_double.script["Builder.num_DLA_cores"] = 2
    trt_double.script["OnnxParser.get_used_vc_plugin_libraries"] = ["/there/libvc.so"]
    library = tmp_path / "libours.so"
    library.touch()
    trt_double.script["IPluginRegistry.load_library"] = object()
    build(
        version_compatible=True, hardware_compatible="ampere-plus", dla=1, tf32=True,
        detailed=False, min_batch=4, workspace_mb=3, plugins=[library],
    )  # fmt: skip
    (call,) = (c for c in trt_double.calls if c.name == "Builder.build_serialized_network")
    state = call.arguments["config"].state
    assert state["set_flags"] == {"TF32", "VERSION_COMPATIBLE", "GPU_FALLBACK"}
    assert state["pools"] == {"WORKSPACE": 3 << 20}
    assert state["hardware_compatibility_level"].name == "AMPERE_PLUS"
    assert (state["default_device_type"].name, state["DLA_core"]) == ("DLA", 1)
    assert state["plugins_to_serialize"] == ["/there/libvc.so", str(library)]
    assert "profiling_verbosity" not in state
    assert trt_double.arguments("IPluginRegistry.load_library") == [{"plugin_path": str(library)}]
    build()
    (_, call) = (c for c in trt_double.calls if c.name == "Builder.build_serialized_network")
    state = call.arguments["config"].state
    assert not state["set_flags"]  # TF32 is on by default
    assert state["profiling_verbosity"].name == "DETAILED"
    assert "plugins_to_serialize" not in state


def test_the_network_can_be_altered(trt_double: Double) -> None:
    """After it is parsed and before anything is made of its inputs."""
    formats = 1 << int(trt_double.module.TensorFormat.HWC)

    def alter(network: Any) -> None:
        network.get_input(0).allowed_formats = formats

    build(alter=alter)
    names = trt_double.names()
    assert names.index("OnnxParser.parse") < names.index("ITensor.allowed_formats=")
    assert names.index("ITensor.allowed_formats=") < names.index("IOptimizationProfile.set_shape")
