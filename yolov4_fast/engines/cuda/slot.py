"""A slot of the pipeline: the memory of one chunk, and its way through the device.

    inward lane     the images' bytes and where they lie, one copy
    compute lane    one graph: resize -> network -> decode -> NMS -> pack
    outward lane    what was kept, one copy

A slot is used by one thread at a time, who holds its lock. It begins a chunk only when the host has
read the last one, so its memory is idle whenever it is written, made larger or freed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov4_fast.engines.cuda.line import CANDIDATES, ROWS, Limits, Line, Runs
from yolov4_fast.engines.cuda.runtime import CAPTURING, Lane, Mark, Work
from yolov4_fast.engines.cuda.staging import Staging, image_bytes
from yolov4_fast.engines.pipeline import Found, Pending
from yolov4_fast.network.layers import Network
from yolov4_fast.ops.diou_nms import MAX_CANDIDATES, diou_nms, workspace_bytes
from yolov4_fast.ops.pack import pack

PACKED = (ROWS + 1) * 6 * 4  # bytes of an image's result, at first


@dataclass
class Recorded:
    """A graph with all that it reads and writes: its kernels know addresses only."""

    executor: Runs
    work: Work
    replay: Work


class Ticket(Pending):
    """A chunk in a slot, and then what was found in it."""

    def __init__(self, slot: Slot, images: Sequence[Tensor], batch: int) -> None:
        self.slot: Slot | None = slot
        self.images = images  # those on the device are read until the mark
        self.batch = batch
        self.mark: Mark | None = None
        self.found: list[Found] = []
        self.error: BaseException | None = None

    def result(self) -> list[Found]:
        slot = self.slot
        if slot is not None:
            with slot.lock:
                slot.settle(self)
        if self.error is not None:
            raise self.error
        return self.found

    def settled(self, found: list[Found], error: BaseException | None) -> None:
        self.found, self.error = found, error
        self.images, self.mark, self.slot = (), None, None


class Slot:
    def __init__(self, line: Line) -> None:
        self.lock = threading.RLock()
        self.ticket: Ticket | None = None  # the chunk in it that the host has not read
        self.graphs: dict[int, Recorded] = {}  # by batch size
        self._line = line
        self._staging = self._new_staging()
        self._pool: Any = None
        self._limits = Limits(0, 0)
        self._buffers: tuple[Tensor, ...] = ()
        self._packed = self._host = torch.empty(0)

    @torch.inference_mode()
    def start(self, images: Sequence[Tensor], batch: int) -> Ticket:
        """Begin a chunk, `batch` at least its length; the host reads the last one first."""
        if self.ticket is not None:
            self.settle(self.ticket)
        line, runtime = self._line, self._line.runtime
        ticket = Ticket(self, images, batch)
        try:
            with line.memory_for(batch):
                self._fit_buffers()
                if self._staging.fill(images, batch):
                    self._forget()
                line.compute.wait(line.inward.mark())
                if any(map(runtime.holds, images)):
                    line.compute.wait(runtime.current().mark())
                ticket.mark = self._launch(batch)
        except BaseException:
            synchronize(line.lanes)  # what was enqueued reads the slot and the images
            raise
        self.ticket = ticket
        return ticket

    @torch.inference_mode()
    def settle(self, ticket: Ticket) -> None:
        """Wait for a chunk and read what was found in it; nothing where that was done."""
        if ticket is not self.ticket:
            return
        line = self._line
        try:
            packed = self._read(ticket)
            while wider := self._limits.beyond(packed, line.most):
                line.widen(wider)
                with line.memory_for(ticket.batch):
                    self._fit_buffers()
                    ticket.mark = self._launch(ticket.batch)
                packed = self._read(ticket)
            ticket.settled([self._found(rows) for rows in packed], None)
        except BaseException as error:
            ticket.settled([], error)
            synchronize(line.lanes)
            if not isinstance(error, Exception):
                raise
        finally:
            self.ticket = None

    def free(self) -> None:
        """Settle, and let go of all memory; `start` takes it again."""
        if self.ticket is not None:
            self.settle(self.ticket)
        self._forget()
        self._limits = Limits(0, 0)
        self._buffers = ()
        self._packed = self._host = torch.empty(0)
        self._staging = self._new_staging()

    def _read(self, ticket: Ticket) -> np.ndarray:  # [n, rows + 1, 6]
        assert ticket.mark is not None
        ticket.mark.synchronize()
        return self._host[: len(ticket.images)].numpy()

    def _found(self, rows: np.ndarray) -> Found:
        kept, found = int(rows[0, 0]), int(rows[0, 1])
        best = rows[1 : kept + 1].copy()  # the next chunk is written over it
        dropped = max(0, found - MAX_CANDIDATES)
        if dropped:
            self._line.tell(found)
        return Found(best[:, :4], best[:, 4], best[:, 5].astype(np.int64), dropped)

    def _launch(self, batch: int) -> Mark:
        """Enqueue the graph and the copy out; their mark."""
        line = self._line
        with line.compute.active(), line.engine.exclusive():
            executor = line.engine.executor(batch)  # raises where the engine is closed
            recorded = self.graphs.get(batch)
            if recorded is None or recorded.executor is not executor:
                recorded = self._record(executor, batch)
            line.compute.run(recorded.replay)
            line.outward.wait(line.compute.mark())
        line.outward.copy(self._host[:batch], self._packed[:batch])
        return line.outward.mark()

    def _record(self, executor: Runs, batch: int) -> Recorded:
        line = self._line
        if batch in self.graphs:  # of another executor
            self._forget()
        work = self._work(executor, batch)
        line.compute.run(work)  # compiles and loads what a capture cannot
        if not self.graphs:
            # A pool dies with the last of its graphs, and must not be used again then.
            self._pool = line.runtime.pool()
        recorded = Recorded(executor, work, line.runtime.capture(work, self._pool))
        self.graphs[batch] = recorded
        return recorded

    def _work(self, executor: Runs, batch: int) -> Work:
        """All kernels of a chunk, over the slot's memory as it is now."""
        line, runtime = self._line, self._line.runtime
        engine, settings, rows = line.engine, line.settings, self._limits.rows
        heads = engine.network.heads
        table = self._staging.table(batch)
        letterbox = settings.resize != "stretch"
        placement = self._staging.placement(batch) if letterbox else None
        boxes, scores, class_ids, numbers, counts = (part[:batch] for part in self._buffers)
        packed = self._packed[:batch]

        def work() -> None:
            runtime.resize(table, executor.image)
            executor.run()
            runtime.decode(
                executor.maps,
                [head.anchors for head in heads],
                [head.scale_x_y for head in heads],
                [head.new_coords for head in heads],
                engine.height,
                engine.width,
                settings.confidence,
                placement,
                boxes,
                scores,
                class_ids,
                numbers,
                counts,
            )
            keep, kept = diou_nms(
                boxes, scores, class_ids, counts, settings.iou, settings.beta, rows, numbers
            )
            # Not read where pack leaves it: that memory is the next graph's too.
            packed.copy_(pack(boxes, scores, class_ids, counts, keep, kept))

        return work

    def _fit_buffers(self) -> None:
        """Make the buffers as large as the pipeline's limits are by now."""
        line = self._line
        limits = line.limits
        if limits == self._limits:
            return
        self._forget()
        images, candidates = line.engine.max_batch, limits.candidates

        def memory(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return line.runtime.memory(*shape, dtype=dtype, lane=line.compute)

        self._buffers = ()  # the old ones go before the new ones come
        self._buffers = (
            memory(images, candidates, 4),
            memory(images, candidates),
            memory(images, candidates, dtype=torch.int32),
            memory(images, candidates, dtype=torch.int32),
            memory(images, dtype=torch.int32),
        )
        self._packed = memory(images, limits.rows + 1, 6)
        self._host = line.runtime.host(images, limits.rows + 1, 6, dtype=torch.float32)
        self._limits = limits

    def _new_staging(self) -> Staging:
        line, engine = self._line, self._line.engine
        canvas = (engine.height, engine.width, line.settings.resize)
        return Staging(line.runtime, line.inward, canvas)

    def _forget(self) -> None:
        forget(self.graphs)


def held_bytes() -> int:
    """Of the device, that a slot holds for each image with the limits that a pipeline begins with:
    candidates (boxes, scores, class ids, numbers, counts), the result, a picture of full HD.
    """
    return CANDIDATES * (4 * 4 + 4 + 4 + 4) + 4 + PACKED + image_bytes()


def graph_bytes(network: Network) -> int:
    """Of the device, that a chunk's kernels allocate while they run, for each image with these
    limits: decode's list of anchors, NMS's workspace and what it keeps, the packed result.
    """
    anchors = sum(
        len(head.anchors) * (network.height // head.stride) * (network.width // head.stride)
        for head in network.heads
    )
    return (anchors + 1) * 4 + workspace_bytes(CANDIDATES) + ROWS * 8 + 4 + PACKED


def forget(graphs: dict[int, Recorded]) -> None:
    """Free graphs; none of them may be running."""
    with CAPTURING:
        graphs.clear()


def synchronize(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.synchronize()
