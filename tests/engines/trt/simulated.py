"""The TensorRT engine on the CPU: doubles of TensorRT and pycuda, and a runtime that is as late as
CUDA may be (tests/engines/delayed_runtime.py). Whenever the double of TensorRT runs a context,
the network itself runs, over the memory at the addresses that the context was given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from cpu_device import CpuDevice
from delayed_runtime import DelayedLane, DelayedMark, DelayedRuntime
from pycuda_double import PycudaDouble
from torch import Tensor
from trt_double import Double

from yolov4_fast import build_engine
from yolov4_fast.engines.cuda.runtime import Lane, Work
from yolov4_fast.engines.engine import Engine
from yolov4_fast.engines.tensorrt.engine import TensorRtEngine
from yolov4_fast.engines.tensorrt.options import TensorRtOptions
from yolov4_fast.engines.tensorrt.runtime import Block, PlanRuntime, Primary, Stream
from yolov4_fast.network.module import NetworkModule

MAX_BATCH = 5
OPTIONS = TensorRtOptions(timing_cache=None)
CPU = torch.device("cpu")
SCRATCH = 1000  # bytes that a context of the double says it needs


class SimulatedLane(DelayedLane):
    """A lane with a stream of the double; what runs in it finds it to be the current one. A stream
    that was freed takes nothing, not even a mark: CUDA may crash there.
    """

    stream: Stream | None = None

    @property
    def freed(self) -> bool:
        return self.stream is not None and self.stream.freed()

    def run(self, work: Work) -> None:
        def inside() -> None:
            with self.active():
                work()

        super().run(inside)

    def synchronize(self) -> None:
        if not self.freed:
            super().synchronize()

    def _push(self, mark: DelayedMark | None, work: Work) -> None:
        assert not self.freed, "the stream is gone"
        super()._push(mark, work)


class Simulated(DelayedRuntime):
    """Streams and memory as `PlanRuntime` has them; order and kernels as `DelayedRuntime`."""

    seed = 0

    def __init__(self, device: torch.device) -> None:
        self.primary = Primary(device)
        self._device = device
        super().__init__(self.seed)

    def lane(self) -> SimulatedLane:
        lane = SimulatedLane(self)
        if self._lanes:  # the first is the default stream
            lane.stream = self.primary.stream()
        self._lanes.append(lane)
        return lane

    def handle(self) -> int:
        self.pause()  # it is asked for just before the plan runs: other work may come between
        stream = self.current().stream
        return 0 if stream is None else stream.handle

    def memory(self, *shape: int, dtype: torch.dtype, lane: Lane) -> Tensor:
        assert lane in self._lanes
        return PlanRuntime.memory(self, *shape, dtype=dtype, lane=lane)

    host = PlanRuntime.host
    close = PlanRuntime.close


def as_tensor(block: Block, device: torch.device) -> Tensor:
    """In place of torch's reading of `__cuda_array_interface__`."""
    interface = block.__cuda_array_interface__
    assert interface["typestr"] == "|u1" and interface["strides"] is None
    ((size,), (address, read_only)) = interface["shape"], interface["data"]
    assert not read_only

    class Held(ctypes.c_uint8 * size):
        pass

    held = Held.from_address(address)
    held.block = block
    return torch.frombuffer(held, dtype=torch.uint8)


def at(address: int, *shape: int) -> Tensor:
    """float32 at an address, channels-last."""
    size = torch.Size(shape).numel()
    return torch.frombuffer(
        (ctypes.c_float * size).from_address(address), dtype=torch.float32
    ).view(shape)


def run_network(module: NetworkModule, streams: set[int]) -> Callable[[Any, int], None]:
    """For `Double.on_execute`: image and maps as the TensorRT engine lays them. streams: collects
    the handles.
    """

    def execute(context: Any, handle: int) -> None:
        streams.add(handle)
        addresses, shapes = context.state["addresses"], context.state["shapes"]
        ((name, (batch, channels, height, width)),) = shapes.items()
        image = at(addresses[name], batch, height, width, channels)
        with torch.inference_mode():
            maps = module(image.permute(0, 3, 1, 2).nan_to_num())
        outputs = [key for key in addresses if key != name]
        for key, raw in zip(outputs, maps, strict=True):
            raw = raw.permute(0, 2, 3, 1)
            at(addresses[key], *raw.shape).copy_(raw)

    return execute


def images_of(batch: int, engine: Engine, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, engine.height, engine.width, generator=made)


class Machine:
    """A machine with a GPU, TensorRT and pycuda; streams: handles that the network ran on."""

    def __init__(self, trt: Double, pycuda: PycudaDouble, module: NetworkModule, mini: Any):
        self.trt, self.pycuda, self.mini = trt, pycuda, mini
        self.streams: set[int] = set()
        trt.script["ICudaEngine.device_memory_size_v2"] = SCRATCH
        trt.on_execute = run_network(module, self.streams)

    def build(self, **options: Any) -> TensorRtEngine:
        options = {
            "precision": "f32", "max_batch": MAX_BATCH, "device": CpuDevice(),
            "tensorrt": OPTIONS,
        } | options  # fmt: skip
        made = build_engine(*self.mini, engine="tensorrt", **options)
        assert isinstance(made, TensorRtEngine)
        return made

    def run(self, engine: Engine, images: Tensor) -> list[Tensor]:
        """The maps, once the device has come so far."""
        maps = engine.run(images)
        self.wait(engine)
        return list(maps)

    def wait(self, engine: Engine) -> None:
        engine._runtime.current().synchronize()
