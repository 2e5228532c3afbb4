"""The OpenVINO engine, the default on CPUs: our ONNX read in memory, bfloat16 where the CPU has it,
float32 else; or INT8, of a Q/DQ ONNX, with the same two for what is not INT8 (`quantize`).

Batches: one image, the case where latency counts, runs in a model compiled for exactly that. Any
other size runs in a second model of a bounded dynamic batch, compiled when the first such batch
comes. Measured on yolov4 416: the dynamic model is as fast as one compiled for its batch (8 images:
523 ms both), but for a single image 2 % slower; a model per batch size would hold another copy of
the weights for each.

Images are read in place. The maps are copied out of the request's buffers, 0.4 ms for yolov4 416:
having OpenVINO write into fresh tensors instead was measured 5 ms slower. The copy is numpy's and
not torch's, which would wake torch's OpenMP threads: those keep spinning for milliseconds and take
the cores from OpenVINO's own (2 to 10 % of the whole on two cores).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from threading import Lock

import numpy as np
import openvino as ov
import torch
from openvino import opset13
from torch import Tensor

from yolov4_fast.engines.engine import (
    DeviceError,
    Engine,
    EngineError,
    Manifest,
    Payload,
    Request,
    check_finite,
)
from yolov4_fast.network.layers import Network

MODEL = "model.onnx"
DEVICE = "CPU"


class OpenVinoEngine(Engine):
    """payload: `model.onnx`. device: the CPU, the only one this engine is for."""

    kind = "openvino"
    precisions = ("f32", "bf16", "int8")
    members = (MODEL,)

    def __init__(
        self, manifest: Manifest, payload: Mapping[str, bytes], device: str | None = None
    ) -> None:
        if device not in (None, "cpu"):
            raise DeviceError(f"the openvino engine runs on the cpu, not on {device!r}")
        if manifest.precision == "bf16" and not has_bf16():
            raise EngineError("this CPU has no bfloat16 instructions: build for precision f32")
        self.manifest = manifest
        self.device = torch.device("cpu")
        try:
            model = _core().read_model(model=payload[MODEL])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]  # before it: where in OpenVINO's source
            raise EngineError(f"OpenVINO cannot read {MODEL} ({reason})") from None
        if manifest.precision == "int8":
            fuse_quantizers(model)
        self._model: ov.Model | None = model
        for constant in model.get_ops():
            if constant.get_type_name() == "Constant" and constant.get_element_type().is_real():
                check_finite(constant.get_friendly_name(), constant.data)
        self._single = self._compile(1)
        self._batched: _Compiled | None = None
        self._compiling = Lock()

    @staticmethod
    def default_precision() -> str:
        return "bf16" if has_bf16() else "f32"

    @staticmethod
    def payload(network: Network, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        from yolov4_fast.engines.onnx_export import export_onnx

        return {MODEL: export_onnx(network, state).SerializeToString()}

    @classmethod
    def make(cls, manifest: Manifest, state: Mapping[str, Tensor], request: Request) -> Payload:
        if request.images is None:
            return cls.payload(manifest.network, state)
        from yolov4_fast.engines.quantize import quantize

        quantised = quantize(
            manifest.network,
            state,
            request.images,
            method=request.calibration_method,
            progress=request.progress,
        )
        return {MODEL: quantised.model.SerializeToString()}

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        if self._model is None:
            raise EngineError("the engine is closed")
        if images.shape[0] == 1:
            return self._single.run(images)
        if self._batched is None:
            with self._compiling:
                if self._batched is None:
                    self._batched = self._compile(ov.Dimension(1, self.max_batch))
        return self._batched.run(images)

    def _compile(self, batch: int | ov.Dimension) -> _Compiled:
        assert self._model is not None
        self._model.reshape([batch, 3, self.height, self.width])
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": (
                self.default_precision() if self.precision == "int8" else self.precision
            ),
        }
        return _Compiled(_core().compile_model(self._model, DEVICE, hints))

    def close(self) -> None:
        self._model = None
        self._batched = None
        self._single.close()


class _Compiled:
    """A compiled model and its idle inference requests: each thread takes one, so as many exist as
    ran at once.
    """

    def __init__(self, model: ov.CompiledModel) -> None:
        self.model = model
        self.outputs = len(model.outputs)
        self.idle: list[ov.InferRequest] = []

    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        try:
            request = self.idle.pop()
        except IndexError:
            request = self.model.create_infer_request()
        request.infer([images.contiguous().numpy()], share_inputs=True, share_outputs=True)
        maps = tuple(
            torch.from_numpy(request.get_output_tensor(index).data.copy())
            for index in range(self.outputs)
        )
        self.idle.append(request)
        return maps

    def close(self) -> None:
        self.idle.clear()


def fuse_quantizers(model: ov.Model) -> None:
    """Make one FakeQuantize of each QuantizeLinear and DequantizeLinear of an activation.

    It is what they mean, with the same numbers. OpenVINO 2026.4 makes it of them itself, but gets
    signed ones before a Concat wrong: it rounds to whole numbers there instead of multiples of the
    scale, and a network's AP drops by 0.1 (benchmarks/LOG.md).
    """
    for rounded in model.get_ordered_ops():
        if rounded.get_type_name() != "Convert" or rounded.get_element_type() != ov.Type.i8:
            continue
        quantizer = rounded.input_value(0).get_node()
        if quantizer.get_type_name() != "FakeQuantize" or _is_constant(quantizer):
            continue
        for reader in rounded.output(0).get_target_inputs():
            last = reader.get_node()  # Convert to float, maybe Subtract 0, Multiply by the scale
            while last.get_type_name() != "Multiply":
                (following,) = last.output(0).get_target_inputs()
                last = following.get_node()
            scale = _constant(last.input_value(1).get_node())
            source, dtype = quantizer.input_value(0), last.get_element_type()
            if source.get_element_type() != dtype:
                source = opset13.convert(source, dtype.to_string()).output(0)
            values = [np.array(level * scale, dtype.to_dtype()) for level in (-128, 127)]
            bounds = [opset13.constant(value) for value in values]
            fused = opset13.fake_quantize(source, *bounds, *bounds, 256)
            fused.set_friendly_name(last.get_friendly_name())
            last.output(0).replace(fused.output(0))
    model.validate_nodes_and_infer_types()


def _is_constant(quantizer: ov.Node) -> bool:
    """Whether what it rounds are filters, as some quantisers leave them: in floating point."""
    return quantizer.input_value(0).get_node().get_type_name() == "Constant"


def _constant(node: ov.Node) -> float:
    """The one value of a constant, which may be converted on its way."""
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return float(node.data)


@cache
def _core() -> ov.Core:
    return ov.Core()


@cache
def has_bf16() -> bool:
    """Whether OpenVINO runs bfloat16 natively on this CPU."""
    return "BF16" in _core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
