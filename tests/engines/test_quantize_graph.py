"""The Q/DQ graph: what is rounded, by which scales, and that every runtime reads it alike."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from quantized_network import (
    HEAD_CONVOLUTION,
    folded,
    in_onnxruntime,
    pictures,
    relative,
    small_network,
)

from benchmarks.quantization import ran_in
from yolov4_fast.engines.engine import EngineError, Manifest
from yolov4_fast.engines.openvino_engine import MODEL, OpenVinoEngine
from yolov4_fast.engines.quantize import Quantised, quantize
from yolov4_fast.engines.quantize.emulate import Emulation
from yolov4_fast.engines.quantize.regions import common_scales, head_convolutions, region
from yolov4_fast.network.layers import IMAGE, Conv


def made(types: str = "f32", keep: Collection[int] = (), scale: float = 1.0) -> Quantised:
    images = pictures(4)
    return quantize(*folded(scale), images, method="minmax", keep=keep, types=types)


def openvino(quantised: Quantised) -> OpenVinoEngine:
    manifest = Manifest(
        kind="openvino",
        network=folded()[0],
        class_names=("a", "b", "c"),
        resize="stretch",
        precision="int8",
        max_batch=4,
    )
    return OpenVinoEngine(manifest, {MODEL: quantised.model.SerializeToString()})


class Graph:
    """A Q/DQ model, by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.maker = {name: node for node in model.graph.node for name in node.output}
        self.constants = {
            each.name: numpy_helper.to_array(each) for each in model.graph.initializer
        }
        self.nodes = {node.name: node for node in model.graph.node}

    def scale(self, tensor: str) -> np.ndarray:
        """Of the DequantizeLinear that makes this tensor."""
        node = self.maker[tensor]
        assert node.op_type == "DequantizeLinear"
        return self.constants[node.input[1]]

    def is_rounded(self, tensor: str) -> bool:
        return tensor in self.maker and self.maker[tensor].op_type == "DequantizeLinear"


@pytest.mark.parametrize("types", ["f32", "fp16"])
def test_each_convolution_but_the_heads_reads_int8_with_a_scale_per_channel(types: str) -> None:
    model = made(types).model
    onnx.checker.check_model(model, full_check=True)
    graph = Graph(model)
    for name, node in graph.nodes.items():
        if node.op_type != "Conv":
            continue
        kept = name == f"layer_{HEAD_CONVOLUTION}"
        assert [graph.is_rounded(tensor) for tensor in node.input] == [not kept, not kept, False]
        if not kept:
            filters = graph.maker[node.input[1]]
            assert graph.constants[filters.input[0]].dtype == np.int8
            assert graph.scale(node.input[1]).shape == graph.constants[node.input[2]].shape
            assert [a.i for a in filters.attribute if a.name == "axis"] == [0]


@pytest.mark.parametrize("types", ["f32", "fp16"])
def test_zero_points_are_zero_as_tensorrt_demands(types: str) -> None:
    graph = Graph(made(types).model)
    rounding = [n for n in graph.nodes.values() if n.op_type.endswith("quantizeLinear")]
    rounding += [n for n in graph.nodes.values() if n.op_type == "QuantizeLinear"]
    assert len(rounding) > 20
    for node in rounding:
        zero = graph.constants[node.input[2]]
        assert zero.dtype == np.int8 and not zero.any()


def test_what_stands_between_a_convolution_and_its_activation_is_not_rounded() -> None:
    graph = Graph(made().model)
    for node in graph.nodes.values():
        if node.op_type == "QuantizeLinear":
            assert not node.input[0].endswith((".conv", ".softplus", ".tanh"))


def test_joins_have_one_scale_and_sums_add_rounded_tensors() -> None:
    graph = Graph(made().model)
    joins = [node for node in graph.nodes.values() if node.op_type == "Concat"]
    assert len(joins) == 2
    assert len({float(graph.scale(name)) for name in joins[0].input}) == 1
    (total,) = (node for node in graph.nodes.values() if node.op_type == "Add")
    assert all(map(graph.is_rounded, total.input))


def test_both_typings_have_the_same_scales() -> None:
    single, half = Graph(made("f32").model), Graph(made("fp16").model)
    scales = {name for name in single.constants if name.endswith("_scale")}
    assert len(scales) >= 20
    for name in scales:
        other = half.constants[name.replace("images_", "images.typed_")]
        assert other.dtype == np.float16
        assert np.array_equal(single.constants[name], other.astype(np.float32)), name


def test_around_float16_no_convolution_is_float32() -> None:
    graph = onnx.shape_inference.infer_shapes(made("fp16").model, strict_mode=True).graph
    of = {each.name: each.type.tensor_type.elem_type for each in graph.value_info}
    of |= {each.name: each.data_type for each in graph.initializer}
    of |= {each.name: each.type.tensor_type.elem_type for each in graph.output}
    for node in graph.node:
        if node.op_type == "Conv":
            assert {of[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
        if node.op_type == "QuantizeLinear":
            assert of[node.input[0]] == of[node.input[1]] == TensorProto.FLOAT16


def test_a_kept_convolution_is_float_and_what_it_alone_reads_is_not_rounded() -> None:
    graph = Graph(made(keep=(10, 14)).model)
    assert not any(map(graph.is_rounded, graph.nodes["layer_10.conv"].input))
    assert not any(map(graph.is_rounded, graph.nodes["layer_14.conv"].input))
    assert not any(map(graph.is_rounded, graph.nodes["layer_13"].input))  # all that it reads
    assert graph.is_rounded(graph.nodes["layer_8.conv"].input[0])


@pytest.mark.parametrize("types", ["f32", "fp16"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_the_emulation_onnxruntime_and_openvino_compute_the_same(types: str, scale: float) -> None:
    # At the scale 0.02 OpenVINO's own reading of signed Q/DQ before a Concat would round all to 0.
    quantised = made(types, scale=scale)
    network, state = folded(scale)
    images = torch.cat(pictures(3))
    emulation = Emulation(network, state)
    exact = emulation.maps(emulation.outputs(images))[0]
    rounded = [i for i, _ in network.convolutions() if i != HEAD_CONVOLUTION]
    emulated = emulation.maps(emulation.outputs(images, quantised.scales, rounded))[0]
    (theirs,) = in_onnxruntime(quantised.model, images)
    (ours,) = openvino(quantised).run(images)
    loss = relative(theirs, exact)
    assert 1e-3 < loss < 0.1  # it is rounded, and it is the network
    for found in (emulated, ours):
        # Ties, and sums in another order, move single values by a step, which is less than what
        # rounding all does. The 11 bits of float16 move more values.
        assert relative(found, theirs) < (0.7 if types == "f32" else 1.3) * loss


def test_openvino_runs_all_but_the_heads_in_int8() -> None:
    kinds = ran_in(openvino(made()))
    convolutions = len(list(small_network().convolutions()))
    assert sum(kinds[name] for name in ("i8", "u8")) == convolutions - 1
    assert sum(kinds.values()) == convolutions


def test_filters_that_another_quantiser_left_in_floating_point_are_read_too() -> None:
    quantised, images = made(), torch.cat(pictures(2))
    (expected,) = openvino(quantised).run(images)
    graph = quantised.model.graph
    for node in [each for each in graph.node if each.input[0].endswith(".weight_quantized")]:
        stored, scale, zero = list(node.input)
        (found,) = (each for each in graph.initializer if each.name == stored)
        scales = Graph(quantised.model).constants[scale].reshape(-1, 1, 1, 1)
        filters = numpy_helper.to_array(found).astype(np.float32) * scales
        graph.initializer.remove(found)
        graph.initializer.append(numpy_helper.from_array(filters, f"{stored}.float"))
        rounding = onnx.helper.make_node(
            "QuantizeLinear", [f"{stored}.float", scale, zero], [stored], axis=0
        )
        graph.node.insert(0, rounding)
    (found,) = openvino(quantised).run(images)
    assert relative(found, expected) < 1e-2


def test_the_region_ends_where_no_convolution_in_int8_reads() -> None:
    network = small_network()
    every = [i for i, layer in enumerate(network.layers) if isinstance(layer, Conv)]
    assert head_convolutions(network) == {HEAD_CONVOLUTION}
    inside = region(network, [i for i in every if i != HEAD_CONVOLUTION])
    assert inside == set(range(IMAGE, 14)) - {5}  # a route from one layer is that layer's tensor
    assert region(network, [2]) == region(network, [6]) == {1}
    assert region(network, [8]) == {7, 6, 4, 3, 2}


def test_layers_that_only_move_values_share_a_scale() -> None:
    first = common_scales(small_network())
    assert first[4] == first[6] == first[7] == 4
    assert {first[i] for i in (8, 9, 10, 11, 12, 13)} == {8}
    assert first[5] == first[1] == 1
    assert first[IMAGE] == IMAGE and first[3] == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "guess"}, "no calibration method 'guess'; there are entropy, percentile"),
        ({"types": "bf16"}, "no INT8 with bf16 around it; there are f32, fp16"),
        ({"keep": (4,)}, "keep names layer 4, which is no convolution"),
        ({"keep": (99,)}, "keep names layer 99, which is no convolution"),
    ],
)
def test_quantise_refuses(settings: dict, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        quantize(*folded(), pictures(1), **({"keep": (), "method": "minmax"} | settings))
