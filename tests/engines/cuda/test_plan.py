"""The types of a plan: what steps read and write, and the check that views lie in their buffers."""

from __future__ import annotations

import pytest

from yolov4_fast.engines.cuda.plan import (
    Buffer,
    Combine,
    Convolution,
    Plan,
    Pool,
    PyramidPool,
    Step,
    Upsample,
    View,
)

A, B, C = View(0, 0, 8), View(1, 0, 8), View(1, 8, 8)


def convolution(residual: View | None) -> Convolution:
    return Convolution(
        layers=(0,), weights=(0,), source=A, out=B, residual=residual, size=1, stride=1,
        padding=0, groups=1, activation="linear",
    )  # fmt: skip


@pytest.mark.parametrize(
    "step, reads, writes",
    [
        (convolution(None), (A,), (B,)),
        (convolution(C), (A, C), (B,)),
        (Pool(layers=(0,), source=A, out=B, size=2, stride=2, pads=(0, 0, 0, 0)), (A,), (B,)),
        (PyramidPool(layers=(0, 1), source=A, outs=(B, C), sizes=(5, 9)), (A,), (B, C)),
        (Upsample(layers=(0,), source=B, out=C, factor=1), (B,), (C,)),
        (Combine(layers=(0,), sources=(A, B), out=C, product=True, activation="linear"),
         (A, B), (C,)),
    ],
)  # fmt: skip
def test_reads_and_writes(step: Step, reads: tuple[View, ...], writes: tuple[View, ...]) -> None:
    assert (step.reads, step.writes) == (reads, writes)


@pytest.mark.parametrize(
    "first, second, overlap",
    [
        (View(0, 0, 8), View(0, 8, 8), False),
        (View(0, 0, 9), View(0, 8, 8), True),
        (View(0, 0, 32), View(0, 8, 1), True),
        (View(0, 4, 4), View(1, 4, 4), False),
    ],
)
def test_overlaps(first: View, second: View, overlap: bool) -> None:
    assert first.overlaps(second) is second.overlaps(first) is overlap


@pytest.mark.parametrize("view", [View(0, 1, 8), View(0, -1, 4), View(0, 0, 0), View(1, 8, 9)])
@pytest.mark.parametrize("place", ["image", "maps", "reads", "writes"])
def test_a_view_outside_its_buffer_is_refused(view: View, place: str) -> None:
    buffers = (Buffer(2, 2, 8), Buffer(2, 2, 16))
    views = {"image": A, "maps": B, "reads": A, "writes": C} | {place: view}
    step = Upsample(layers=(), source=views["reads"], out=views["writes"], factor=1)
    with pytest.raises(ValueError, match="does not lie in"):
        Plan(buffers, (step,), views["image"], (views["maps"],))
