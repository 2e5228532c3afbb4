"""Q/DQ in the ONNX of a network, by ONNX Runtime's quantiser, with scales of our own.

Symmetric int8: what TensorRT takes. Filters are stored as int8 with a scale for each output
channel; biases stay as they are, for TensorRT reads no others. The type around it, float32 or
float16, is the export's: a strongly typed TensorRT network takes its precisions from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from torch import Tensor

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.onnx_export import INPUT, export_onnx
from yolov4_fast.engines.quantize.emulate import filter_scales
from yolov4_fast.engines.quantize.regions import MOVES, is_plain_sum, region
from yolov4_fast.network.layers import IMAGE, Network

TYPES: dict[str, type] = {"f32": np.float32, "fp16": np.float16}
OPSET, IR_VERSION = 19, 9  # the first in which QuantizeLinear takes float16
OPERATORS = ["Conv", "Add", "Concat", "MaxPool", "Resize"]


def quantised_model(
    network: Network,
    state: Mapping[str, Tensor],
    scales: Mapping[int, float],
    convolutions: Collection[int],
    types: str,
) -> onnx.ModelProto:
    """The ONNX of a folded network with these convolutions in INT8.

    scales: of what each layer gives, IMAGE for the picture. types: "f32" or "fp16", of all else.
    Raises EngineError.
    """
    if types not in TYPES:
        raise EngineError(f"no INT8 with {types} around it; there are {', '.join(TYPES)}")
    model = export_onnx(network, state, precision=types)
    if types == "fp16":
        model.opset_import[0].version, model.ir_version = OPSET, IR_VERSION
    nodes = _nodes(network, convolutions)
    return _insert(
        onnx.shape_inference.infer_shapes(model),
        [node.name for node in model.graph.node if node.name in nodes],
        _names(scales, types),
        _filters(state, convolutions),
        TYPES[types],
    )


def _nodes(network: Network, convolutions: Collection[int]) -> set[str]:
    """The names of the nodes that are to run in INT8."""
    found = set()
    for index in convolutions:
        found |= {f"layer_{index}", f"layer_{index}.conv"}  # the second has an activation after it
    for index in region(network, convolutions) - {IMAGE}:
        if isinstance(network.layers[index], MOVES) or is_plain_sum(network, index):
            found.add(f"layer_{index}")
    return found


def _filters(state: Mapping[str, Tensor], convolutions: Collection[int]) -> dict[str, Tensor]:
    """A scale for each output channel, by the name of the constant that holds the filters."""
    return {
        f"layer_{index}.weight": filter_scales(state[f"layers.{index}.conv.weight"])
        for index in convolutions
    }


def _names(scales: Mapping[int, float], types: str) -> dict[str, float]:
    """Scales by the tensor's name."""
    image = INPUT if types == "f32" else f"{INPUT}.typed"
    return {image if i == IMAGE else f"layer_{i}": scale for i, scale in scales.items()}


def _insert(
    model: onnx.ModelProto,
    nodes: list[str],
    scales: Mapping[str, float],
    filters: Mapping[str, Tensor],
    dtype: type,
) -> onnx.ModelProto:
    """scales: of tensors by name. filters: a scale for each output channel, by the name of their
    constant.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    zero = np.array(0, np.int8)
    exact: dict[str, list[dict[str, Any]]] = {
        name: [{"scale": np.array(scale, dtype), "zero_point": zero}]
        for name, scale in scales.items()
    }
    for name, channels in filters.items():
        exact[name] = [
            {"axis": 0, "scale": np.array(scale, dtype), "zero_point": zero}
            for scale in channels.tolist()
        ]
    # It asks for ranges though the scales are given, and then does not look at them.
    ranges = {name: TensorData(lowest=dtype(-1), highest=dtype(1)) for name in scales}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=OPERATORS,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],  # rounded after the activation instead
            "TensorQuantOverrides": exact,
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model
