"""Merging siblings: which convolutions become one, where their outputs lie, and which stay apart.

That merged plans compute the same is shown in test_reference.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.plan import Convolution, Plan, View
from yolov4_fast.network.layers import IMAGE, Conv, Head, Layer, Network, Route, Shortcut, Upsample


def conv(source: int, filters: int = 8, size: int = 1, activation: str = "leaky") -> Conv:
    return Conv(
        inputs=(source,), filters=filters, size=size, activation=activation, batch_normalize=False
    )


def head(source: int) -> Head:
    """Of one anchor and one class: it reads six channels."""
    return Head(inputs=(source,), all_anchors=((4, 4),), mask=(0,), num_classes=1, stride=1)


def lowered(*layers: Layer) -> Plan:
    return lower(Network(layers, width=16, height=8))


def convolution(plan: Plan, layer: int) -> Convolution:
    """The one convolution that makes a layer."""
    (step,) = (step for step in plan.steps if layer in step.layers)
    assert isinstance(step, Convolution)
    return step


def csp(reads_late: bool = False, activation: str = "mish", units: int = 1) -> Plan:
    """A cross-stage block: bypass 1, split 2, residual units on it, main, [main | bypass]."""
    layers: list[Layer] = [conv(IMAGE, 16, 3, "mish"), conv(0, 8, 1, activation)]
    layers.append(conv(0, 8, 1, "mish"))
    for _ in range(units):
        last = len(layers) - 1
        layers += [conv(last, 8, 3, "mish"), Shortcut(inputs=(last + 1, last))]
    main = conv(2 if reads_late else len(layers) - 1, 8, 1, "mish")
    layers += [main, Route(inputs=(len(layers), 1)), conv(len(layers) + 1, 6)]
    return lowered(*layers)


def test_the_paths_of_a_cross_stage_block_are_one_convolution() -> None:
    plan = csp()
    step = convolution(plan, 1)
    assert step.weights == (2, 1) and step.layers == (2, 1)
    joined = convolution(plan, 5).out
    assert step.out == View(joined.buffer, 0, 16) and joined == View(joined.buffer, 0, 8)
    assert convolution(plan, 3).source == joined == convolution(plan, 3).residual
    assert len(plan.buffers) == len({v.buffer for s in plan.steps for v in s.reads + s.writes})
    assert len(csp(units=3).steps) == len(plan.steps) + 2


@pytest.mark.parametrize("plan", [csp(activation="leaky"), csp(reads_late=True)])
def test_siblings_stay_apart(plan: Plan) -> None:
    """Of other activations; and where split is still read by what writes its slot, main."""
    bypass, split = convolution(plan, 1), convolution(plan, 2)
    assert bypass.weights == (1,) and split.weights == (2,)


def test_siblings_without_a_concatenation_share_a_buffer() -> None:
    plan = lowered(
        conv(IMAGE, 8), conv(0, 16), conv(0, 5), conv(1, 8, 3), conv(2, 8, 3),
        Shortcut(inputs=(3, 4)),
    )  # fmt: skip
    step = convolution(plan, 1)
    assert step.weights == (1, 2) and step.out == View(step.out.buffer, 0, 21)
    assert plan.buffers[step.out.buffer].channels == 24
    assert convolution(plan, 4).source == View(step.out.buffer, 16, 5)


def test_siblings_side_by_side_already() -> None:
    plan = lowered(conv(IMAGE, 8), conv(0, 5), conv(0, 3), Route(inputs=(2, 1)), conv(3, 6))
    step = convolution(plan, 1)
    assert step.weights == (2, 1) and step.out == convolution(plan, 4).source
    three = [conv(0, 4), conv(0, 8), conv(0, 12)]
    plan = lowered(conv(IMAGE, 8), *three, Route(inputs=(3, 1, 2)), conv(4, 6))
    step = convolution(plan, 1)
    assert step.weights == (3, 1, 2) and step.out == convolution(plan, 5).source


@pytest.mark.parametrize(
    "layers",
    [
        (conv(0, 8), conv(0, 6), head(2), conv(1, 6), head(4)),  # a map has a buffer of its own
        (conv(0, 6), conv(0, 8), head(1), conv(2, 6), head(4)),
        (conv(0, 8), conv(0, 8), Shortcut(inputs=(2, 0)), Route(inputs=(1, 3)), conv(4, 6)),
        (conv(0, 8), replace(conv(0, 8), padding=1), conv(1, 8, 3),
         replace(conv(2, 8, 3), padding=0), Shortcut(inputs=(3, 4))),
        (replace(conv(0, 8), groups=2), conv(0, 8), Route(inputs=(1, 2)), conv(3, 6)),
        (replace(conv(0, 8), stride=2), conv(0, 8), Upsample(inputs=(1,)), conv(2, 8, 3),
         Shortcut(inputs=(3, 4))),
        (conv(0, 8, 3), conv(0, 8), Route(inputs=(1, 2)), conv(3, 6)),
        (conv(0, 5), conv(0, 8), conv(1, 3, 3), conv(2, 3, 3), Route(inputs=(3, 4)), conv(5, 6)),
        (conv(0, 8), conv(0, 5), conv(2, 8, 3), conv(3, 8, 3), Route(inputs=(4, 1)), conv(5, 6)),
        # Each in a concatenation of its own, one of which ends before the other's slice is written.
        (conv(0, 8), conv(0, 8), conv(2, 8, 3), Route(inputs=(2, 3)), conv(4, 8, 3), conv(5, 8, 3),
         Route(inputs=(1, 6)), conv(7, 6)),
    ],
)  # fmt: skip
def test_no_siblings(layers: tuple[Layer, ...]) -> None:
    """Maps, a residual, padding, groups, strides, sizes, alignment, two concatenations."""
    plan = lowered(conv(IMAGE, 8), *layers)
    assert all(len(step.weights) == 1 for step in plan.steps if isinstance(step, Convolution))


def test_merged_siblings_run_before_any_of_their_readers() -> None:
    plan = lowered(
        conv(IMAGE, 8), conv(0, 8), conv(1, 8, 3), conv(0, 8), conv(3, 8, 3),
        Shortcut(inputs=(2, 4)),
    )  # fmt: skip
    assert [step.layers for step in plan.steps] == [(0,), (1, 3), (2,), (4, 5)]
