"""Merging siblings: 1x1 convolutions of one source become one, which reads that source once.

The two of a cross-stage block are the case in mind: `bypass` lies at the end of the concatenation
[main | bypass], and `split`, which the block's residual units read, has a buffer of its own. main
is written last, when split is long dead, so until then split may lie in main's slice, beside
bypass: one convolution writes both, and split's buffer is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from yolov4_fast.engines.cuda.plan import ALIGNMENT, Buffer, Convolution, Plan, Step, View


def merge_siblings(plan: Plan) -> Plan:
    """The same plan with as many convolutions merged as the lifetimes of slices allow."""
    merged: Plan | None = plan
    while merged is not None:
        plan = merged
        merged = next((p for i, j in _pairs(plan) if (p := _merge(plan, i, j))), None)
    return plan


def _pairs(plan: Plan) -> Iterator[tuple[int, int]]:
    """Numbers of steps, first < second, that could be one if their outputs lay side by side."""
    kept = {plan.image.buffer, *(view.buffer for view in plan.maps)}
    siblings: dict[tuple[View, str], list[int]] = {}
    for index, step in enumerate(plan.steps):
        if (
            isinstance(step, Convolution)
            and (step.size, step.stride, step.padding, step.groups) == (1, 1, 0, 1)
            and step.residual is None
            and step.out.buffer not in kept
        ):
            siblings.setdefault((step.source, step.activation), []).append(index)
    for group in siblings.values():
        for position, first in enumerate(group):
            for second in group[position + 1 :]:
                yield first, second


def _merge(plan: Plan, i: int, j: int) -> Plan | None:
    """The plan with step j merged into step i < j, or None where their outputs cannot join."""
    a, b = plan.steps[i], plan.steps[j]
    assert isinstance(a, Convolution) and isinstance(b, Convolution)
    for left, right in ((a, b), (b, a)):
        if left.out.buffer == right.out.buffer and left.out.end == right.out.offset:
            if _untouched(plan, b.out, i, j):
                return _join(plan, i, j)
            return None
    for fixed, moved in ((a, b), (b, a)):
        if not _owns(plan, moved) or (fixed is b and not _untouched(plan, b.out, i, j)):
            continue
        dead = max(n for n, step in enumerate(plan.steps) if _touches(step, moved.out))
        for offset in (fixed.out.end, fixed.out.offset - moved.out.channels):
            slot = View(fixed.out.buffer, offset, moved.out.channels)
            if (
                0 <= offset
                and offset % ALIGNMENT == 0
                and slot.end <= plan.buffers[slot.buffer].channels
                and _untouched(plan, slot, 0, dead + 1)
            ):
                return _move(plan, i, j, moved.out.buffer, slot)
    if _owns(plan, a) and _owns(plan, b) and a.out.channels % ALIGNMENT == 0:
        slot = View(a.out.buffer, a.out.end, b.out.channels)
        return _move(_widened(plan, slot), i, j, b.out.buffer, slot)
    return None


def _touches(step: Step, view: View) -> bool:
    return any(view.overlaps(other) for other in (*step.reads, *step.writes))


def _untouched(plan: Plan, view: View, begin: int, end: int) -> bool:
    """No step from number `begin` to before `end` reads or writes any of the view."""
    return not any(_touches(step, view) for step in plan.steps[begin:end])


def _owns(plan: Plan, step: Convolution) -> bool:
    """Whether the step alone writes to its buffer."""
    return all(
        other is step or view.buffer != step.out.buffer
        for other in plan.steps
        for view in other.writes
    )


def _widened(plan: Plan, slot: View) -> Plan:
    """The plan with the slot's buffer widened so that it holds the slot."""
    old = plan.buffers[slot.buffer]
    new = Buffer(old.height, old.width, -(-slot.end // ALIGNMENT) * ALIGNMENT)
    buffers = tuple(new if n == slot.buffer else b for n, b in enumerate(plan.buffers))
    return replace(plan, buffers=buffers)


def _move(plan: Plan, i: int, j: int, gone: int, slot: View) -> Plan:
    """The plan with the contents of buffer `gone` moved into the slot, and steps i and j joined."""

    def moved(view: View) -> View:
        if view.buffer == gone:
            view = View(slot.buffer, slot.offset + view.offset, view.channels)
        return replace(view, buffer=view.buffer - (view.buffer > gone))

    return _join(
        Plan(
            tuple(buffer for number, buffer in enumerate(plan.buffers) if number != gone),
            tuple(_relocated(step, moved) for step in plan.steps),
            moved(plan.image),
            tuple(map(moved, plan.maps)),
        ),
        i,
        j,
    )


def _relocated(step: Step, moved: Callable[[View], View]) -> Step:
    """The step with each of its views replaced by moved(view)."""
    changes: dict[str, Any] = {}
    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, View):
            changes[field.name] = moved(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], View):
            changes[field.name] = tuple(map(moved, value))
    return replace(step, **changes)


def _join(plan: Plan, i: int, j: int) -> Plan:
    """Make steps i and j, whose outputs lie side by side, one step at i."""
    left, right = sorted(
        (step for step in (plan.steps[i], plan.steps[j]) if isinstance(step, Convolution)),
        key=lambda step: step.out.offset,
    )
    one = replace(
        left,
        layers=(*left.layers, *right.layers),
        weights=(*left.weights, *right.weights),
        out=View(left.out.buffer, left.out.offset, left.out.channels + right.out.channels),
    )
    return replace(plan, steps=(*plan.steps[:i], one, *plan.steps[i + 1 : j], *plan.steps[j + 1 :]))
