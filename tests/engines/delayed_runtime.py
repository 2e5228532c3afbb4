"""A stand-in for CUDA that is as late as CUDA may be: work is only queued, and runs, in an order
drawn by chance, when the host waits for a mark. What neither a lane nor a mark orders happens in
any order, the kernels of one graph among those of another, so a missing wait, or memory reused too
early, gives wrong results.

Memory is the CPU's, and the kernels are the ops' CPU implementations, given what a GPU is given.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from yolov4_fast import ops
from yolov4_fast.engines.cuda.runtime import Lane, Runtime, Work

CODES = {torch.uint8: 0, torch.float32: 1}


class DelayedMark:
    def __init__(self, runtime: DelayedRuntime) -> None:
        self._runtime = runtime
        self.reached = False

    def synchronize(self) -> None:
        self._runtime.run_until(self)


class Running:
    """Queued work on a thread of its own, which moves only while `step` waits for it."""

    def __init__(self, work: Work, threads: threading.local) -> None:
        self.done = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, threads), daemon=True)
        self._thread.start()

    def _run(self, work: Work, threads: threading.local) -> None:
        threads.running = self
        self._go.acquire()
        try:
            with torch.inference_mode():
                work()
        except BaseException as error:
            self._error = error
        self.done = True
        self._stopped.release()

    def pause(self) -> None:
        """On its thread: let other work go first."""
        self._stopped.release()
        self._go.acquire()

    def step(self) -> None:
        """Up to the next pause, or to the end."""
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error


class DelayedLane(Lane):
    def __init__(self, runtime: DelayedRuntime) -> None:
        self._runtime = runtime
        self.queue: deque[tuple[DelayedMark | None, Work]] = deque()  # work runs after the mark
        self.running: Running | None = None

    @property
    def ready(self) -> bool:
        if self.running is not None or not self.queue:
            return self.running is not None
        mark = self.queue[0][0]
        return mark is None or mark.reached

    def step(self) -> None:
        """A part of the first work in the queue."""
        running = self.running or Running(self.queue.popleft()[1], self._runtime.threads)
        self.running = None
        running.step()
        if not running.done:
            self.running = running

    @contextmanager
    def active(self) -> Iterator[None]:
        threads = self._runtime.threads
        before = getattr(threads, "lane", None)
        threads.lane = self
        try:
            yield
        finally:
            threads.lane = before

    def run(self, work: Work) -> None:
        self._runtime.launches += 1
        self._push(None, work)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        assert destination.is_contiguous() and source.is_contiguous()
        assert destination.shape == source.shape and destination.dtype == source.dtype
        self._runtime.copies.append(destination.nbytes)

        def copy() -> None:
            destination.copy_(source)

        self._push(None, copy)

    def mark(self) -> DelayedMark:
        mark = DelayedMark(self._runtime)

        def reach() -> None:
            mark.reached = True

        self._push(None, reach)
        return mark

    def wait(self, mark: DelayedMark) -> None:
        self._push(mark, lambda: None)

    def synchronize(self) -> None:
        self.mark().synchronize()

    def _push(self, mark: DelayedMark | None, work: Work) -> None:
        with self._runtime.lock:
            self.queue.append((mark, work))


class DelayedRuntime(Runtime):
    """seed: of the order. held: tensors that lie on the device, which are read in place."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.threads = threading.local()
        self.held: list[Tensor] = []
        self.copies: list[int] = []  # bytes of each
        self.launches = 0
        self.captures = 0
        self._random = random.Random(seed)
        self._lanes: list[DelayedLane] = []
        self._default = self.lane()

    def run_until(self, mark: DelayedMark) -> None:
        with self.lock:
            while not mark.reached:
                ready = [lane for lane in self._lanes if lane.ready]
                assert ready, "the host waits for ever: a lane waits for what was never queued"
                self._random.choice(ready).step()

    def pause(self) -> None:
        """Between two kernels."""
        running = getattr(self.threads, "running", None)
        if running is not None:
            running.pause()

    def holds(self, image: Tensor) -> bool:
        return any(image is held for held in self.held)

    def lane(self) -> DelayedLane:
        lane = DelayedLane(self)
        self._lanes.append(lane)
        return lane

    def current(self) -> DelayedLane:
        return getattr(self.threads, "lane", None) or self._default

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return poisoned(shape, dtype)

    def memory(self, *shape: int, dtype: torch.dtype, lane: Lane) -> Tensor:
        assert lane in self._lanes
        return poisoned(shape, dtype)

    def pool(self) -> object:
        return object()

    def capture(self, work: Work, pool: object) -> Work:
        self.captures += 1
        return work

    # The kernels.

    @staticmethod
    def table_row(image: Tensor, region: Sequence[int]) -> list[int]:
        return [image.data_ptr(), *image.shape[:2], *image.stride(), CODES[image.dtype],
                *region, 0]  # fmt: skip

    def resize(self, table: Tensor, out: Tensor) -> None:
        for row, target in zip(table.tolist(), out, strict=True):
            resized = torch.ops.yolov4_fast.resize([at(row)], row[7:11], *out.shape[1:3])
            target.copy_(resized[0].permute(1, 2, 0))
        self.pause()

    def decode(
        self,
        maps: Sequence[Tensor],
        anchors: Any,
        scale_x_y: Any,
        new_coords: Any,
        height: int,
        width: int,
        confidence: float,
        placement: Tensor | None,
        boxes: Tensor,
        scores: Tensor,
        class_ids: Tensor,
        numbers: Tensor,
        counts: Tensor,
    ) -> None:
        """Appends in any order, and of too many any, as threads of a GPU do."""
        self.pause()
        found = ops.decode(
            [raw.permute(0, 3, 1, 2).float() for raw in maps],
            anchors, scale_x_y, new_coords, height, width, confidence, placement,
        )  # fmt: skip
        for image, count in enumerate(found.counts.tolist()):
            order = torch.tensor(self._random.sample(range(count), count), dtype=torch.int64)
            order = order[: boxes.shape[1]]
            for part, values in zip((boxes, scores, class_ids), found[:3], strict=True):
                part[image, : len(order)] = values[image, order]
            numbers[image, : len(order)] = order.int()
        counts.copy_(found.counts)
        self.pause()


def at(row: Sequence[int]) -> Tensor:
    """The image that a row of the table describes."""
    address, height, width, *strides, code = row[:7]
    dtype = next(dtype for dtype, number in CODES.items() if number == code)
    reach = zip((height, width, 3), strides, strict=True)
    elements = 1 + sum((size - 1) * step for size, step in reach)
    block = (ctypes.c_uint8 * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(block, dtype=dtype).as_strided((height, width, 3), strides)


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.view(-1).view(torch.uint8).fill_(0xFF)
    return tensor
