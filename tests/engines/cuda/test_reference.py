"""The reference executor, and with it the lowering: plans compute what NetworkModule computes.

Arenas are poisoned before each run, so a step that reads what nothing wrote, or what something else
overwrote, shows. Random networks check the plan itself as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import combinations
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.place import place
from yolov4_fast.engines.cuda.plan import Combine, Convolution, Plan, View
from yolov4_fast.engines.cuda.reference import (
    combine,
    convolution,
    pool,
    prepare_weights,
    reference_kernels,
    run_reference,
)
from yolov4_fast.network.architectures import ARCHITECTURES, NAMES, by_name
from yolov4_fast.network.fold import fold, without_normalisation
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    IMAGE,
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shape,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import NetworkModule, activate
from yolov4_fast.ops.activation import ACTIVATION_CODES


def weighted(network: Network) -> dict[str, Tensor]:
    """Random weights that keep activations of unit size, and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in network.tensors().items():
        vector = name.endswith(("bias", "slope", "weights"))
        scale = 0.3 if vector else prod(shape[1:]) ** -0.5
        state[name] = scale * torch.randn(shape, generator=generator)
    return state


def expected(network: Network, state: dict[str, Tensor], images: Tensor) -> tuple[Tensor, ...]:
    """Maps of NetworkModule in float64."""
    with torch.device("meta"):
        module = NetworkModule(network).eval()
    module.load_state_dict({name: t.double() for name, t in state.items()}, assign=True)
    with torch.inference_mode():
        return module(images.double())


def assert_equal(maps: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Within float32 rounding of a few hundred sums in a row, relative to the largest value."""
    assert len(maps) == len(truth)
    for raw, true in zip(maps, truth, strict=True):
        assert raw.shape == true.shape and raw.dtype == torch.float32
        torch.testing.assert_close(raw.double(), true, rtol=0, atol=5e-5 * float(true.abs().max()))


def small(name: str, width: int, height: int) -> Network:
    """An architecture of an eighth of its width where that can be asked for, folded."""
    parameters: dict[str, Any] = {"num_classes": 3, "width": width, "height": height}
    if "width_multiple" in inspect.signature(ARCHITECTURES[name]).parameters:
        parameters["width_multiple"] = 0.125
    network = by_name(name, **parameters)
    return fold(network, NetworkModule(network).state_dict())[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "width, height, batch, merge",
    [(64, 64, 1, True), (96, 32, 3, True), (32, 64, 8, True), (64, 32, 2, False)],
)
def test_every_architecture(name: str, width: int, height: int, batch: int, merge: bool) -> None:
    network = small(name, width, height)
    state = weighted(network)
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    maps = run_reference(lower(network, merge_siblings=merge), state, images)
    assert_equal(maps, expected(network, state, images))


@pytest.mark.parametrize("width, height, batch", [(160, 128, 1), (96, 128, 3), (32, 32, 8)])
def test_the_darknet_reference_network(mini: Any, width: int, height: int, batch: int) -> None:
    network, state = fold(mini.network.resized(width, height), mini.state)
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    assert_equal(run_reference(lower(network), state, images), expected(network, state, images))


def test_batches_that_share_a_storage(mini: Any) -> None:
    """One storage, runs of different batch sizes in turn: each leaves the same maps as alone."""
    network, state = fold(mini.network.resized(96, 64), mini.state)
    plan = lower(network)
    placement = place(plan)
    weights = prepare_weights(plan, state, torch.float32)
    storage = torch.empty(placement.bytes(4, 4), dtype=torch.uint8)
    for batch in (4, 1, 3, 4):
        images = torch.rand(batch, 3, 64, 96)
        memory = Memory(plan, placement, batch, torch.float32, storage)
        memory.poison()
        memory.image.copy_(images.permute(0, 2, 3, 1))
        for kernel in reference_kernels(plan, memory, weights):
            kernel()
        maps = tuple(raw.permute(0, 3, 1, 2).contiguous() for raw in memory.maps)
        assert_equal(maps, expected(network, state, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(mini: Any, dtype: torch.dtype) -> None:
    """Rounded after every step: a few of the type's units, and not float32 by mistake."""
    network, state = fold(mini.network.resized(96, 64), mini.state)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    maps = run_reference(lower(network), state, images, dtype)
    for raw, true in zip(maps, expected(network, state, images), strict=True):
        error = (raw - true).abs().max() / true.abs().max()
        assert torch.finfo(dtype).eps / 10 < error < 10 * torch.finfo(dtype).eps


# Random networks ----------------------------------------------------------------------------------

INPUT = (3, 8, 12)  # channels, height, width


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Layers and blocks of every kind, reading anything that fits; with heads, or a backbone."""
    layers: list[Layer] = []
    shapes: list[Shape] = []

    def add(layer: Layer) -> int:
        inputs = [INPUT if source == IMAGE else shapes[source] for source in layer.inputs]
        try:
            shape = layer.output_shape(*inputs)
        except NetworkError:
            assume(False)
        assume(min(shape) > 0 and shape[0] <= 64 and shape[1] <= 16)
        layers.append(layer)
        shapes.append(shape)
        return len(layers) - 1

    def any_layer() -> int:
        """Most often the last, so that little of the network is dead."""
        back = draw(st.sampled_from([1, 1, 1, 1, len(layers) + 1]))
        return len(layers) - draw(st.integers(1, back))

    def alike(index: int, whole: bool) -> int:
        """A layer of the same height and width and, for a sum, of the same channels."""
        shape = INPUT if index == IMAGE else shapes[index]
        every = enumerate([*shapes, INPUT])
        fitting = [n if n < len(shapes) else IMAGE for n, s in every
                   if (s == shape if whole else s[1:] == shape[1:])]  # fmt: skip
        return draw(st.sampled_from(fitting))

    def conv(source: int, filters: int | None = None, **settings: Any) -> int:
        return add(
            Conv(
                inputs=(source,),
                filters=filters or draw(st.sampled_from([3, 6, 8, 8, 16])),
                activation=draw(st.sampled_from(["mish", "mish", "leaky", "linear", "prelu"])),
                batch_normalize=False,
                **settings,
            )
        )

    def cross_stage(source: int) -> int:
        """Two paths from one source, with chances of the hazards that forbid to merge them."""
        activation = draw(st.sampled_from(["mish", "relu", "prelu"]))
        width = draw(st.sampled_from([5, 8]))
        one = {"size": 1, "activation": activation, "batch_normalize": False, "filters": width}
        bypass = add(Conv(inputs=(source,), **one))
        split = last = add(Conv(inputs=(source,), **one))
        for _ in range(draw(st.integers(0, 2))):
            hidden = conv(last, width, size=draw(st.sampled_from([1, 3])))
            last = add(Shortcut(inputs=(hidden, draw(st.sampled_from([last, split])))))
        main = conv(draw(st.sampled_from([last, last, split])), width)
        paths = draw(st.permutations([main, bypass, *draw(st.sampled_from([[], [source]]))]))
        return add(Route(inputs=tuple(paths)))

    def pyramid(source: int) -> int:
        sizes = draw(st.lists(st.sampled_from([3, 5, 7]), min_size=2, max_size=3))
        pools = [add(MaxPool(inputs=(source,), size=size)) for size in sizes]
        return add(Route(inputs=(*pools, source)))

    def any_conv(source: int) -> int:
        channels = INPUT[0] if source == IMAGE else shapes[source][0]
        size, groups = draw(st.sampled_from([1, 1, 2, 3, 5])), draw(st.sampled_from([1, 1, 1, 2]))
        return conv(
            source, channels // groups * groups * 2 if groups > 1 else None, size=size,
            stride=draw(st.sampled_from([1, 1, 2])), groups=groups if channels % 2 == 0 else 1,
            padding=draw(st.sampled_from([None, None, 0])),
        )  # fmt: skip

    for _ in range(draw(st.integers(2, 10))):
        source = any_layer()
        match draw(st.sampled_from([1, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9])):
            case 1:
                any_conv(source)
            case 2:
                cross_stage(source)
            case 3:
                pyramid(source)
            case 4:
                others = [alike(source, True) for _ in range(draw(st.sampled_from([1, 1, 2, 5])))]
                activation = draw(st.sampled_from(["linear", "linear", "leaky", "prelu"]))
                weights = draw(st.sampled_from(["none", "none", "per_feature", "per_channel"]))
                add(Shortcut(inputs=(source, *others), activation=activation, weights=weights))
            case 5:
                others = [alike(source, False) for _ in range(draw(st.integers(1, 3)))]
                add(Route(inputs=(source, *others)))
            case 6:
                add(Route(inputs=(source,), groups=draw(st.sampled_from([1, 2, 4])), group=0))
            case 7:
                first = add(Route(inputs=(source, source)))
                add(Route(inputs=(first, source), groups=2, group=1))
            case 8:
                add(Sam(inputs=(source, alike(source, True))))
            case 9:
                size, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
                pool = add(MaxPool(inputs=(source,), size=size, stride=stride))
                add(Upsample(inputs=(pool,), stride=draw(st.integers(1, 2))))
    full = [n for n, shape in enumerate(shapes) if shape[1:] == INPUT[1:]]
    for source in draw(st.lists(st.sampled_from([*full[-2:], *full]), max_size=3)) if full else []:
        read = source if shapes[source][0] == 6 else conv(source, 6)
        add(Head(inputs=(read,), all_anchors=((4, 4),), mask=(0,), num_classes=1, stride=1))
    if not any(isinstance(layer, Head) for layer in layers) and draw(st.booleans()):
        conv(len(layers) - 1)  # so that the last layer but one is no map, and may be shared
    return Network(tuple(layers), INPUT[2], INPUT[1])


def channels(view: View) -> Iterator[tuple[int, int]]:
    return ((view.buffer, channel) for channel in range(view.offset, view.end))


def check(plan: Plan) -> None:
    """No step reads what nothing wrote or what it writes itself; no two live buffers overlap."""
    written = set(channels(plan.image))
    for step in plan.steps:
        assert written.issuperset(c for view in step.reads for c in channels(view))
        views = (*step.writes, *set(step.reads))
        assert not any(
            a.overlaps(b) for a, b in combinations(views, 2) if a in step.writes or b in step.writes
        )
        written.update(c for view in step.writes for c in channels(view))
    assert written.issuperset(c for view in plan.maps for c in channels(view))
    assert {number for number, _ in written} == set(range(len(plan.buffers)))
    placement = place(plan)
    for a, b in combinations(range(len(plan.buffers)), 2):
        (first_a, last_a), (first_b, last_b) = placement.lifetimes[a], placement.lifetimes[b]
        if first_a <= last_b and first_b <= last_a:
            (low_a, low_b), sizes = (placement.offsets[n] for n in (a, b)), placement.sizes
            assert low_a + sizes[a] <= low_b or low_b + sizes[b] <= low_a


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(networks(), st.sampled_from([1, 3]))
def test_random_networks(network: Network, batch: int) -> None:
    state = weighted(network)
    images = torch.rand(batch, *INPUT, generator=torch.Generator().manual_seed(1))
    truth = expected(network, state, images)
    assume(all(bool(raw.isfinite().all()) and float(raw.abs().max()) < 1e6 for raw in truth))
    for merge in (False, True):
        plan = lower(network, merge_siblings=merge)
        check(plan)
        assert_equal(run_reference(plan, state, images), truth)


def one(source: int) -> Conv:
    return Conv(inputs=(source,), filters=8, activation="mish", batch_normalize=False)


def wide(source: int) -> Conv:
    return Conv(inputs=(source,), filters=8, size=3, activation="mish", batch_normalize=False)


@pytest.mark.parametrize("beside", [True, False])
def test_a_slice_lent_to_one_sibling_is_not_taken_by_another(beside: bool) -> None:
    """In [4 | 6 | 2 | 5], or [8 | 6 | 2 | 5], layer 3 lies in 6's slice, beside its sibling 2,
    until 5 has read it. 6 is a sibling of 4, which runs before 5: they must not become one there,
    neither where they lie side by side nor where 4 could be lent 8's slice.
    """
    layers: list[Layer] = [one(IMAGE), wide(0), one(0), one(0), one(1), wide(3), one(1)]
    layers += [Route(inputs=(4, 6, 2, 5))] if beside else [
        wide(4), one(7), Route(inputs=(8, 6, 2, 5))
    ]  # fmt: skip
    network = Network((*layers, wide(len(layers) - 1)), INPUT[2], INPUT[1])
    state = weighted(network)
    images = torch.rand(2, *INPUT, generator=torch.Generator().manual_seed(1))
    plan = lower(network)
    check(plan)
    merged = [s.weights for s in plan.steps if isinstance(s, Convolution) and len(s.weights) > 1]
    assert merged == [(3, 2)]
    assert_equal(run_reference(plan, state, images), expected(network, state, images))


# Single steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_a_convolution_adds_the_residual_after_the_activation(activation: str) -> None:
    step = Convolution(
        layers=(0,), weights=(0,), source=View(0, 0, 4), out=View(1, 0, 6), residual=View(2, 0, 6),
        size=3, stride=2, padding=1, groups=2, activation=activation,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    source, weight, bias, residual = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 5, 7, 4), (6, 3, 3, 2), (6,), (2, 3, 4, 6))
    )
    result = convolution(step, source.half(), weight.half(), bias, residual.half())
    assert result.dtype == torch.float32
    for n, y, x, o in ((0, 0, 0, 0), (1, 2, 3, 5), (1, 1, 2, 3)):
        first = o // 3 * 2  # the group's first channel
        total = float(bias[o])
        for i in range(3):
            for j in range(3):
                row, column = 2 * y + i - 1, 2 * x + j - 1
                if 0 <= row < 5 and 0 <= column < 7:
                    window = source.half()[n, row, column, first : first + 2].double()
                    total += float(window @ weight.half()[o, i, j].double())
        true = activate(torch.tensor(total), activation) + residual.half()[n, y, x, o].double()
        assert float(result[n, y, x, o]) == pytest.approx(float(true), abs=1e-5)


def test_pools_never_see_the_padding() -> None:
    source = -torch.rand(1, 4, 5, 2) - 1
    out = torch.empty(1, 4, 5, 2)
    for size in (3, 5, 13):
        result = pool(source, size, 1, (size // 2,) * 4, out)
        assert result.shape == out.shape and (result < 0).all()
        assert result[0, 0, 0, 1] == source[0, : size // 2 + 1, : size // 2 + 1, 1].max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    """Of a convolution alone, of one that is added to, of a sum, and of a map that a head reads."""
    layers = [
        Conv(inputs=(IMAGE,), filters=6, size=3, activation=activation),
        Conv(inputs=(0,), filters=6, activation=activation),
        Shortcut(inputs=(1, 0)),
        Conv(inputs=(2,), filters=6, activation=activation),
        Shortcut(inputs=(3, 2), activation=activation),
        Conv(inputs=(4,), filters=6, activation=activation),
        Head(inputs=(5,), all_anchors=((4, 4),), mask=(0,), num_classes=1, stride=1),
    ]
    network = without_normalisation(Network(tuple(layers), INPUT[2], INPUT[1]))
    state = weighted(network)
    images = torch.rand(3, *INPUT, generator=torch.Generator().manual_seed(1))
    plan = lower(network)
    check(plan)
    assert_equal(run_reference(plan, state, images), expected(network, state, images))


@pytest.mark.parametrize("activation", ["linear", "mish", "prelu"])
@pytest.mark.parametrize("weights", ["per_feature", "per_channel"])
@pytest.mark.parametrize("count", [2, 4, 5, 9])
def test_weighted_sums(count: int, weights: str, activation: str) -> None:
    """9 of them: three steps, the last of one source, and one that adds what they give."""
    convs = [Conv(inputs=(IMAGE,), filters=6, size=3, activation="mish") for _ in range(count)]
    shortcut = Shortcut(inputs=tuple(range(count)), weights=weights, activation=activation)
    network = without_normalisation(Network((*convs, shortcut), INPUT[2], INPUT[1]))
    plan = lower(network)
    check(plan)
    sums = [step for step in plan.steps if isinstance(step, Combine)]
    rows = {2: [0], 4: [0], 5: [0, 4, None], 9: [0, 4, 8, None]}[count]
    assert [step.row for step in sums] == rows
    state = weighted(network)
    images = torch.rand(2, *INPUT, generator=torch.Generator().manual_seed(1))
    assert_equal(run_reference(plan, state, images), expected(network, state, images))


@pytest.mark.parametrize("product, value", [(False, -3.15), (True, -180_096_000.0)])
def test_combine_is_in_float32(product: bool, value: float) -> None:
    """Sums and products that half precision has no numbers for; a leaky activation after them."""
    step = Combine(
        layers=(0,), sources=(View(0, 0, 1),) * 3, out=View(1, 0, 1), product=product,
        activation="leaky",
    )  # fmt: skip
    sources = [torch.full((1, 1, 1, 1), x, dtype=torch.float16) for x in (60000, -60032, 0.5)]
    result = combine(step, sources)
    assert result.dtype == torch.float32
    assert float(result) == pytest.approx(value)


def test_weights_of_merged_siblings_lie_side_by_side(mini: Any) -> None:
    network, state = fold(mini.network, mini.state)
    plan = lower(network)
    weights = prepare_weights(plan, state, torch.float16)
    steps = [step for step in plan.steps if isinstance(step, Convolution)]
    assert set(weights) == {step.weights[0] for step in steps}
    (merged,) = (step for step in steps if len(step.weights) == 2)
    weight, bias = weights[merged.weights[0]]
    assert weight.shape == (32, 1, 1, 32) and weight.is_contiguous()
    assert weight.dtype == torch.float16 and bias.dtype == torch.float32
    for position, layer in enumerate(merged.weights):
        part = slice(16 * position, 16 * (position + 1))
        original = state[f"layers.{layer}.conv.weight"]
        assert torch.equal(weight[part, 0, 0], original[:, :, 0, 0].half())
        assert torch.equal(bias[part], state[f"layers.{layer}.conv.bias"])
