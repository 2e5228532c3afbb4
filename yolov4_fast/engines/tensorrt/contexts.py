"""The contexts of a plan, one per batch size, over one block of device memory.

    image       [B, height, width, 3] float32
    maps        [B, h, w, A * (5 + classes)] float32 of each head
    scratch     what TensorRT needs for its own tensors

Each is as large as the largest batch needs and serves every batch size: contexts of one `Contexts`
never run at once. Several `Contexts` of one plan do, each in memory of its own, so each thread that
runs the network takes one.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.runtime import CAPTURING, Lane, Work
from yolov4_fast.engines.engine import EngineError, Manifest
from yolov4_fast.engines.tensorrt.plan import Plan, Port
from yolov4_fast.network.layers import Network

LINE = 256  # bytes that every part of the block begins at a multiple of


class StreamRuntime(Protocol):
    """What is needed of CUDA: these of a `Runtime`, and the handle of the current stream."""

    def lane(self) -> Lane: ...

    def current(self) -> Lane: ...

    def memory(self, *shape: int, dtype: torch.dtype, lane: Lane) -> Tensor: ...

    def pool(self) -> Any: ...

    def capture(self, work: Work, pool: Any) -> Work: ...

    def handle(self) -> int: ...


class Executor:
    """Runs the network on what `image` holds and leaves the raw maps in `maps`.

    image: [B, height, width, 3] float32, to be written before a run: RGB in 0..1. maps: [B, h, w,
    A * (5 + classes)] float32 of each head, valid after it. Whoever runs it holds
    `Contexts.exclusive` from writing the image to reading the maps.
    """

    def __init__(self, image: Tensor, maps: tuple[Tensor, ...], run: Work, runtime: StreamRuntime):
        self.image = image
        self.maps = maps
        self.run = run  # enqueues on the current stream
        self._runtime = runtime
        self._graph: Work | None = None

    def captured(self, lane: Lane) -> Work:
        """The same as a graph; made at the first call, which runs the network on whatever is in
        `image`, in the lane: TensorRT brings its own state up to date in a run that is not
        captured.
        """
        if self._graph is None:
            lane.run(self.run)
            self._graph = self._runtime.capture(self.run, self._runtime.pool())
        return self._graph


class Contexts:
    """A `Runner`: what a pipeline needs of an engine. manifest: of the engine. One that is dropped
    waits for its work as `close` does.

    Raises DeviceError where the memory does not suffice.
    """

    def __init__(
        self, plan: Plan, manifest: Manifest, device: torch.device, runtime: StreamRuntime
    ) -> None:
        self.lock = threading.RLock()
        self.device = device
        self._plan: Plan | None = plan
        self._manifest = manifest
        self._runtime = runtime
        self._executors: dict[int, Executor] = {}
        self._last: deque[Any] = deque(maxlen=1)  # the mark behind the last work in the block
        self._begins, size = _layout(plan, max(manifest.max_batch, plan.least))
        self._shapes = tuple(port.shape for port in plan.maps)
        self._lane: Lane = runtime.lane()
        with torch.inference_mode(False):  # whose tensors nobody may write to outside of it
            self._block = runtime.memory(size, dtype=torch.uint8, lane=self._lane)
        weakref.finalize(self, _dispose, self._executors, self._last).atexit = False

    @property
    def network(self) -> Network:
        return self._manifest.network

    @property
    def height(self) -> int:
        return self._manifest.network.height

    @property
    def width(self) -> int:
        return self._manifest.network.width

    @property
    def max_batch(self) -> int:
        return self._manifest.max_batch

    def executor(self, batch: int) -> Executor:
        """What runs the network on `batch` images, 1 to `max_batch`. Raises EngineError."""
        with self.lock:
            if self._plan is None:
                raise EngineError("the engine is closed")
            if batch not in self._executors:
                # Under the lock of captures: TensorRT allocates, and may wait for the device.
                with CAPTURING, self._lane.active(), torch.inference_mode(False):
                    self._executors[batch] = self._executor(self._plan, batch)
            return self._executors[batch]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The block for this thread alone, and for its current stream: what it enqueues runs after
        all that others enqueued while they held the block. The host does not wait for the device.
        Raises EngineError.
        """
        with self.lock:
            if self._plan is None:  # then streams are gone too, and take no marks
                raise EngineError("the engine is closed")
            current = self._runtime.current()
            for last in self._last:
                current.wait(last)
            try:
                yield
            finally:
                self._last.append(current.mark())

    @torch.inference_mode()
    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `Engine.run`: in the order of the caller's stream, which is not waited for."""
        batch, caller, lane = len(images), self._runtime.current(), self._lane
        maps = tuple(
            torch.empty((batch, *shape), dtype=torch.float32, device=self.device)
            for shape in self._shapes
        )
        with lane.active(), self.exclusive():
            executor = self.executor(batch)
            replay = executor.captured(lane)

            def work() -> None:
                executor.image.copy_(images.permute(0, 2, 3, 1))
                replay()
                for mine, theirs in zip(maps, executor.maps, strict=True):
                    mine.copy_(theirs.permute(0, 3, 1, 2))

            lane.wait(caller.mark())  # the images are there, and the maps' memory is free
            try:
                lane.run(work)
            finally:  # what a run that fails has begun reads and writes them too
                caller.wait(lane.mark())
        return maps

    def close(self) -> None:
        """Wait for what is under way, and free contexts and memory."""
        with self.lock:
            try:
                _dispose(self._executors, self._last)  # raises what the device reports
            finally:
                self._plan = None
                self._block = torch.empty(0)

    def _executor(self, plan: Plan, batch: int) -> Executor:
        rows = max(batch, plan.least)  # of a plan for no fewer, the others are whatever they are
        *begins, scratch = self._begins
        ports = (plan.image, *plan.maps)
        views = [self._view(port, begin, rows) for port, begin in zip(ports, begins, strict=True)]
        addresses = {port.name: view.data_ptr() for port, view in zip(ports, views, strict=True)}
        context = plan.context(rows, addresses, self._block.data_ptr() + scratch)
        runtime = self._runtime

        def run() -> None:
            plan.enqueue(context, runtime.handle())

        image, *maps = (view[:batch] for view in views)
        return Executor(image, tuple(maps), run, runtime)

    def _view(self, port: Port, begin: int, rows: int) -> Tensor:  # [rows, h, w, C]
        channels, height, width = port.shape
        part = self._block[begin : begin + rows * port.bytes].view(torch.float32)
        return part.view(rows, height, width, channels)


def _dispose(executors: dict[int, Executor], last: deque[Any]) -> None:
    """Free graphs and contexts once nothing runs in their memory: all that did comes before the
    last mark, whoever enqueued it.
    """
    try:
        while last:
            last.pop().synchronize()
    finally:
        with CAPTURING:
            executors.clear()


def _layout(plan: Plan, rows: int) -> tuple[list[int], int]:
    """Where image, maps and scratch begin, and the bytes of the whole."""
    begins, end = [], 0
    for size in (rows * plan.image.bytes, *(rows * port.bytes for port in plan.maps), plan.scratch):
        begins.append(end)
        end += -(-size // LINE) * LINE
    return begins, end
