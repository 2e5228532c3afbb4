"""The layers of a folded network as ONNX nodes, each typed float32, float16 or bfloat16.

Layer 12 makes the tensor `layer_12`, by a node of that name, from the constants `layer_12.weight`
and so on; what a layer needs on the way has a suffix, such as `layer_12.conv` before an activation.
Names are the same in every type, but for a tensor that is a graph's output (`LayerGraph.outputs`).

Mish is Softplus, Tanh and Mul. ONNX has Mish as one operator from opset 18 on, but TensorRT's
parser takes that in float32 and float16 only, and these three in bfloat16 too (onnx-tensorrt,
docs/operators.md of 10.15); TensorRT has no layer of that name and fuses chains of point-wise
layers, the convolution before them included where it has a kernel for it (its "Layer Fusion
Catalog": convolution and activation, point-wise). OpenVINO makes its own Mish of the three and
fuses it into the convolution; ONNX Runtime expands the operator into the three. Likewise hard swish
is HardSigmoid and Mul: the parser takes HardSwish in float32 and float16 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.network.layers import (
    Conv,
    Layer,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shortcut,
    Upsample,
)


@dataclass(frozen=True)
class Numbers:
    """A floating-point type, and the lowest opset whose operators all take it."""

    name: str
    onnx_type: int
    torch_type: torch.dtype
    opset: int
    ir_version: int  # that of the opset: readable by the runtimes that know the opset


F32 = Numbers("f32", TensorProto.FLOAT, torch.float32, 17, 8)
FP16 = Numbers("fp16", TensorProto.FLOAT16, torch.float16, 17, 8)
# Conv, MaxPool, Softplus, HardSigmoid and Selu take bfloat16 from opset 22 on.
BF16 = Numbers("bf16", TensorProto.BFLOAT16, torch.bfloat16, 22, 10)


@dataclass
class LayerGraph:
    """Nodes and constants, collected layer by layer.

    network, state: folded. outputs: names for tensors that would have the key's name otherwise.
    any_size: whether the graph is for every size of the input that the network takes.
    """

    network: Network
    state: Mapping[str, Tensor]
    numbers: Numbers
    outputs: Mapping[str, str] = field(default_factory=dict)
    any_size: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node with one output; returns the name of that."""
        output = self.outputs.get(name, name)
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def array(self, name: str, values: np.ndarray) -> str:
        """Add a constant of numpy's own type."""
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, name: str, values: Tensor) -> str:
        """Add a constant of the graph's type. Raises EngineError where that cannot hold it."""
        typed = values.to(self.numbers.torch_type)
        if not typed.isfinite().all():
            raise EngineError(
                f"{name} reaches {values.abs().max():.3g}, which {self.numbers.name} cannot hold: "
                "export another precision"
            )
        whole = {2: torch.int16, 4: torch.int32}[typed.element_size()]
        data = typed.contiguous().view(whole).numpy().tobytes()  # numpy has no bfloat16
        self.constants.append(
            helper.make_tensor(name, self.numbers.onnx_type, list(typed.shape), data, raw=True)
        )
        return name

    def add(self, index: int, layer: Layer, inputs: list[str]) -> str:
        """Append the nodes of one layer; returns the name of the tensor that holds its output."""
        name = f"layer_{index}"
        match layer:
            case Conv():
                return self._convolution(index, layer, inputs[0])
            case Shortcut():
                return self._shortcut(index, layer, inputs)
            case Route():
                return self._route(index, layer, inputs)
            case MaxPool():
                return self._max_pool(index, layer, inputs[0])
            case Upsample():
                scales = np.array([1, 1, layer.stride, layer.stride], np.float32)
                return self.node(
                    "Resize",
                    [inputs[0], "", self.array(f"{name}.scales", scales)],
                    name,
                    mode="nearest",
                    coordinate_transformation_mode="asymmetric",
                    nearest_mode="floor",
                )
            case Sam():
                return self.node("Mul", inputs, name)
        raise NetworkError(f"layer {index}: {type(layer).__name__} has no form in ONNX")

    def _convolution(self, index: int, layer: Conv, source: str) -> str:
        name = f"layer_{index}"
        parts = [
            self.constant(f"{name}.{part}", self.state[f"layers.{index}.conv.{part}"])
            for part in ("weight", "bias")
        ]
        output = self.node(
            "Conv",
            [source, *parts],
            name if layer.activation == "linear" else f"{name}.conv",
            kernel_shape=[layer.size] * 2,
            strides=[layer.stride] * 2,
            pads=[layer.pad] * 4,
            group=layer.groups,
        )
        return self._activation(index, layer.activation, output)

    def _shortcut(self, index: int, layer: Shortcut, inputs: list[str]) -> str:
        name = f"layer_{index}"
        if layer.weights != "none":
            weights = self.state[f"layers.{index}.weights"]
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
        return self._activation(index, layer.activation, total)

    def _activation(self, index: int, activation: str, source: str) -> str:
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
                    self.constant(f"{name}.{part}", torch.tensor(value))
                    for part, value in (("least", 0.0), ("most", 6.0))
                ]
                return self.node("Clip", [source, *bounds], name)
            case "selu":
                return self.node("Selu", [source], name)
            case "hard_swish":
                gate = self.node("HardSigmoid", [source], f"{name}.gate", alpha=1 / 6, beta=0.5)
                return self.node("Mul", [source, gate], name)
            case "prelu":
                slope = self.state[f"layers.{index}.slope"].reshape(-1, 1, 1)
                return self.node("PRelu", [source, self.constant(f"{name}.slope", slope)], name)
        raise NetworkError(f"{name}: activation {activation!r} has no form in ONNX")

    def _route(self, index: int, layer: Route, inputs: list[str]) -> str:
        name = f"layer_{index}"
        if layer.groups > 1:
            shapes = self.network.input_shapes()[index]
            inputs = [
                self._channels(
                    f"{name}.group{number}" if len(inputs) > 1 else name,
                    source,
                    layer.group * (shape[0] // layer.groups),
                    shape[0] // layer.groups,
                )
                for number, (source, shape) in enumerate(zip(inputs, shapes, strict=True))
            ]
        return inputs[0] if len(inputs) == 1 else self.node("Concat", inputs, name, axis=1)

    def _channels(self, name: str, source: str, start: int, count: int) -> str:
        bounds = [
            self.array(f"{name}.{part}", np.array([value], np.int64))
            for part, value in (("start", start), ("end", start + count), ("axis", 1))
        ]
        return self.node("Slice", [source, *bounds], name)

    def _max_pool(self, index: int, layer: MaxPool, source: str) -> str:
        ((_, height, width),) = self.network.input_shapes()[index]
        _, out_height, out_width = self.network.shapes()[index]
        if self.any_size:
            self._check_any_size(index, layer, height, width)
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

    def _check_any_size(self, index: int, layer: MaxPool, height: int, width: int) -> None:
        """The padding of a pooling depends on the rest of its map's sides over its stride: equal
        for all sizes only if a map grows in steps of whole strides.
        """
        network, step = self.network, self.network.max_stride
        for side, input_side in ((height, network.height), (width, network.width)):
            grows = side * step / input_side  # for one step of the input
            if grows % layer.stride:
                raise NetworkError(
                    f"layer {index} (maxpool): its padding differs between input sizes, so this "
                    "network is exported for one size only"
                )
