"""Placement: offsets of a plan's buffers in one arena, by lifetime.

A buffer lives from the step that first writes to it to the step that last reads it, both included;
the image from before the first step, the maps until after the last. Buffers that live at once must
not overlap. Finding the smallest arena is NP-hard; placing the largest buffer first, each in the
smallest gap that holds it among those that live while it does (Pisarchyk and Lee, "Efficient Memory
Management for Deep Neural Net Inference", 2020: greedy by size), gives every architecture here one
as small as can be: the most that is alive at one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yolov4_fast.engines.cuda.plan import Plan

GRANULE = 256  # units: so every buffer starts at a multiple of 256 bytes at every batch size


@dataclass(frozen=True)
class Placement:
    """Where each buffer lies. The unit is one element of one image, so everything scales with the
    batch: buffer n of a batch begins at byte offsets[n] * batch * itemsize of the arena.

    offsets, sizes: units per image, in multiples of GRANULE. lifetimes: first and last step of each
    buffer. peak: units per image of the whole arena. itemsizes: where buffers have different types
    the unit is one byte of one image instead, and these are each buffer's bytes per element.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    lifetimes: tuple[tuple[int, int], ...]
    peak: int
    itemsizes: tuple[int, ...] | None = None

    def unit(self, itemsize: int) -> int:
        """Bytes of one unit where elements have `itemsize` bytes."""
        return itemsize if self.itemsizes is None else 1

    def bytes(self, batch: int, itemsize: int) -> int:
        """Size of the arena."""
        return self.peak * batch * self.unit(itemsize)


def place(plan: Plan, itemsizes: Sequence[int] | None = None) -> Placement:
    """Offsets of the plan's buffers.

    itemsizes: bytes per element of each buffer, where they differ (FP8 beside half precision).
    """
    if itemsizes is not None and len(itemsizes) != len(plan.buffers):
        raise ValueError(f"{len(itemsizes)} itemsizes for {len(plan.buffers)} buffers")
    widths = itemsizes or (1,) * len(plan.buffers)
    sizes = tuple(
        -(-buffer.height * buffer.width * buffer.channels * width // GRANULE) * GRANULE
        for buffer, width in zip(plan.buffers, widths, strict=True)
    )
    alive = lifetimes(plan)
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number], alive[number][0]))
    offsets, peak = _pack(order, sizes, alive)
    return Placement(offsets, sizes, alive, peak, None if itemsizes is None else tuple(itemsizes))


def lifetimes(plan: Plan) -> tuple[tuple[int, int], ...]:
    """First and last step of each buffer; the image begins at -1, maps end at len(plan.steps)."""
    first: dict[int, int] = {plan.image.buffer: -1}
    last: dict[int, int] = {plan.image.buffer: -1}
    for index, step in enumerate(plan.steps):
        for view in (*step.reads, *step.writes):
            first.setdefault(view.buffer, index)
            last[view.buffer] = index
    for view in plan.maps:
        first.setdefault(view.buffer, len(plan.steps))
        last[view.buffer] = len(plan.steps)
    return tuple((first[number], last[number]) for number in range(len(plan.buffers)))


def _pack(
    order: Sequence[int], sizes: Sequence[int], alive: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], int]:
    """Offsets, and the peak, of buffers placed in this order, each into the tightest gap."""
    offsets: dict[int, int] = {}
    for number in order:
        begin, end = alive[number]
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if alive[other][0] <= end and begin <= alive[other][1]
        )
        best, spare, free = None, 0, 0
        for low, high in taken:
            gap = low - free - sizes[number]
            if gap >= 0 and (best is None or gap < spare):
                best, spare = free, gap
            free = max(free, high)
        offsets[number] = free if best is None else best
    peak = max(offsets[number] + sizes[number] for number in offsets)
    return tuple(offsets[number] for number in range(len(sizes))), peak
