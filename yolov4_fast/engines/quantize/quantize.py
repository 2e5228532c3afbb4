"""A network and calibration images to a Q/DQ ONNX: calibrate, measure, choose, write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx
from torch import Tensor

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.quantize.calibrate import METHODS, histograms
from yolov4_fast.engines.quantize.emulate import Emulation, Scales, scale_of
from yolov4_fast.engines.quantize.insert import quantised_model
from yolov4_fast.engines.quantize.regions import head_convolutions
from yolov4_fast.engines.quantize.sensitivity import kept, sensitivities
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import Conv, Network

METHOD = "percentile"  # the least loss of AP over the models that were measured: docs/int8.md
PROBES = 4  # images that convolutions are measured on


@dataclass(frozen=True)
class Quantised:
    """model: with Q/DQ. method: of METHODS, by which the scales were found. sensitivity: of each
    convolution, empty where it was not measured. kept: the convolutions in higher precision.
    scales: of what each layer gives, IMAGE (-1) for the picture.
    """

    model: onnx.ModelProto
    method: str
    sensitivity: Mapping[int, float]
    kept: frozenset[int]
    scales: Scales


def quantize(
    network: Network,
    state: Mapping[str, Tensor],
    images: Iterable[Tensor],
    *,
    method: str | None = None,
    keep: Collection[int] | None = None,
    types: str = "f32",
    progress: bool = False,
) -> Quantised:
    """A network's ONNX in INT8.

    state: of a NetworkModule(network), folded or not. images: each [1, 3, height, width] float32 in
    0..1, like those that it will see, a few dozen; they are held in memory. method: of METHODS,
    METHOD by default. keep: numbers of the convolutions that stay in higher precision beside the
    heads'; by default the most sensitive. types: "f32" or "fp16", of what is not INT8. progress:
    shown on stderr. Raises EngineError.
    """
    method = method or METHOD
    if method not in METHODS:
        raise EngineError(f"no calibration method {method!r}; there are {', '.join(METHODS)}")
    try:  # before minutes of measuring
        import onnxruntime.quantization  # noqa: F401
    except ImportError:
        raise EngineError(
            "INT8 is made with ONNX Runtime's quantiser: pip install 'yolov4_fast[int8]'"
        ) from None
    network, state = fold(network, state)
    heads = head_convolutions(network)
    if keep is not None:
        for index in keep:
            if not (0 <= index < len(network.layers) and isinstance(network.layers[index], Conv)):
                raise EngineError(f"keep names layer {index}, which is no convolution")
    pictures = list(images)
    emulation = Emulation(network, state)
    found = histograms(emulation, pictures, progress)
    probes = [pictures[i * len(pictures) // PROBES] for i in range(min(PROBES, len(pictures)))]
    scales = {layer: scale_of(value) for layer, value in found.thresholds(method).items()}
    measured = sensitivities(emulation, scales, probes, progress) if keep is None else {}
    higher = kept(network, measured) if keep is None else heads | frozenset(keep)
    convolutions = [index for index, _ in network.convolutions() if index not in higher]
    model = quantised_model(network, state, scales, convolutions, types)
    return Quantised(model, method, measured, higher, scales)
