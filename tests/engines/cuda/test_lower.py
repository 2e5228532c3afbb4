"""Lowering by example: what is fused, what lies where, what is copied, what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest

from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.plan import (
    Combine,
    Convolution,
    Plan,
    Pool,
    PyramidPool,
    Step,
    Upsample,
    View,
)
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.network.architectures import NAMES, by_name, yolov4
from yolov4_fast.network.fold import without_normalisation
from yolov4_fast.network.layers import (
    IMAGE,
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    Route,
    Sam,
    Shape,
    Shortcut,
)
from yolov4_fast.network.layers import Upsample as Enlarge


def conv(source: int, filters: int = 8, size: int = 1, activation: str = "leaky") -> Conv:
    return Conv(
        inputs=(source,), filters=filters, size=size, activation=activation, batch_normalize=False
    )


def head(source: int, stride: int = 1) -> Head:
    """Of one anchor and one class: it reads six channels."""
    return Head(inputs=(source,), all_anchors=((4, 4),), mask=(0,), num_classes=1, stride=stride)


def lowered(*layers: Layer) -> Plan:
    """Plan of a network of 16x8 (width by height) input without merged siblings."""
    return lower(Network(layers, width=16, height=8), merge_siblings=False)


def made_by(plan: Plan, layer: int) -> Step:
    """The one step that makes a layer."""
    (step,) = (step for step in plan.steps if layer in step.layers)
    return step


def convolution(plan: Plan, layer: int) -> Convolution:
    step = made_by(plan, layer)
    assert isinstance(step, Convolution)
    return step


def kinds(plan: Plan) -> list[str]:
    return [type(step).__name__ for step in plan.steps]


def copies(plan: Plan) -> list[tuple[View, View]]:
    return [
        (step.source, step.out)
        for step in plan.steps
        if isinstance(step, Upsample) and step.factor == 1
    ]


def test_a_chain() -> None:
    plan = lowered(
        replace(conv(IMAGE, 16, 3), stride=2, activation="mish"), conv(0, 6, activation="linear")
    )
    first, second = plan.steps
    assert first == Convolution(
        layers=(0,), weights=(0,), source=plan.image, out=second.reads[0], residual=None, size=3,
        stride=2, padding=1, groups=1, activation="mish",
    )  # fmt: skip
    assert plan.image == View(plan.image.buffer, 0, 3)
    image, middle, last = (
        plan.buffers[v.buffer] for v in (plan.image, first.out, second.writes[0])
    )
    assert (image.height, image.width, image.channels) == (8, 16, 3)
    assert (middle.height, middle.width, middle.channels) == (4, 8, 16)
    assert plan.maps == second.writes == (View(second.writes[0].buffer, 0, 6),)
    assert last.channels == 8, "rows of maps are aligned"


def test_a_concatenation_costs_nothing() -> None:
    plan = lowered(conv(IMAGE, 8), conv(IMAGE, 16, 3), Route(inputs=(1, 0)), conv(2, 5), conv(2, 6))
    assert kinds(plan) == ["Convolution"] * 3, "layer 3 is read by nothing and left out"
    first, second = convolution(plan, 0).out, convolution(plan, 1).out
    assert (second, first) == (View(first.buffer, 0, 16), View(first.buffer, 16, 8))
    assert convolution(plan, 4).source == View(first.buffer, 0, 24)


def test_concatenations_within_concatenations() -> None:
    plan = lowered(
        conv(IMAGE, 8),
        MaxPool(inputs=(0,), size=3),
        Route(inputs=(0, 1)),
        Enlarge(inputs=(2,), stride=1),
        Route(inputs=(3, 2)),
        conv(4, 6),
    )
    assert not copies(plan)[1:] and isinstance(made_by(plan, 3), Upsample)
    buffer = convolution(plan, 5).source.buffer
    assert convolution(plan, 5).source == View(buffer, 0, 32)
    assert made_by(plan, 3).writes == (View(buffer, 0, 16),)
    assert convolution(plan, 0).out == View(buffer, 16, 8)
    assert made_by(plan, 1).writes == (View(buffer, 24, 8),)


@pytest.mark.parametrize(
    "inputs, copied",
    [
        ((1,), 0),
        ((5,), 1),  # used twice
        ((IMAGE,), 1),
        ((2,), 1),  # half of a layer
        ((3,), 1),  # lies in another concatenation already
        ((4,), 0),  # that concatenation itself
        ((4, 3), 1),
        ((3, 0, 1), 2),
    ],
)
def test_copies_into_a_concatenation(inputs: tuple[int, ...], copied: int) -> None:
    plan = lowered(
        conv(IMAGE, 8),
        conv(0, 8, 3),
        Route(inputs=(0,), groups=2, group=1),
        conv(0, 16),
        Route(inputs=(3, 0)),
        conv(4, 16),
        Route(inputs=(5, *inputs)),
        conv(6, 6),
    )
    into = convolution(plan, 7).source
    assert len(copies(plan)) == copied
    assert all(out.buffer == into.buffer and out != source for source, out in copies(plan))
    assert convolution(plan, 5).out == View(into.buffer, 0, 16)


def test_a_group_is_a_view() -> None:
    plan = lowered(
        conv(IMAGE, 16),
        Route(inputs=(0,), groups=4, group=3),
        Route(inputs=(1,), groups=2, group=1),
        Route(inputs=(2,)),
        conv(3, 6),
    )
    assert kinds(plan) == ["Convolution"] * 2
    assert convolution(plan, 4).source == View(convolution(plan, 0).out.buffer, 14, 2)


def test_groups_of_several_inputs() -> None:
    plan = lowered(
        conv(IMAGE, 16), conv(IMAGE, 8), Route(inputs=(0, 1), groups=2, group=1), conv(2, 6)
    )
    into, first, second = (convolution(plan, 3).source, *(convolution(plan, i).out for i in (0, 1)))
    assert copies(plan) == [
        (View(first.buffer, 8, 8), View(into.buffer, 0, 8)),
        (View(second.buffer, 4, 4), View(into.buffer, 8, 4)),
    ]


def test_a_shortcut_is_the_residual_of_its_convolution() -> None:
    plan = lowered(conv(IMAGE), conv(0), conv(1, 8, 3), Shortcut(inputs=(2, 0)), conv(3, 6))
    fused = convolution(plan, 2)
    assert fused.layers == (2, 3) and fused.weights == (2,)
    assert fused.residual == convolution(plan, 0).out
    assert fused.source == convolution(plan, 1).out
    assert convolution(plan, 4).source == fused.out
    assert len(plan.steps) == 4


def test_the_later_convolution_of_two_takes_the_sum_over() -> None:
    plan = lowered(conv(IMAGE), conv(IMAGE), Shortcut(inputs=(1, 0)), conv(2, 6))
    assert convolution(plan, 1).residual == convolution(plan, 0).out
    assert convolution(plan, 0).residual is None


def test_a_convolution_waits_for_what_is_added_to_it() -> None:
    """Layer 1 is a convolution read by the shortcut alone; what is added comes after it."""
    plan = lowered(
        conv(IMAGE), conv(0), MaxPool(inputs=(0,), size=3), Shortcut(inputs=(1, 2)), conv(3, 6)
    )
    assert kinds(plan) == ["Convolution", "Pool", "Convolution", "Convolution"]
    assert plan.steps[2].layers == (1, 3)
    assert plan.steps[2].reads == (plan.steps[0].writes[0], plan.steps[1].writes[0])


@pytest.mark.parametrize(
    "shortcut",
    [
        Shortcut(inputs=(1, 0), activation="leaky"),  # the activation follows the sum
        Shortcut(inputs=(2, 2)),  # the same convolution twice
        Shortcut(inputs=(1, 2, 0)),
        Shortcut(inputs=(1, 0), weights="per_feature"),
        Shortcut(inputs=(3, 3)),  # no convolution
        Shortcut(inputs=(5, 3)),  # half of a convolution
        Shortcut(inputs=(6, 3)),  # a head reads it too
    ],
)
def test_sums_of_their_own(shortcut: Shortcut) -> None:
    plan = lowered(
        conv(IMAGE, 6),
        conv(0, 6, 3),
        conv(0, 6),
        MaxPool(inputs=(0,), size=3),
        conv(0, 12),
        Route(inputs=(4,), groups=2),
        conv(0, 6),
        head(6),
        shortcut,
        conv(8, 6),
        head(9),
    )
    step = made_by(plan, 8)
    assert isinstance(step, Combine) and not step.product
    assert step.activation == shortcut.activation and len(step.sources) == len(shortcut.inputs)


def test_a_sum_of_more_than_a_step_takes() -> None:
    plan = lowered(*(conv(IMAGE, 6, 3) for _ in range(9)), Shortcut(inputs=tuple(range(9))))
    sums = [step for step in plan.steps if isinstance(step, Combine)]
    assert [len(step.sources) for step in sums] == [4, 4, 3]
    assert sums[1].sources[0] == sums[0].out and sums[2].sources[0] == sums[1].out


def test_a_prelu_follows_its_convolution() -> None:
    """It is no epilogue; nothing is added in its convolution, and its output goes where it is
    read.
    """
    plan = lowered(
        conv(IMAGE, activation="prelu"), conv(0, 8, 3, activation="prelu"), Shortcut(inputs=(1, 0)),
        Route(inputs=(2, 1)), conv(3, 6),
    )  # fmt: skip
    assert kinds(plan) == ["Convolution", "Combine"] * 2 + ["Combine", "Convolution"]
    first, prelu = plan.steps[2:4]
    assert isinstance(first, Convolution) and isinstance(prelu, Combine)
    assert first.activation == "linear" and first.residual is None
    assert prelu.sources == (first.out,) and prelu.activation == "prelu"
    assert prelu.layers == first.layers == (1,) and prelu.key != first.key
    into = convolution(plan, 4).source
    assert prelu.out == View(into.buffer, 8, 8) and prelu.out.buffer != first.out.buffer


def test_what_has_weights_of_its_own_has_a_key() -> None:
    plan = lowered(
        conv(IMAGE), conv(0), Shortcut(inputs=(1, 0), weights="per_channel"),
        Shortcut(inputs=(2, 0), activation="leaky"), Shortcut(inputs=(3, 2), activation="prelu"),
    )  # fmt: skip
    keys = [step.key for step in plan.steps if isinstance(step, Combine)]
    assert keys[1] is None and None not in (keys[0], keys[2]) and len(set(keys)) == 3
    assert not {0, 1} & set(keys)


def test_sam_is_a_product() -> None:
    plan = lowered(conv(IMAGE), conv(0, activation="logistic"), Sam(inputs=(0, 1)))
    step = plan.steps[-1]
    assert isinstance(step, Combine) and step.product and step.activation == "linear"
    assert step.sources == (convolution(plan, 0).out, convolution(plan, 1).out)


def test_spp_is_one_step() -> None:
    pools = [MaxPool(inputs=(0,), size=size) for size in (9, 5, 13)]
    plan = lowered(conv(IMAGE), *pools, Route(inputs=(3, 2, 1, 0)), conv(4, 6))
    assert kinds(plan) == ["Convolution", "PyramidPool", "Convolution"]
    pool = plan.steps[1]
    assert isinstance(pool, PyramidPool) and pool.sizes == (5, 9, 13)
    assert [out.offset for out in pool.outs] == [8, 16, 0]
    assert pool.source == View(pool.outs[0].buffer, 24, 8) and not copies(plan)


@pytest.mark.parametrize(
    "pools",
    [
        (MaxPool(inputs=(0,), size=5), Route(inputs=(0,))),
        (MaxPool(inputs=(0,), size=5), MaxPool(inputs=(1,), size=9)),  # of two sources
        (MaxPool(inputs=(0,), size=1), MaxPool(inputs=(0,), size=5)),
        (MaxPool(inputs=(0,), size=2), MaxPool(inputs=(0,), size=4)),  # even
        (MaxPool(inputs=(0,), size=3, stride=2), MaxPool(inputs=(0,), size=5, stride=2)),
        (MaxPool(inputs=(0,), size=5, padding=2), MaxPool(inputs=(0,), size=3, padding=0)),
    ],
)
def test_pools_that_are_no_pyramid(pools: tuple[Layer, ...]) -> None:
    plan = lowered(conv(IMAGE), *pools, Route(inputs=tuple(range(1, len(pools) + 1))))
    assert not any(isinstance(step, PyramidPool) for step in plan.steps)


@pytest.mark.parametrize(
    "size, stride, padding, pads",
    [(2, 2, None, (0, 0, 0, 0)), (2, 1, None, (0, 1, 0, 1)), (5, 3, 4, (2, 1, 2, 2)),
     (3, 2, 0, (0, 0, 0, 0))],
)  # fmt: skip
def test_pools_keep_darknets_padding(
    size: int, stride: int, padding: int | None, pads: tuple[int, int, int, int]
) -> None:
    plan = lowered(MaxPool(inputs=(IMAGE,), size=size, stride=stride, padding=padding))
    (step,) = plan.steps
    assert isinstance(step, Pool) and (step.size, step.stride) == (size, stride)
    assert step.pads == pads


def test_maps_have_buffers_of_their_own() -> None:
    """Read by a concatenation too, by two heads, and a slice: each map is whole and aligned."""
    plan = lowered(
        conv(IMAGE, 6),
        Route(inputs=(0, 0)),
        Route(inputs=(1,), groups=2, group=1),
        head(0),
        head(2),
        head(0),
        conv(1, 6),
        head(6),
    )
    first, second, third, fourth = plan.maps
    assert first == third == convolution(plan, 0).out == View(first.buffer, 0, 6)
    assert len(copies(plan)) == 3  # the concatenation's two, and the slice of it
    for view in (first, second, fourth):
        assert (view.offset, view.channels, plan.buffers[view.buffer].channels) == (0, 6, 8)
        others = {v.buffer for v in (plan.image, first, second, fourth) if v != view}
        assert view.buffer not in others


def test_a_backbone_has_one_map() -> None:
    whole = lowered(conv(IMAGE), Route(inputs=(0, 0)))
    assert whole.maps == (View(whole.maps[0].buffer, 0, 16),)
    part = lowered(conv(IMAGE, 16), Route(inputs=(0,), groups=2, group=1))
    assert copies(part) == [(View(convolution(part, 0).out.buffer, 8, 8), part.maps[0])]
    image = lowered(Route(inputs=(IMAGE,)))
    assert copies(image) == [(image.image, image.maps[0])]


class Reorg(Layer):
    name = "reorg3d"

    def output_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]


def test_refusals() -> None:
    with pytest.raises(EngineError, match=r"layer 1: .* no step for Reorg; it knows Conv, "):
        lowered(conv(IMAGE), Reorg(inputs=(0,)))
    with pytest.raises(EngineError, match=r"layer 1 .* has batch normalisation: fold the network"):
        lowered(conv(IMAGE), Conv(inputs=(0,), filters=8))
    weighted = Shortcut(inputs=(0, 0), weights="per_feature", normalization="relu")
    with pytest.raises(EngineError, match=r"layer 1 \(shortcut\) normalises its weights: fold"):
        lowered(conv(IMAGE), weighted)


STEPS = {  # convolutions apart and merged, pyramids, pools, upsamplings, copies
    "yolov4": (110, 105, 1, 0, 2, 0),
    "yolov4-tiny": (21, 21, 0, 3, 1, 1),
    "yolov4-tiny-3l": (24, 24, 0, 3, 2, 2),
    "yolov4-csp": (115, 106, 1, 0, 2, 0),
    "yolov4x-mish": (137, 128, 1, 0, 2, 0),
    "yolov4-nano": (110, 105, 1, 0, 2, 0),
    "yolov4-seed-leaky": (110, 105, 1, 0, 2, 0),
    "yolov4-seed-mish": (109, 104, 1, 0, 2, 0),
    "yolov3": (75, 75, 0, 0, 2, 0),
    "yolov3-spp": (76, 76, 1, 0, 2, 0),
    "yolov3-tiny": (13, 13, 0, 6, 1, 0),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("merge", [False, True])
def test_steps_of_every_architecture(name: str, merge: bool) -> None:
    plan = lower(without_normalisation(by_name(name)), merge_siblings=merge)
    apart, merged, pyramids, pools, upsamplings, copied = STEPS[name]
    count = Counter(kinds(plan))
    assert count == {
        kind: number
        for kind, number in {
            "Convolution": merged if merge else apart,
            "PyramidPool": pyramids,
            "Pool": pools,
            "Upsample": upsamplings + copied,
        }.items()
        if number
    }
    assert len(copies(plan)) == copied
    for step in plan.steps:  # 16-byte rows and slices in half precision
        for view in (*step.reads, *step.writes):
            assert view == plan.image or view.offset % 8 == 0
    assert sum(len(s.weights) for s in plan.steps if isinstance(s, Convolution)) == apart


def test_maps_of_yolov4_are_256_channels_wide() -> None:
    plan = lower(without_normalisation(yolov4(width=416, height=320)))
    shapes = [plan.buffers[view.buffer] for view in plan.maps]
    assert [(b.height, b.width, b.channels) for b in shapes] == [
        (40, 52, 256), (20, 26, 256), (10, 13, 256),
    ]  # fmt: skip
    assert {view.channels for view in plan.maps} == {255}


@dataclass
class Written:
    """Which channels of a buffer anything has written."""

    channels: set[tuple[int, int]]

    def has(self, view: View) -> bool:
        return self.channels >= {(view.buffer, c) for c in range(view.offset, view.end)}

    def add(self, view: View) -> None:
        self.channels |= {(view.buffer, c) for c in range(view.offset, view.end)}


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_reads_only_what_was_written(name: str) -> None:
    plan = lower(without_normalisation(by_name(name)))
    written = Written(set())
    written.add(plan.image)
    for step in plan.steps:
        assert all(written.has(view) for view in step.reads)
        assert not any(out.overlaps(view) for out in step.writes for view in step.reads)
        for view in step.writes:
            written.add(view)
    assert all(written.has(view) for view in plan.maps)
