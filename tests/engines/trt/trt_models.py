"""Small ONNX models for the double to parse, and builds of them."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from yolov4_fast.engines.tensorrt.builder import Built, Gpu, TensorRtOptions, build_plan

H200 = Gpu("NVIDIA H200", 90)


def small_onnx(
    shape: tuple[int | str, ...] = ("batch", 3, 8, 8), kind: int = TensorProto.FLOAT16
) -> bytes:
    """images -> cast to `kind` -> 1x1 convolution -> map, as float32. shape: of the images."""
    batch, _, height, width = shape
    nodes = [
        helper.make_node("Cast", ["images"], ["typed"], name="images.cast", to=kind),
        helper.make_node("Conv", ["typed", "weight"], ["out"], name="layer_0.conv"),
        helper.make_node("Cast", ["out"], ["map_1"], name="map_1.cast", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("map_1", TensorProto.FLOAT, (batch, 2, height, width))],
        [helper.make_tensor("weight", kind, (2, 3, 1, 1), [0.5] * 6)],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10
    ).SerializeToString()


def pixels_onnx(shape: tuple[int | str, ...] = ("batch", 8, 8, 3)) -> bytes:
    """A model that reads [N, H, W, 3] uint8."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["map_1"], name="cast", to=TensorProto.FLOAT)],
        "pixels",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("map_1", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph).SerializeToString()


def build(
    model: bytes | None = None, *, max_batch: int = 4, plugins: Any = (), alter: Any = None,
    **options: Any,
) -> Built:  # fmt: skip
    asked = TensorRtOptions(**{"timing_cache": None, **options})
    return build_plan(
        model or small_onnx(), asked, max_batch=max_batch, gpu=H200, progress=False,
        plugins=plugins, alter=alter,
    )  # fmt: skip
