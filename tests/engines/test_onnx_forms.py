"""Forms of the ONNX beside its types: images of uint8, a free size, the plugin at its end."""

from __future__ import annotations

from itertools import chain

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from typed_onnx import DTYPES, assert_typed, runner

from yolov4_fast.engines.onnx_export import PRECISIONS, export_onnx
from yolov4_fast.engines.tensorrt.plugins import DOMAIN, OUTPUTS, DetectionOutputs
from yolov4_fast.network.layers import IMAGE, Conv, Head, MaxPool, Network, NetworkError
from yolov4_fast.network.module import NetworkModule


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_uint8_images_become_what_floats_are(mini, precision: str, dynamic: bool) -> None:
    """To the bit, up to the first convolution; run by ONNX's own evaluator."""
    model = export_onnx(
        mini.network, mini.state, uint8_input=True, precision=precision, dynamic_size=dynamic
    )
    assert_typed(model, precision)
    assert_typed_input(model, ["N", "H", "W", 3] if dynamic else ["N", 128, 160, 3])
    shaped = onnx.shape_inference.infer_shapes(model)
    before = onnx.utils.Extractor(shaped).extract_model(["images"], [first_input(model)])
    pictures = np.random.default_rng(1).integers(0, 256, (2, 128, 160, 3), np.uint8)
    (planes,) = ReferenceEvaluator(before).run(None, {"images": pictures})
    floats = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    expected = floats.to(DTYPES.get(precision, torch.float32)).float()
    np.testing.assert_array_equal(planes.astype(np.float32), expected.numpy())


def first_input(model: onnx.ModelProto) -> str:
    return next(node.input[0] for node in model.graph.node if node.op_type == "Conv")


def test_uint8_images_give_the_maps_of_floats(mini) -> None:
    plain, uint8 = (
        export_onnx(mini.network, mini.state, uint8_input=wanted) for wanted in (False, True)
    )
    pictures = np.random.default_rng(1).integers(0, 256, (2, 128, 160, 3), np.uint8)
    floats = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    expected = runner(plain, "f32")(floats)
    for ours, theirs in zip(runner(uint8, "f32")(pictures), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_typed_input(model: onnx.ModelProto, shape: list[int | str]) -> None:
    onnx.checker.check_model(model, full_check=True)
    (image,) = model.graph.input
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    dimensions = image.type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dimensions] == shape
    # TensorRT takes uint8 at its inputs only: whoever reads the image makes floats of it.
    readers = [node.op_type for node in model.graph.node if "images" in node.input]
    assert readers == ["Cast"]


def test_a_free_size_is_a_fixed_ones_weights(mini) -> None:
    fixed, free = (
        export_onnx(mini.network, mini.state, dynamic_size=dynamic) for dynamic in (False, True)
    )
    assert [*fixed.graph.node] == [*free.graph.node]
    assert [*fixed.graph.initializer] == [*free.graph.initializer]
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in chain(free.graph.input, free.graph.output)
    ]
    assert shapes == [
        ["N", 3, "H", "W"], ["N", 24, "map_16_H", "map_16_W"], ["N", 24, "map_8_H", "map_8_W"],
    ]  # fmt: skip


def test_a_pooling_that_pads_by_size_is_refused() -> None:
    """Sides of 10 and 12 leave different rests over a stride of 3."""
    head = Head(inputs=(2,), all_anchors=((4.0, 5.0),), mask=(0,), num_classes=1, stride=6)
    network = Network(
        (
            Conv(inputs=(IMAGE,), filters=4, size=3, stride=2),
            MaxPool(inputs=(0,), size=5, stride=3),
            Conv(inputs=(1,), filters=6, batch_normalize=False),
            head,
        ),
        width=12,
        height=12,
    )
    state = NetworkModule(network).state_dict()
    export_onnx(network, state, dynamic_size=True)  # grows by whole strides
    alone = Network((MaxPool(inputs=(IMAGE,), size=2, stride=3),), width=12, height=12)
    with pytest.raises(NetworkError, match=r"layer 0 \(maxpool\): its padding differs"):
        export_onnx(alone, {}, dynamic_size=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plugin_ends_the_graph(mini, precision: str) -> None:
    detect = DetectionOutputs(confidence=0.3, iou=0.5, beta=0.6, max_detections=50)
    model = export_onnx(mini.network, mini.state, precision=precision, detect=detect)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import}[DOMAIN] == 1
    *_, node = model.graph.node
    assert node.op_type == "YoloV4Detect" and tuple(node.output) == OUTPUTS
    makers = {name: other for other in model.graph.node for name in other.output}
    casts = [makers[name].op_type == "Cast" for name in node.input]
    assert casts == [precision != "f32"] * len(mini.network.heads)
    shapes = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in model.graph.output
    }
    assert shapes == {
        "num_detections": (TensorProto.INT32, ["N", 1]),
        "detection_boxes": (TensorProto.FLOAT, ["N", 50, 4]),
        "detection_scores": (TensorProto.FLOAT, ["N", 50]),
        "detection_classes": (TensorProto.INT32, ["N", 50]),
    }
