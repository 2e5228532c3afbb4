"""The CUDA engine, the default on NVIDIA GPUs: the fused plan of a network over one arena, each
step run by the fastest kernel that computes it rightly on this GPU.

The arena is as large as the largest batch needs, known before anything runs, and shared by all
batch sizes. Kernels are chosen for batches of 1 and of `max_batch`; another size takes the choice
of the nearer one. The choices are kept in the user's cache folder and in the engine file, which is
bound to the GPU it was made on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import RLock
from weakref import WeakSet

import torch
from safetensors.torch import save
from torch import Tensor

from yolov4_fast.engines.cuda.autotune import tune
from yolov4_fast.engines.cuda.choices import (
    Key,
    environment,
    read_choices,
    write_choices,
)
from yolov4_fast.engines.cuda.compilation import compile_ahead
from yolov4_fast.engines.cuda.cudnn_graphs import Cudnn, available
from yolov4_fast.engines.cuda.cudnn_plans import PlanStore
from yolov4_fast.engines.cuda.device import Device, Run, check_precision, open_device
from yolov4_fast.engines.cuda.executor import Bound, Executor
from yolov4_fast.engines.cuda.fp8 import calibrate
from yolov4_fast.engines.cuda.kernels import CUDNN, Kernels
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.members import (
    SCALES,
    TUNING,
    WEIGHTS,
    read_scales,
    read_state,
    read_tuning,
)
from yolov4_fast.engines.cuda.numbers import Filters, Types
from yolov4_fast.engines.cuda.pipeline import CudaPipeline, image_bytes
from yolov4_fast.engines.cuda.plan import Step
from yolov4_fast.engines.cuda.reference import Weights
from yolov4_fast.engines.cuda.scratch import Scratch
from yolov4_fast.engines.cuda.trial import StepTrial
from yolov4_fast.engines.engine import DeviceError, Engine, EngineError, Manifest
from yolov4_fast.engines.pipeline import Pipeline, Settings
from yolov4_fast.network.layers import Network
from yolov4_fast.zoo import cache_folder

logger = logging.getLogger(__name__)

ASIDE = 192 * 2**20  # bytes that code, scratch memory and captured graphs may take


class CudaEngine(Engine):
    """payload: `weights.safetensors`, the float32 state dict of the folded network; `fp8.json`, the
    scales of precision fp8; `tuning.json`, the kernels that were chosen where the file was made.

    device: such as "cuda:1", the current one by default.
    """

    kind = "cuda"
    precisions = ("fp16", "bf16", "f32", "fp8")
    members = (WEIGHTS,)

    def __init__(
        self,
        manifest: Manifest,
        payload: Mapping[str, bytes],
        device: str | Device | None = None,
    ) -> None:
        self.lock = RLock()
        self._pipelines: WeakSet[Pipeline] = WeakSet()
        self._device = open_device(device)
        self.device = self._device.torch_device
        found = self._device.properties
        gpu = {"name": found.name, "sm": str(found.sm)}
        if manifest.gpu is not None and dict(manifest.gpu) != gpu:
            raise EngineError(
                f"it was made on {_named(manifest.gpu)}, and {self.device} is {_named(gpu)}"
            )
        check_precision(found, manifest.precision)
        self.manifest = replace(manifest, gpu=gpu)
        state = read_state(manifest.network, payload)
        self.plan = lower(manifest.network)
        self._types = Types(
            self.plan, manifest.precision, read_scales(manifest.precision, payload, self.plan)
        )
        self._check_memory(state)
        self._no_cudnn = _no_cudnn(self._device, manifest.precision)
        cudnn = Cudnn(self.device) if self._no_cudnn == "" else None
        # Not in inference mode, whose tensors nobody may write to outside of it: `executor.image`.
        with self._memory_errors("to load it"), torch.inference_mode(False):
            filters = Filters.of(self._types, state, self.device)
            self._storage: Tensor | None = torch.empty(
                self._types.bytes(self.max_batch), dtype=torch.uint8, device=self.device
            )
        store = PlanStore(cache_folder() / "cudnn")
        self._kernels = Kernels(filters, self._device, cudnn, store)
        self._executors: dict[int, Executor] = {}
        self._last: object = None  # the mark behind the last work in the arena
        self._choices = read_choices(environment(self._device))
        self._choices.update(read_tuning(payload))
        self._choose(*sorted({1, self.max_batch}), measure=True)

    @staticmethod
    def default_precision() -> str:
        return "fp16"

    @classmethod
    def check_device(cls, device: str | Device | None) -> None:
        open_device(device)

    @staticmethod
    def payload(network: Network, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        return {WEIGHTS: save(dict(state))}

    @classmethod
    def calibrate(
        cls,
        manifest: Manifest,
        state: Mapping[str, Tensor],
        images: Iterable[Tensor],
        device: str | Device | None = None,
        method: str | None = None,
    ) -> dict[str, bytes]:
        """As `Engine.calibrate`, by the largest values; runs on the device that the engine is
        for.
        """
        if method is not None:
            raise EngineError(f"the cuda engine has no choice of calibration method: {method!r}")
        target = open_device(device)
        check_precision(target.properties, manifest.precision)
        _no_cudnn(target, manifest.precision)
        plan = lower(manifest.network)
        with torch.inference_mode():
            return {SCALES: calibrate(plan, state, images, target.torch_device).to_json()}

    def learnt(self) -> dict[str, bytes]:
        keys = {key for batch in {1, self.max_batch} for key in self._keys(batch)}
        return {TUNING: self._choices.only(keys).to_json()}

    def pipeline(self, settings: Settings) -> Pipeline:
        made = CudaPipeline(self, settings)
        self._pipelines.add(made)
        return made

    @property
    def weights(self) -> Weights:
        """Stored filters and biases of convolutions, weights and slopes of sums, by `step.key`."""
        return self._kernels.filters.weights

    def seconds(self, run: Run) -> float:
        """Time of a kernel on the device, launch costs left out."""
        return self._device.seconds(run)

    def executor(self, batch: int) -> Executor:
        """What runs the network on `batch` images, 1 to `max_batch`; made at the first call, which
        may take seconds. Raises EngineError.
        """
        with self.lock:
            if self._storage is None:
                raise EngineError("the engine is closed")
            if not 1 <= batch <= self.max_batch:
                raise EngineError(
                    f"a batch of {batch} images: this engine runs 1 to {self.max_batch}"
                )
            if batch not in self._executors:
                self._choose(batch, measure=False)
                self._executors[batch] = self._executor(batch, self._storage)
            return self._executors[batch]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The arena for this thread alone, and for its current stream: what it enqueues runs after
        all that others enqueued while they held the arena. The host does not wait for the device.
        """
        with self.lock, self._device.active():
            if self._last is not None:
                self._device.wait(self._last)
            try:
                yield
            finally:
                self._last = self._device.mark()

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        with self.exclusive(), torch.inference_mode():
            executor = self.executor(images.shape[0])
            run = executor.captured()  # before the image is there: capturing overwrites it
            executor.image.copy_(images.permute(0, 2, 3, 1))
            run()
            maps = (raw.permute(0, 3, 1, 2) for raw in executor.maps)
            return tuple(
                torch.empty(raw.shape, dtype=torch.float32, device=self.device).copy_(raw)
                for raw in maps
            )

    def close(self) -> None:
        for pipeline in list(self._pipelines):  # their graphs hold the arena
            pipeline.close()
        with self.lock:
            self._device.synchronize()
            self._executors.clear()
            self._storage = None
            self._kernels.close()

    def _keys(self, batch: int) -> dict[Key, Step]:
        """The distinct steps at a batch size."""
        return {self._kernels.key(step, batch): step for step in self.plan.steps}

    def _choose(self, *batches: int, measure: bool) -> None:
        """See to it that a kernel is chosen for every step. Raises EngineError."""
        steps = {key: step for batch in batches for key, step in self._keys(batch).items()}
        for key, step in steps.items():
            known = self._choices.table.get(key)
            if known is not None and not self._kernels.knows(known.kernel, step):
                del self._choices.table[key]
        missing = [key for key in steps if not self._choices.settled(key, measure)]
        if not missing:
            return
        trials = {key: partial(StepTrial, self._kernels, steps[key], key.batch) for key in missing}
        doing = f"to choose kernels at batch {max(batches)}"
        with self._memory_errors(doing), self._device.active(), torch.inference_mode():
            if measure and self._device.compilers:
                candidates = [(steps[key], key.batch) for key in missing]
                compile_ahead(self._kernels, candidates, self._device.compilers)
            try:
                tune(trials, self._choices, self._device.seconds, measure=measure)
            finally:  # what was learnt before an error or Ctrl-C is not measured again
                write_choices(self._choices)
        if measure and self._no_cudnn:
            logger.warning("%s; the engine does without cuDNN's fused kernels", self._no_cudnn)

    def _executor(self, batch: int, storage: Tensor) -> Executor:
        scratch = Scratch(self.device)
        with self.exclusive(), torch.inference_mode(False), torch.no_grad():
            memory, steps = self._types.memory(batch, storage), []
            for step in self.plan.steps:
                name = self._choices.table[self._kernels.key(step, batch)].kernel
                run = self._kernels.make(name, step, batch, memory.tensor, scratch)
                steps.append(Bound(step, name, run))
            executor = Executor(memory, steps, self._device)
            memory.image.zero_()
            executor.run()  # what is compiled or loaded at the first launch cannot be captured
        return executor

    @contextmanager
    def _memory_errors(self, doing: str) -> Iterator[None]:
        """Says what torch finds out only when it tries. Raises DeviceError."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.device} ({self._device.properties.name}) has too little free memory "
                f"{doing}: build with a smaller max_batch than {self.max_batch} ({error})"
            ) from None

    def _check_memory(self, state: Mapping[str, Tensor]) -> None:
        """Raises DeviceError where the largest batch does not fit, arena and a pipeline."""
        free = self._device.free_memory()
        fixed = ASIDE + self._types.weight_bytes(state)
        image = self._types.bytes(1) + image_bytes(self.network)
        needed = fixed + self.max_batch * image
        if needed <= free:
            return
        fits = max(0, (free - fixed) // image)
        remedy = f"a max_batch of {fits} would fit" if fits else "not even a batch of 1 fits"
        raise DeviceError(
            f"the engine needs {_mb(needed)} at batch {self.max_batch}, and {_mb(free)} of "
            f"{_mb(self._device.properties.memory)} are free on {self.device} "
            f"({self._device.properties.name}): {remedy}"
        )


def _no_cudnn(device: Device, precision: str) -> str | None:
    """Why cuDNN's fused kernels cannot be tried; empty where they can, None where they are not to
    be: in float32 all of them use TF32. Raises EngineError where nothing runs without them.
    """
    if CUDNN not in device.backends or precision == "f32":
        return None
    reason = available() or ""
    if reason and precision == "fp8":
        raise EngineError(f"precision fp8 runs on cuDNN's fused kernels only: {reason}")
    return reason


def _named(gpu: Mapping[str, str]) -> str:
    return f"{gpu.get('name', 'an unnamed GPU')} (sm_{gpu.get('sm', '?')})"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
