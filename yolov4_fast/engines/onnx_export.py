"""A Network as ONNX, built node by node from its layer specs.

The graph is written directly and not traced from the torch module: a network is data, so every node
and tensor gets a stable name made of its layer number (`layer_12`, `layer_12.weight`), the batch
dimension is dynamic by construction, the result does not depend on the torch version, and no tracer
has to be installed or understood.

Input `images` [N, channels, H, W] float32 in 0..1; outputs the raw maps `map_{stride}` [N, A * (5 +
classes), h, w] in head order (a second head of the same stride: `map_{stride}_{head number}`).
Batch normalisation is folded.

Mish is written as Softplus, Tanh and Mul, which every runtime executes (ONNX has a Mish operator
only from opset 18, and not every runtime that reads ONNX has it): OpenVINO fuses the three into the
convolution before them just as it does its own Mish, and ONNX Runtime expands the operator into the
same three nodes anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from yolov4_fast.files import replacing
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import (
    IMAGE,
    Conv,
    Head,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shape,
    Shortcut,
    Upsample,
)

OPSET = 17
IR_VERSION = 8  # that of opset 17: readable by every runtime of the last years
INPUT = "images"


def export_onnx(
    network: Network, state: Mapping[str, Tensor], path: str | Path | None = None
) -> onnx.ModelProto:
    """Build the ONNX model of a network, and write it (whole or not at all) where a path is given.

    state: of a NetworkModule(network), folded or not, float on any device.
    """
    model = _Graph(*fold(network, state)).model()
    if path is not None:
        with replacing(path) as partial:
            partial.write_bytes(model.SerializeToString())
    return model


def output_names(network: Network) -> tuple[str, ...]:
    """Names of the raw maps, in head order; `features` for a network without heads."""
    names: list[str] = []
    for number, head in enumerate(network.heads):
        name = f"map_{head.stride}"
        names.append(name if name not in names else f"{name}_{number}")
    return tuple(names) or ("features",)


class _Graph:
    """Collects nodes and initializers while it walks the layers of a folded network."""

    def __init__(self, network: Network, state: Mapping[str, Tensor]) -> None:
        self.network = network
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.shapes = network.shapes()
        self.tensors = {IMAGE: INPUT}  # name of the tensor that holds each layer's output

    def model(self) -> onnx.ModelProto:
        maps = iter(output_names(self.network))
        outputs: list[onnx.ValueInfoProto] = []
        for index, layer in enumerate(self.network.layers):
            inputs = [self.tensors[source] for source in layer.inputs]
            if isinstance(layer, Head):
                outputs.append(self.output(next(maps), inputs[0], self.shapes[index]))
            else:
                self.tensors[index] = self.layer(index, layer, inputs)
        if not outputs:
            last = len(self.network.layers) - 1
            outputs.append(self.output(next(maps), self.tensors[last], self.shapes[last]))
        size = (self.network.channels, self.network.height, self.network.width)
        graph = helper.make_graph(
            self.nodes, "yolov4_fast", [_value(INPUT, size)], outputs, self.initializers
        )
        return helper.make_model(
            graph,
            producer_name="yolov4_fast",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )

    def output(self, name: str, source: str, shape: Shape) -> onnx.ValueInfoProto:
        self.node("Identity", [source], name)
        return _value(name, shape)

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def layer(self, index: int, layer: object, inputs: list[str]) -> str:
        """Append the nodes of one layer; returns the name of the tensor that holds its output."""
        name = f"layer_{index}"
        match layer:
            case Conv():
                return self.convolution(index, layer, inputs[0])
            case Shortcut():
                return self.shortcut(index, layer, inputs)
            case Route():
                return self.route(index, layer, inputs)
            case MaxPool():
                return self.max_pool(index, layer, inputs[0])
            case Upsample():
                scales = np.array([1, 1, layer.stride, layer.stride], np.float32)
                return self.node(
                    "Resize",
                    [inputs[0], "", self.constant(f"{name}.scales", scales)],
                    name,
                    mode="nearest",
                    coordinate_transformation_mode="asymmetric",
                    nearest_mode="floor",
                )
            case Sam():
                return self.node("Mul", inputs, name)
        raise NetworkError(f"layer {index}: {type(layer).__name__} has no form in ONNX")

    def convolution(self, index: int, layer: Conv, source: str) -> str:
        name = f"layer_{index}"
        parts = [
            self.constant(f"{name}.{part}", self.state[f"layers.{index}.conv.{part}"].numpy())
            for part in ("weight", "bias")
        ]
        linear = layer.activation == "linear"
        output = self.node(
            "Conv",
            [source, *parts],
            name if linear else f"{name}.conv",
            kernel_shape=[layer.size] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.pad] * 4,
            group=layer.groups,
        )
        return self.activation(index, layer.activation, output)

    def shortcut(self, index: int, layer: Shortcut, inputs: list[str]) -> str:
        name = f"layer_{index}"
        if layer.weights != "none":
            weights = self.state[f"layers.{index}.weights"].numpy()
            inputs = [
                self.node(
                    "Mul",
                    [source, self.constant(f"{name}.weight{number}", row.reshape(-1, 1, 1))],
                    f"{name}.product{number}",
                )
                for number, (source, row) in enumerate(zip(inputs, weights, strict=True))
            ]
        total = inputs[0]
        for number, other in enumerate(inputs[1:], 1):
            last = number == len(inputs) - 1 and layer.activation == "linear"
            total = self.node("Add", [total, other], name if last else f"{name}.sum{number}")
        return self.activation(index, layer.activation, total)

    def activation(self, index: int, activation: str, source: str) -> str:
        name = f"layer_{index}"
        match activation:
            case "linear":
                return source
            case "leaky":
                return self.node("LeakyRelu", [source], name, alpha=0.1)
            case "relu":
                return self.node("Relu", [source], name)
            case "logistic":
                return self.node("Sigmoid", [source], name)
            case "mish":
                softplus = self.node("Softplus", [source], f"{name}.softplus")
                return self.node(
                    "Mul", [source, self.node("Tanh", [softplus], f"{name}.tanh")], name
                )
            case "swish":
                return self.node(
                    "Mul", [source, self.node("Sigmoid", [source], f"{name}.sigmoid")], name
                )
            case "relu6":
                bounds = [
                    self.constant(f"{name}.{part}", np.array(value, np.float32))
                    for part, value in (("least", 0), ("most", 6))
                ]
                return self.node("Clip", [source, *bounds], name)
            case "selu":
                return self.node("Selu", [source], name)
            case "hard_swish":
                return self.node("HardSwish", [source], name)
            case "prelu":
                slope = self.state[f"layers.{index}.slope"].numpy().reshape(-1, 1, 1)
                return self.node("PRelu", [source, self.constant(f"{name}.slope", slope)], name)
        raise NetworkError(f"{name}: activation {activation!r} has no form in ONNX")

    def route(self, index: int, layer: Route, inputs: list[str]) -> str:
        name = f"layer_{index}"
        if layer.groups > 1:
            shapes = self.network.input_shapes()[index]
            inputs = [
                self.channel_slice(
                    f"{name}.group{number}" if len(inputs) > 1 else name,
                    source,
                    layer.group * (shape[0] // layer.groups),
                    shape[0] // layer.groups,
                )
                for number, (source, shape) in enumerate(zip(inputs, shapes, strict=True))
            ]
        return inputs[0] if len(inputs) == 1 else self.node("Concat", inputs, name, axis=1)

    def channel_slice(self, name: str, source: str, start: int, count: int) -> str:
        bounds = [
            self.constant(f"{name}.{part}", np.array([value], np.int64))
            for part, value in (("start", start), ("end", start + count), ("axis", 1))
        ]
        return self.node("Slice", [source, *bounds], name)

    def max_pool(self, index: int, layer: MaxPool, source: str) -> str:
        ((_, height, width),) = self.network.input_shapes()[index]
        _, out_height, out_width = self.shapes[index]
        top, bottom = layer.pads(height, out_height)
        left, right = layer.pads(width, out_width)
        return self.node(
            "MaxPool",
            [source],
            f"layer_{index}",
            kernel_shape=[layer.size] * 2,
            strides=[layer.stride] * 2,
            pads=[top, left, bottom, right],
        )


def _value(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
