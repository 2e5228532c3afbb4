"""The TensorRT engine: a plan that NVIDIA's builder made of our ONNX, run on streams and in memory
of pycuda's.

From images to detections it takes the pipeline of the CUDA engine: the plan reads what our resize
writes and our decode reads what the plan writes, all in one captured graph. `run` itself copies the
images into the plan's memory and the maps out of it, on the device: a graph knows fixed addresses
only. Each thread in `run` takes contexts and memory of its own; pipelines share the first.

A plan is bound to the TensorRT version and the GPU that it was made with, unless it was built to be
compatible. Its layers, as TensorRT's inspector tells them, are kept beside it, so that they can be
read where there is neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.device import Device, open_device
from yolov4_fast.engines.cuda.pipeline import CudaPipeline
from yolov4_fast.engines.cuda.runtime import CAPTURING
from yolov4_fast.engines.engine import (
    DeviceError,
    Engine,
    EngineError,
    Manifest,
    Payload,
    Request,
)
from yolov4_fast.engines.pipeline import Pipeline, Settings
from yolov4_fast.engines.tensorrt.builder import Gpu, build_plan
from yolov4_fast.engines.tensorrt.contexts import Contexts
from yolov4_fast.engines.tensorrt.facts import FACTS, PLAN, Facts
from yolov4_fast.engines.tensorrt.inspector import LAYERS
from yolov4_fast.engines.tensorrt.options import TensorRtOptions
from yolov4_fast.engines.tensorrt.package import load_tensorrt
from yolov4_fast.engines.tensorrt.plan import Plan, channels_last
from yolov4_fast.engines.tensorrt.runtime import PlanRuntime, load_pycuda

BF16_SM = 80  # Ampere: the first that has it


class TensorRtEngine(Engine):
    """payload: `model.plan`, the plan; `plan.json`, what it was built with; `layers.json`, what
    TensorRT's inspector says of it.

    device: such as "cuda:1", the current one by default.
    """

    kind = "tensorrt"
    precisions = ("fp16", "bf16", "f32", "int8")
    members = (PLAN, FACTS)

    def __init__(
        self,
        manifest: Manifest,
        payload: Mapping[str, bytes],
        device: str | Device | None = None,
    ) -> None:
        self._device = _open(device)
        self.device = self._device.torch_device
        found = self._device.properties
        facts = Facts.of(payload[FACTS])
        facts.check(load_tensorrt().__version__, found)
        self.manifest = replace(
            manifest,
            gpu={"name": found.name, "sm": str(found.sm)},
            # Its packages have several names, not all of which the installed one goes by.
            versions={**manifest.versions, self.kind: facts.version},
        )
        self._guard = Lock()
        self._pipelines: WeakSet[Pipeline] = WeakSet()
        self._runtime = PlanRuntime(self.device)
        self._plan: Plan | None = None
        self._contexts: list[Contexts] = []
        self._idle: list[Contexts] = []
        try:
            with CAPTURING, self._device.active():
                torch.cuda.empty_cache()  # TensorRT does not get at what torch keeps for later
                self._plan = Plan(
                    payload[PLAN],
                    manifest.network,
                    facts.maps,
                    host_code=facts.version_compatible,
                )
                if self._plan.most < manifest.max_batch:
                    raise EngineError(
                        f"its plan runs up to {self._plan.most} images, not {manifest.max_batch}"
                    )
            self._idle.append(self._new_contexts())
            self._contexts[0].executor(manifest.max_batch)  # what is refused is refused now
        except BaseException:
            self.close()
            raise

    @staticmethod
    def default_precision() -> str:
        return "fp16"

    @classmethod
    def check_device(cls, device: str | Device | None) -> None:
        _open(device)

    @classmethod
    def make(cls, manifest: Manifest, state: Mapping[str, Tensor], request: Request) -> Payload:
        """As `Engine.make`; takes minutes, and the whole GPU."""
        from yolov4_fast.engines.onnx_export import output_names

        device = _open(request.device)
        found = device.properties
        if manifest.precision == "bf16" and found.sm < BF16_SM:
            raise DeviceError(
                f"precision bf16 needs a GPU from sm_{BF16_SM} (Ampere) on, and {found.name} is "
                f"sm_{found.sm}: build for precision fp16"
            )
        options = request.tensorrt or TensorRtOptions()
        if options.sizes is not None:
            raise EngineError(
                "an engine has one input size: sizes that are open are for `export` of a plan"
            )
        model = _model(manifest, state, request)
        with device.active():
            built = build_plan(
                model,
                options,
                max_batch=manifest.max_batch,
                gpu=Gpu(found.name, found.sm),
                progress=request.progress,
                alter=channels_last,
            )
        facts = {**built.facts, "maps": output_names(manifest.network)}
        return {PLAN: built.plan, FACTS: json.dumps(facts, indent=1).encode()}

    def learnt(self) -> Payload:
        with self._guard, CAPTURING, self._device.active():
            return {LAYERS: self._opened().layers().encode()}

    def pipeline(self, settings: Settings) -> Pipeline:
        with self._guard:  # what is made here, `close` sees
            self._opened()
            made = CudaPipeline(self._contexts[0], settings, self._runtime)
            self._pipelines.add(made)
            return made

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        try:
            contexts = self._idle.pop()
        except IndexError:
            contexts = self._new_contexts()
        try:
            return contexts.run(images)
        finally:
            self._idle.append(contexts)

    def close(self) -> None:
        with self._guard:
            plan, self._plan = self._plan, None
        with self._device.active(), ExitStack() as last_first:  # each also where one before raises
            last_first.callback(self._runtime.close)
            if plan is not None:
                last_first.callback(_close, plan)
            for contexts in self._contexts:
                last_first.callback(contexts.close)
            for pipeline in list(self._pipelines):  # their graphs hold contexts and memory
                last_first.callback(pipeline.close)

    def _new_contexts(self) -> Contexts:
        with self._guard:
            made = Contexts(self._opened(), self.manifest, self.device, self._runtime)
            self._contexts.append(made)
            return made

    def _opened(self) -> Plan:
        if self._plan is None:
            raise EngineError("the engine is closed")
        return self._plan


def _close(plan: Plan) -> None:
    with CAPTURING:
        plan.close()


def _open(device: str | Device | None) -> Device:
    """The device, if the engine can run there. Raises DeviceError for what the machine lacks."""
    opened = open_device(device, "tensorrt")
    if not find_spec("triton"):
        raise DeviceError(
            "the tensorrt engine needs Triton for resize and decode: pip install triton"
        )
    try:
        load_tensorrt()
    except EngineError as error:  # no fault of an engine file
        raise DeviceError(str(error)) from None
    load_pycuda()
    return opened


def _model(manifest: Manifest, state: Mapping[str, Tensor], request: Request) -> bytes:
    """The ONNX that the plan is built of, its types those of the precision."""
    if request.images is None:
        from yolov4_fast.engines.onnx_export import export_onnx

        with torch.inference_mode():
            model = export_onnx(manifest.network, state, precision=manifest.precision)
    else:
        from yolov4_fast.engines.quantize import quantize

        model = quantize(
            manifest.network,
            state,
            request.images,
            method=request.calibration_method,
            types="fp16",
            progress=request.progress,
        ).model
    return model.SerializeToString()
