"""What the pipeline asks of CUDA: streams that wait for each other, memory on both sides, and one
graph of many kernels.

`CudaRuntime` asks torch. The pipeline takes any `Runtime`, so that its tests run it without a GPU,
on one that delays all work as long as its streams and marks allow.

Three traps of torch's, and how they are avoided here:
- `torch.cuda.Stream()` hands out 32 streams in turn, so two of them may be the same. Work that one
  thread queues while another captures on the same stream would end up in the graph. So nothing is
  ever queued on the stream that captures: it has a priority of its own, and so a pool of its own.
- While a stream captures, some calls fail, or spoil the capture, from any thread: waiting for the
  whole device, freeing a graph, beginning another capture. All of ours take CAPTURING for them.
- Memory whose use on a stream was told to the allocator (`record_stream`) is queried for when it is
  freed, which fails while that stream captures. Whoever holds memory keeps it until the host knows
  that its work is done, and nothing is told to the allocator.
"""

from __future__ import annotations

import gc
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]  # enqueues kernels on the current stream and returns at once

CAPTURING = threading.RLock()  # one capture at a time in a process
PRIORITY = -1  # of the streams that capture; those of lanes have 0


class Mark(Protocol):
    """A point in a lane."""

    def synchronize(self) -> None:
        """Wait on the host until the lane has come here. Raises what the device reports."""


class Lane(ABC):
    """A stream: its work runs in order, and beside that of other lanes."""

    @abstractmethod
    def active(self) -> AbstractContextManager[object]:
        """Makes it this thread's current stream, and its device the current one."""

    @abstractmethod
    def run(self, work: Work) -> None:
        """Enqueue."""

    @abstractmethod
    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Enqueue a copy between contiguous tensors of pinned host memory and the device's."""

    @abstractmethod
    def mark(self) -> Any:
        """A `Mark` after all that was enqueued until now."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """What is enqueued from now on begins after the mark, a lane's of the same runtime."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait on the host for all that was enqueued."""


class Runtime(ABC):
    """resize, table_row and decode: the kernels of `ops.kernels` by those names."""

    resize: Callable[[Tensor, Tensor], None]
    table_row: Callable[[Tensor, tuple[int, int, int, int]], list[int]]
    decode: Callable[..., None]

    @abstractmethod
    def holds(self, image: Tensor) -> bool:
        """Whether it lies in the device's memory."""

    @abstractmethod
    def lane(self) -> Lane:
        """A new one."""

    @abstractmethod
    def current(self) -> Lane:
        """The current stream of this thread."""

    @abstractmethod
    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory."""

    @abstractmethod
    def memory(self, *shape: int, dtype: torch.dtype, lane: Lane) -> Tensor:
        """Memory of the device, contents undefined. lane: the first that will use it; others only
        after a mark of it.
        """

    @abstractmethod
    def pool(self) -> Any:
        """A pool of memory for graphs none of which runs beside another."""

    @abstractmethod
    def capture(self, work: Work, pool: Any) -> Work:
        """`work` as one graph; it must have run before. What it allocates and frees lies in `pool`,
        where all graphs of the pool have it in common: nothing there outlasts a run.
        """


class CudaLane(Lane):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def run(self, work: Work) -> None:
        with self.active():
            work()

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with self.active():
            destination.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        return self._stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def synchronize(self) -> None:
        self._stream.synchronize()


class CudaRuntime(Runtime):
    """Of one GPU. Needs Triton."""

    _captures: dict[torch.device, torch.cuda.Stream] = {}  # noqa: RUF012  of all runtimes together

    def __init__(self, device: torch.device) -> None:
        from yolov4_fast.ops.kernels import decode, resize

        self.resize = resize.launch
        self.table_row = resize.table_row
        self.decode = decode.append
        self._device = device

    def holds(self, image: Tensor) -> bool:
        return image.device == self._device

    def lane(self) -> CudaLane:
        return CudaLane(torch.cuda.Stream(self._device))

    def current(self) -> CudaLane:
        return CudaLane(torch.cuda.current_stream(self._device))

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        with torch.cuda.device(self._device):  # else pinning would start up the current one
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    def memory(self, *shape: int, dtype: torch.dtype, lane: Lane) -> Tensor:
        with lane.active():  # the allocator hands out what this stream was the last to use
            return torch.empty(shape, dtype=dtype, device=self._device)

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, work: Work, pool: Any) -> Work:
        with CAPTURING, torch.cuda.device(self._device), _without_collector():
            if self._device not in self._captures:
                self._captures[self._device] = torch.cuda.Stream(self._device, priority=PRIORITY)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph,
                pool=pool,
                stream=self._captures[self._device],
                capture_error_mode="thread_local",  # other threads go on using the GPU meanwhile
            ):
                work()
        return graph.replay


@contextmanager
def _without_collector() -> Iterator[None]:
    """Holds Python's garbage collector off: it may free a graph at any moment."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
