"""Placement: lifetimes, no overlap of what lives at once, alignment, and how small the arena is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.place import Placement, lifetimes, place
from yolov4_fast.engines.cuda.plan import Buffer, Combine, Plan, Upsample, View
from yolov4_fast.network.architectures import NAMES, by_name
from yolov4_fast.network.layers import Conv, Network


def unnormalised(network: Network) -> Network:
    layers = (
        replace(layer, batch_normalize=False) if isinstance(layer, Conv) else layer
        for layer in network.layers
    )
    return replace(network, layers=tuple(layers))


def alive_at_once(placement: Placement) -> int:
    """The most units that live at one step: no arena is smaller."""
    steps = range(-1, max(last for _, last in placement.lifetimes) + 1)
    return max(
        sum(
            size
            for size, (first, last) in zip(placement.sizes, placement.lifetimes, strict=True)
            if first <= step <= last
        )
        for step in steps
    )


def check(plan: Plan, placement: Placement) -> None:
    """By the definition: buffers that any step finds alive together do not share a byte."""
    widths = placement.itemsizes or (1,) * len(plan.buffers)
    spans = []
    for number, (buffer, width) in enumerate(zip(plan.buffers, widths, strict=True)):
        begin = placement.offsets[number]
        end = begin + buffer.height * buffer.width * buffer.channels * width
        assert begin % 256 == 0 and 0 <= begin and end <= placement.peak
        touched = {
            step
            for step, views in enumerate([*(s.reads + s.writes for s in plan.steps), plan.maps])
            for view in views
            if view.buffer == number
        }
        if number == plan.image.buffer:
            touched.add(-1)
        spans.append((begin, end, min(touched), max(touched)))
    for (begin_a, end_a, first_a, last_a), (begin_b, end_b, first_b, last_b) in combinations(
        spans, 2
    ):
        if first_a <= last_b and first_b <= last_a:
            assert end_a <= begin_b or end_b <= begin_a


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Combines of any earlier buffers; the sizes and which of them are maps are arbitrary."""
    sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 8, 16]))
    buffers = [Buffer(*draw(sizes))]
    steps = []
    for number in range(1, draw(st.integers(1, 16)) + 1):
        buffers.append(Buffer(*draw(sizes)))
        sources = draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=3))
        steps.append(
            Combine(
                layers=(number,),
                sources=tuple(View(source, 0, 1) for source in sources),
                out=View(number, 0, 1),
                product=False,
                activation="linear",
            )
        )
    outputs = draw(st.lists(st.integers(1, len(steps)), max_size=3, unique=True))
    return Plan(tuple(buffers), tuple(steps), View(0, 0, 1), tuple(View(n, 0, 1) for n in outputs))


@settings(max_examples=200, deadline=None)
@given(plans(), st.data())
def test_no_two_live_buffers_overlap(plan: Plan, data: st.DataObject) -> None:
    placement = place(plan)
    check(plan, placement)
    assert alive_at_once(placement) <= placement.peak <= sum(placement.sizes)
    count = len(plan.buffers)
    widths = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=count, max_size=count))
    check(plan, place(plan, widths))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("merge", [False, True])
def test_the_arena_of_every_architecture_is_as_small_as_can_be(name: str, merge: bool) -> None:
    plan = lower(unnormalised(by_name(name)), merge_siblings=merge)
    placement = place(plan)
    check(plan, placement)
    assert placement.peak == alive_at_once(placement)


def test_merging_shrinks_the_arena_of_yolov4() -> None:
    network = unnormalised(by_name("yolov4", width=416, height=416))
    merged, separate = (place(lower(network, merge_siblings=on)).peak for on in (True, False))
    assert merged < 0.8 * separate


def test_bytes_scale_with_batch_and_type() -> None:
    buffers = (Buffer(5, 5, 3), Buffer(5, 5, 8))
    step = Upsample(layers=(), source=View(0, 0, 3), out=View(1, 0, 3), factor=1)
    plan = Plan(buffers, (step,), View(0, 0, 3), (View(1, 0, 8),))
    placement = place(plan)
    assert placement.sizes == (256, 256) and placement.peak == 512
    assert placement.bytes(3, 2) == 3072 and placement.bytes(1, 4) == 2048
    mixed = place(plan, (1, 4))
    assert mixed.sizes == (256, 1024) and mixed.bytes(3, 2) == 3 * 1280


def test_lifetimes() -> None:
    """The image dies with its last reader; a map lives on after the last step."""
    views = [View(n, 0, 8) for n in range(4)]
    steps = tuple(
        Upsample(layers=(), source=views[a], out=views[b], factor=1)
        for a, b in ((0, 1), (1, 2), (0, 3))
    )
    plan = Plan((Buffer(1, 1, 8),) * 4, steps, views[0], (views[1],))
    assert lifetimes(plan) == ((-1, 2), (0, 3), (1, 1), (2, 2))


def test_itemsizes_must_be_one_per_buffer() -> None:
    plan = Plan((Buffer(1, 1, 8),), (), View(0, 0, 8), ())
    with pytest.raises(ValueError, match="2 itemsizes for 1 buffers"):
        place(plan, (1, 1))
