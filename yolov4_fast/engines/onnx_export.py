"""A Network as ONNX, built node by node from its layer specs (`onnx_layers`).

The graph is written directly and not traced from the torch module: a network is data, so every node
and tensor gets a stable name made of its layer number, the batch dimension is dynamic by
construction, the result does not depend on the torch version, and no tracer has to be installed or
understood. Nothing is left to simplify: batch normalisation is folded, constants are initializers,
and every node computes (an Identity is written only where one tensor must have two names).

In:  `images` [N, channels, H, W] float32 in 0..1, or [N, H, W, channels] uint8 (`uint8_input`).
Out: the raw maps `map_{stride}` [N, A * (5 + classes), h, w] float32 in head order (a second head
     of the same stride: `map_{stride}_{head number}`), or what the plugin YoloV4Detect makes of
     them (`detect`; only TensorRT runs that).

Between the casts of input and maps everything has the graph's type, so a strongly typed TensorRT
network, which takes its precisions from the types, has no float32 convolution. The uint8 input is
divided in float32: it then gives the very images that the float32 input is given.

Opset 17 for float32 and float16, 22 for bfloat16: the lowest that has every operator in that type.
TensorRT's parser reads opsets 9 to 24 in 10.15 and 9 to 25 in 11 (onnx-tensorrt,
docs/operators.md; NVIDIA's ONNX Opset Guide).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper
from torch import Tensor

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.onnx_layers import BF16, F32, FP16, LayerGraph, Numbers
from yolov4_fast.engines.tensorrt.plugins import DOMAIN, OUTPUTS, DetectionOutputs, detect_node
from yolov4_fast.files import replacing
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import IMAGE, Conv, Head, Network, Shortcut

INPUT = "images"
PRECISIONS = {numbers.name: numbers for numbers in (F32, FP16, BF16)}
Dimension = int | str


def export_onnx(
    network: Network,
    state: Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    precision: str = "f32",
    dynamic_size: bool = False,
    uint8_input: bool = False,
    detect: DetectionOutputs | None = None,
) -> onnx.ModelProto:
    """Build the ONNX model of a network, and write it (whole or not at all) where a path is given.

    state: of a NetworkModule(network), folded or not, float on any device. precision: "f32", "fp16"
    or "bf16". dynamic_size: height and width of the input are free, in multiples of the network's
    largest stride; else the network's own. uint8_input: [N, H, W, channels] uint8 instead of
    float32. detect: end with the plugin instead of the raw maps. Raises EngineError and
    NetworkError for what has no such form.
    """
    if precision not in PRECISIONS:
        raise EngineError(f"no ONNX precision {precision!r}; there are {', '.join(PRECISIONS)}")
    folded, weights = fold(network, state)
    numbers = PRECISIONS[precision]
    names = output_names(folded)
    graph = LayerGraph(
        folded, weights, numbers, _renamed(folded, names, numbers, detect), dynamic_size
    )
    maps = _layers(graph, _input(graph, uint8_input))
    if detect is None:
        outputs = _map_outputs(graph, maps, names)
    else:
        outputs = _detections(graph, maps, names, detect)
    image = _image(folded, dynamic_size, uint8_input)
    model = _model(graph, image, outputs, [DOMAIN] if detect else [])
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


def _sources(network: Network) -> list[int]:
    """The layers that the outputs are read from, in their order."""
    found = [layer.inputs[0] for layer in network.layers if isinstance(layer, Head)]
    return found or [len(network.layers) - 1]


def _renamed(
    network: Network, names: Sequence[str], numbers: Numbers, detect: DetectionOutputs | None
) -> dict[str, str]:
    """Tensors that are outputs as they are, so that they bear the output's name: without a cast,
    and read by one head alone.
    """
    if numbers is not F32 or detect is not None:
        return {}
    sources = _sources(network)
    readers = [source for layer in network.layers for source in layer.inputs]
    return {
        f"layer_{source}": name
        for source, name in zip(sources, names, strict=True)
        if readers.count(source) <= 1 and isinstance(network.layers[source], Conv | Shortcut)
    }


def _input(graph: LayerGraph, uint8: bool) -> str:
    """Nodes from the graph's input to the image in the graph's type; returns its name."""
    source = INPUT
    if uint8:
        # TensorRT takes uint8 at an input and nowhere else: the cast comes first.
        graph.node("Cast", [source], "images.float", to=TensorProto.FLOAT)
        full = helper.make_tensor("images.full", TensorProto.FLOAT, [], [255.0])
        graph.constants.append(full)
        source = graph.node("Div", ["images.float", full.name], "images.unit")
    if graph.numbers is not F32:
        source = graph.node("Cast", [source], "images.typed", to=graph.numbers.onnx_type)
    if uint8:
        source = graph.node("Transpose", [source], "images.planes", perm=[0, 3, 1, 2])
    return source


def _layers(graph: LayerGraph, image: str) -> list[str]:
    """The nodes of all layers; returns the tensors that hold the raw maps."""
    tensors = {IMAGE: image}  # the tensor that holds each layer's output
    for index, layer in enumerate(graph.network.layers):
        if not isinstance(layer, Head):
            inputs = [tensors[source] for source in layer.inputs]
            tensors[index] = graph.add(index, layer, inputs)
    return [tensors[source] for source in _sources(graph.network)]


def _map_outputs(
    graph: LayerGraph, maps: Sequence[str], names: Sequence[str]
) -> list[onnx.ValueInfoProto]:
    shapes = graph.network.shapes()
    outputs = []
    for source, name, index in zip(maps, names, _sources(graph.network), strict=True):
        if graph.numbers is not F32:
            graph.node("Cast", [source], name, to=TensorProto.FLOAT)
        elif source != name:
            graph.node("Identity", [source], name)
        channels, *size = shapes[index]
        sides: Sequence[Dimension] = [f"{name}_H", f"{name}_W"] if graph.any_size else size
        outputs.append(_value(name, TensorProto.FLOAT, [channels, *sides]))
    return outputs


def _detections(
    graph: LayerGraph, maps: Sequence[str], names: Sequence[str], detect: DetectionOutputs
) -> list[onnx.ValueInfoProto]:
    if graph.numbers is not F32:
        maps = [
            graph.node("Cast", [source], name, to=TensorProto.FLOAT)
            for source, name in zip(maps, names, strict=True)
        ]
    graph.nodes.append(detect_node(graph.network, detect, maps))
    most = detect.max_detections
    kinds = (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32)
    shapes: list[list[Dimension]] = [[1], [most, 4], [most], [most]]
    return [_value(*output) for output in zip(OUTPUTS, kinds, shapes, strict=True)]


def _image(network: Network, dynamic_size: bool, uint8: bool) -> onnx.ValueInfoProto:
    sides: list[Dimension] = ["H", "W"] if dynamic_size else [network.height, network.width]
    if uint8:
        return _value(INPUT, TensorProto.UINT8, [*sides, network.channels])
    return _value(INPUT, TensorProto.FLOAT, [network.channels, *sides])


def _model(
    graph: LayerGraph,
    image: onnx.ValueInfoProto,
    outputs: Sequence[onnx.ValueInfoProto],
    domains: Sequence[str],
) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", graph.numbers.opset)]
    return helper.make_model(
        helper.make_graph(graph.nodes, "yolov4_fast", [image], outputs, graph.constants),
        producer_name="yolov4_fast",
        ir_version=graph.numbers.ir_version,
        opset_imports=opsets + [helper.make_opsetid(domain, 1) for domain in domains],
    )


def _value(name: str, kind: int, shape: Sequence[Dimension]) -> onnx.ValueInfoProto:
    """A tensor of any batch."""
    return helper.make_tensor_value_info(name, kind, ["N", *shape])
