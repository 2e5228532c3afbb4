"""What the plugin YoloV4Detect tells TensorRT of itself, and what it refuses; compiled with a
stand-in for TensorRT's header.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import helper
from plugin_library import (
    BF16,
    FLOAT,
    GOOD,
    HALF,
    HEADERS,
    HWC8,
    INT8,
    INT32,
    LINEAR,
    SHAPES,
    compiler,
)

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.plugins import (
    DOMAIN,
    OUTPUTS,
    TYPE,
    VERSION,
    DetectionOutputs,
    detect_node,
    plugin_library,
)
from yolov4_fast.network.architectures import yolov4


@pytest.fixture
def plugin(plugins):
    return plugins.create(GOOD)


def test_what_the_creator_says_of_itself(plugins):
    name, version, namespace, *fields = plugins.describe()
    assert (name, version, namespace) == (TYPE, VERSION, "''")
    node = detect_node(yolov4(80), DetectionOutputs(), "abc")
    assert (node.op_type, node.domain, list(node.output)) == (TYPE, DOMAIN, list(OUTPUTS))
    kinds = {attribute.name: attribute.type for attribute in node.attribute}
    floats = {helper.AttributeProto.FLOAT, helper.AttributeProto.FLOATS}
    assert dict(field.split(":") for field in fields) == {
        name: "1" if kind in floats else "5" for name, kind in kinds.items()
    }


def test_shapes_and_types_of_the_outputs(plugin):
    assert plugin.output_shapes(SHAPES) == [[2, 1], [2, 50, 4], [2, 50], [2, 50]]
    assert plugin.output_types([FLOAT, FLOAT]) == [INT32, FLOAT, FLOAT, INT32]


@pytest.mark.parametrize("kind", [FLOAT, HALF, BF16])
def test_formats_that_it_takes(plugin, kind):
    outputs = [INT32, FLOAT, FLOAT, INT32]
    linear = [LINEAR] * 6
    assert plugin.supports([kind, kind, *outputs], linear)
    assert not plugin.supports([kind, INT8, *outputs], linear)
    assert not plugin.supports([kind, kind, FLOAT, FLOAT, FLOAT, INT32], linear)
    assert not plugin.supports([kind, kind, INT32, kind, HALF, INT32], linear)
    for position in range(6):
        formats = [HWC8 if i == position else LINEAR for i in range(6)]
        assert not plugin.supports([kind, kind, *outputs], formats)


def test_formats_that_it_refuses(plugin):
    outputs = [INT32, FLOAT, FLOAT, INT32]
    for kinds in ([INT8, INT8], [INT32, INT32], [HALF, FLOAT], [FLOAT, BF16]):
        assert not plugin.supports([*kinds, *outputs], [LINEAR] * 6)


def test_the_workspace_grows_with_the_batch_alone(plugin):
    def for_batch(batch, kind=FLOAT):
        return plugin.workspace([(batch, *shape[1:]) for shape in SHAPES], kind)

    assert 0 < for_batch(1) < for_batch(2) < 2 * for_batch(1) + 256
    assert for_batch(3, HALF) == for_batch(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": None}, "attribute anchors is missing"),
        ({"beta": None}, "attribute beta is missing"),
        ({"size": 4}, "there is no attribute size"),
        ({"num_classes": 3.0}, "num_classes must be int32, not field type 1"),
        ({"iou": 1}, "iou must be float32, not field type 5"),
        ({"iou": np.array([0.5])}, "iou must be float32, not field type 2"),
        ({"confidence": [0.2, 0.3]}, "confidence must be one number, not 2"),
        ({"anchors": np.zeros(0, np.float32)}, "attribute anchors has no value"),
        ({"anchors": [1.0, 2.0]}, "2 numbers for each of 3 anchors, not 2"),
        ({"anchors": [10.0, 14.0, 23.0, 27.0, 0.0, 58.0]}, "anchors must be greater than 0, not 0"),
        ({"anchors": [10.0, 14.0, 23.0, 27.0, float("nan"), 58.0]}, "not nan"),
        ({"anchor_counts": [2, 0]}, "anchor_counts must be 1 to 12, not 0 of head 1"),
        ({"anchor_counts": [1] * 7}, "at most 6 heads, not 7"),
        ({"strides": [8]}, "a value for each of 2 heads, not 2, 2 and 1"),
        ({"strides": [8, 0]}, "strides must be at least 1, not 0 of head 1"),
        ({"new_coords": [2, 0]}, "new_coords must be 0 or 1, not 2 of head 0"),
        ({"scale_x_y": [1.0, float("inf")]}, "scale_x_y must be greater than 0, not inf of head 1"),
        ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"confidence": 1.5}, "confidence must be in 0..1, not 1.5"),
        ({"iou": float("nan")}, "iou must be in 0..1, not nan"),
        ({"beta": float("inf")}, "beta must be finite, not inf"),
        ({"max_detections": 0}, "max_detections must be 1 to 4096, not 0"),
        ({"max_detections": 5000}, "max_detections must be 1 to 4096, not 5000"),
    ],
)
@pytest.mark.parametrize("phase", [0, 1], ids=["build", "runtime"])
def test_wrong_attributes_are_logged_and_refused(plugins, change, message, phase):
    attributes = {key: value for key, value in (GOOD | change).items() if value is not None}
    assert plugins.create(attributes, phase) is None
    logged = plugins.messages()
    assert logged.startswith("1 YoloV4Detect: ") and message in logged  # 1: an error


@pytest.mark.parametrize(
    ("shapes", "kind", "message"),
    [
        (SHAPES[:1], FLOAT, "1 inputs and 4 outputs for 2 heads"),
        (
            [(2, 16, 6, 8), (2, 9, 3, 4)],
            FLOAT,
            "map 1 must be [batch, 8, height, width], not [2, 9",
        ),
        ([(2, 16, 6, 8), (3, 8, 3, 4)], FLOAT, "map 1 [3, 8, 3, 4] has another batch"),
        ([(2, 16, 6, 0), (2, 8, 3, 4)], FLOAT, "map 0 must be [batch, 16, height, width]"),
        ([(70000, 16, 6, 8), (70000, 8, 3, 4)], FLOAT, "1 to 65535 images, not 70000"),
        ([(1, 16, 30000, 30000), (1, 8, 3, 4)], FLOAT, "boxes and classes an image, not 54000000"),
        (SHAPES, INT8, "float32, float16 or bfloat16, not data type 2"),
    ],
)
def test_maps_that_do_not_fit_are_logged_and_refused(plugins, plugin, shapes, kind, message):
    assert not plugin.configure(shapes, kind)
    assert message in plugins.messages()
    assert not plugin.change_shape(shapes, kind)
    assert message in plugins.messages()
    if len(shapes) == 2:
        assert plugin.workspace(shapes, kind) == 0
        assert message in plugins.messages()


def test_maps_that_fit(plugins, plugin):
    assert plugin.configure(SHAPES) and plugin.change_shape(SHAPES)
    assert plugin.output_shapes([shape[:3] for shape in SHAPES]) is None
    assert "map 0 must have 4 dimensions, not 3" in plugins.messages()
    assert plugins.messages() == ""


REGISTRY = """
#include <NvInfer.h>
#include <cstdio>
using namespace nvinfer1;
struct Registry : IPluginRegistry {
  bool registerCreator(IPluginCreatorInterface& creator, const char* space) noexcept override {
    const char* name = static_cast<IPluginCreatorV3One&>(creator).getPluginName();
    std::printf("%s '%s'\\n", name, space);
    return true;
  }
};
extern "C" IPluginRegistry* getPluginRegistry() {
  static Registry registry;
  return &registry;
}
"""


@pytest.mark.parametrize("asked", ["", "0", "1"])
@pytest.mark.parametrize("tensorrt", [False, True])
def test_registers_itself_only_where_asked(tmp_path, plugin_path, asked, tensorrt):
    if tensorrt:
        source = tmp_path / "registry.cpp"
        source.write_text(REGISTRY)
        output = tmp_path / "libnvinfer.so.10"
        command = [compiler(), "-shared", "-fPIC", f"-I{HEADERS}", "-o", output, source]
        subprocess.run(command, check=True)
    run = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(plugin_path)!r})"],
        env=os.environ | {"YOLOV4_FAST_REGISTER_PLUGIN": asked, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (run.stdout == "YoloV4Detect ''\n") == (asked == "1" and tensorrt)
    assert ("could not register itself with libnvinfer.so.10" in run.stderr) == (
        asked == "1" and not tensorrt
    )


def test_outputs_out_of_range():
    for wrong in (
        {"confidence": 1.1},
        {"iou": -0.1},
        {"beta": -1.0},
        {"beta": float("nan")},
        {"max_detections": 0},
        {"max_detections": 4097},
    ):
        with pytest.raises(EngineError, match=next(iter(wrong))):
            DetectionOutputs(**wrong)


def test_a_node_needs_a_map_for_each_head():
    with pytest.raises(EngineError, match="2 maps for a network of 3"):
        detect_node(yolov4(80), DetectionOutputs(), "ab")


def test_the_library_is_looked_for_by_version(tmp_path):
    with pytest.raises(EngineError, match=r"not built for TensorRT 10.*none of another"):
        plugin_library(10, tmp_path)
    (tmp_path / "libyolov4_fast_tensorrt11.so").touch()
    assert plugin_library(11, tmp_path).parent == tmp_path
    with pytest.raises(EngineError, match=r"there is libyolov4_fast_tensorrt11\.so.*TENSORRT_ROOT"):
        plugin_library(10, tmp_path)
