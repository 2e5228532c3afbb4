"""The whole of detection on a GPU: one copy in, one CUDA graph (resize, network, decode, NMS,
pack), one copy out, each on a stream of its own, so that chunks overlap.

A pipeline has two slots. A slot takes a chunk from its images to what was found in them, in memory
of its own, and is taken again only when the host has read that: nothing on the device ever waits
for a slot. What slots and the pipelines of one engine have in common is the engine's arena; they
hold it one after another (`CudaEngine.exclusive`).

How many candidates and detections there will be is not known beforehand. Buffers are made for a
usual number; what does not fit is seen in the result (the counts say how many there were), and then
the chunk runs again in larger ones, which stay. So results are exact, and no data decides a size
within the graph.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence

from torch import Tensor

from yolov4_fast.engines.cuda.line import Line, Runner
from yolov4_fast.engines.cuda.runtime import CudaRuntime, Lane, Runtime
from yolov4_fast.engines.cuda.slot import (
    Recorded,
    Slot,
    Ticket,
    forget,
    graph_bytes,
    held_bytes,
    synchronize,
)
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.pipeline import Pipeline, Settings
from yolov4_fast.network.layers import Network


class CudaPipeline(Pipeline):
    """Memory is taken at the first chunk. A chunk runs as a batch of 1, 2, 3, 4, 6, 8, 12, 16, 24,
    32, ... or `max_batch`, whichever is the next: each has its graph, and few are enough.

    runtime: CUDA on the engine's device by default.
    """

    depth = 2

    def __init__(self, engine: Runner, settings: Settings, runtime: Runtime | None = None) -> None:
        self._line = Line(engine, settings, runtime or CudaRuntime(engine.device))
        self._batches = batch_sizes(engine.max_batch)
        self._guard = threading.Lock()  # of the following, and never held for long
        self._slots = tuple(Slot(self._line) for _ in range(self.depth))
        self._claims = [0] * self.depth  # threads that have chosen a slot and not begun yet
        self._last = [0] * self.depth  # when it was chosen
        self._closed = False
        for slot in self._slots:
            weakref.finalize(slot, _dispose, slot.graphs, self._line.lanes).atexit = False

    def submit(self, images: Sequence[Tensor]) -> Ticket:
        if not 1 <= len(images) <= self._batches[-1]:
            raise EngineError(
                f"a chunk of {len(images)} images: this engine runs 1 to {self._batches[-1]}"
            )
        device = self._line.engine.device
        images = [image.to(device) if image.is_cuda else image for image in images]
        batch = self._batches[bisect_left(self._batches, len(images))]
        number = self._claim()
        try:
            slot = self._slots[number]
            with slot.lock:
                if self._closed:
                    raise EngineError("the pipeline is closed")
                return slot.start(images, batch)
        finally:
            with self._guard:
                self._claims[number] -= 1

    def close(self) -> None:
        self._closed = True
        for slot in self._slots:
            with slot.lock:
                slot.free()

    def _claim(self) -> int:
        """Choose a slot: an idle one, the first as long as that will do, else the one that has been
        busy for the longest.
        """
        with self._guard:
            waiting = [
                claims + (slot.ticket is not None)
                for claims, slot in zip(self._claims, self._slots, strict=True)
            ]
            number = min(
                range(self.depth), key=lambda n: (waiting[n], self._last[n] if waiting[n] else n)
            )
            self._claims[number] += 1
            self._last[number] = max(self._last) + 1
            return number


def image_bytes(network: Network) -> int:
    """Of the device, that a pipeline takes beside the arena for each image of its largest chunk, of
    pictures of full HD from host memory, with the buffers that it begins with.

    The kernels allocate in the graphs of each slot, and once more where they run before a capture:
    torch keeps that for the next one.
    """
    slots = CudaPipeline.depth
    return slots * held_bytes() + (slots + 1) * graph_bytes(network)


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two and halfway between them, up to `largest` and with it."""
    powers = [2**n for n in range(largest.bit_length())]
    sizes = {size for power in powers for size in (power, power * 3 // 2)}
    return (*sorted(size for size in sizes if size < largest), largest)


def _dispose(graphs: dict[int, Recorded], lanes: Sequence[Lane]) -> None:
    """Before a slot's memory goes, nothing may be running in it."""
    synchronize(lanes)
    forget(graphs)
