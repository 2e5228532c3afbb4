"""Normalisation and activation for training against torch's autograd in float64; the kernels in the
interpreter without a GPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference
from yolov4_fast.ops.channel_moments import batch_statistics, join_moments, partial_moments
from yolov4_fast.ops.mish_bn_train import (
    gradient_sums,
    input_gradient,
    mish_bn_train,
    normalise,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
IMPLEMENTATIONS = ("kernel", "reference")
# [B, C, H, W]: three values, one channel, C of no block, one row, more tiles than programs.
SHAPES = [
    (3, 1, 1, 1),
    (1, 7, 5, 3),
    (1, 1, 40, 33),
    (3, 300, 1, 2),
    (1, 255, 4, 4),
    (5, 24, 40, 37),
]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in interpretation


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def statistics_of(x: Tensor, implementation: str | None = None) -> Tensor:
    """x: [B, C, H, W]."""
    parts = partial_moments(x.permute(0, 2, 3, 1), implementation=implementation)
    return batch_statistics(parts, EPS, implementation=implementation)


class Layer:
    """Random operands in channels-last memory, and what torch makes of them in float64."""

    def __init__(
        self, shape: tuple[int, ...], activation: str, dtype: torch.dtype = torch.float32
    ) -> None:
        x, dy = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
        spread = torch.rand(shape[1]) + 0.5
        x = x * spread[:, None, None] * 3 + torch.randn(shape[1], 1, 1)
        self.x, self.dy = x.to(dtype).to(DEVICE), dy.to(dtype).to(DEVICE)
        self.weight = (torch.rand(shape[1]) + 0.5).to(DEVICE)
        self.bias = torch.randn(shape[1]).to(DEVICE)
        self.activation = activation

    def expected(self) -> tuple[Tensor, ...]:
        """y, dx, dweight, dbias."""
        inputs = [t.double().requires_grad_() for t in (self.x, self.weight, self.bias)]
        z = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True, eps=EPS)
        y = activate_reference(z, self.activation)
        return y.detach(), *torch.autograd.grad(y, inputs, self.dy.double())

    def run(self, implementation: str, dy: Tensor | None = None) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in (self.x, self.weight, self.bias)]
        statistics = statistics_of(inputs[0].detach(), implementation)
        y = mish_bn_train(
            inputs[0], statistics, *inputs[1:], self.activation, implementation=implementation
        )
        return y.detach(), *torch.autograd.grad(y, inputs, self.dy if dy is None else dy)


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Largest difference as a share of the largest value: the gradients cancel within a channel."""
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), found, expected, strict=True):
        limit = tolerance * b.abs().max().clamp(min=1e-3)
        assert (a.double() - b).abs().max() <= limit, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
def test_gradients_of_every_activation(activation, implementation):
    layer = Layer((2, 19, 9, 7), activation)
    check(layer.run(implementation), layer.expected(), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_odd_shapes(shape, dtype, implementation):
    """Half precision: one rounding of y and dx, half a unit in the last place of 11 bits."""
    layer = Layer(shape, "mish", dtype)
    found = layer.run(implementation)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[2].dtype == found[3].dtype == torch.float32
    check(found, layer.expected(), 2e-5 if dtype == torch.float32 else 1e-3)


def test_the_reference_in_float64_passes_gradcheck():
    x = torch.randn(2, 3, 3, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        x = x.contiguous(memory_format=torch.channels_last)
        return mish_bn_train(x, statistics_of(x.detach()), weight, bias, "mish")

    assert torch.autograd.gradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("after", [0, 3, 8])
def test_a_gradient_that_is_a_slice_of_a_wider_one(after, implementation):
    """As the gradient of a concatenation is."""
    layer = Layer((2, 16, 7, 5), "mish")
    buffer = torch.full((2, 7, 5, 24 + after), math.nan, device=DEVICE)
    dy = buffer.permute(0, 3, 1, 2)[:, 8:24]
    dy.copy_(layer.dy)
    check(layer.run(implementation, dy), layer.expected(), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tensors_in_any_memory(implementation):
    layer = Layer((2, 5, 7, 3), "mish")
    expected = layer.expected()
    layer.x = layer.x.contiguous()
    inputs = [t.requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    statistics = statistics_of(layer.x.detach().to(memory_format=torch.channels_last))
    y = mish_bn_train(inputs[0], statistics, *inputs[1:], "mish", implementation=implementation)
    gradients = torch.autograd.grad(y, inputs, layer.dy.contiguous(), retain_graph=True)
    check((y.detach(), *gradients), expected, 1e-5)
    ones = torch.ones_like(y)
    same = torch.autograd.grad(y, inputs, ones, retain_graph=True)
    spread = torch.autograd.grad(y.sum(), inputs)  # a gradient with strides of 0
    assert all(torch.equal(a, b) for a, b in zip(same, spread, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
def test_extreme_values_stay_finite(activation, dtype, implementation):
    """z up to 65504 either way: neither softplus nor a square may overflow on the way."""
    values = torch.tensor([0, 6e-8, 1e-3, 20, 88, 104, 700, 65504.0])
    x = torch.cat([values, -values]).to(DEVICE, dtype).view(1, 1, 4, 4).requires_grad_()
    one, zero = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    statistics = torch.tensor([[0.0], [1.0], [16.0]], device=DEVICE)  # z = x
    y = mish_bn_train(x, statistics, one, zero, activation, implementation=implementation)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wide = x.detach().double().requires_grad_()
    z = activate_reference(wide, activation)
    dz = torch.autograd.grad(z.sum(), wide)[0]
    expected = dz - dz.mean() - wide.detach() * (dz * wide.detach()).mean()
    fits = expected.abs() < torch.finfo(dtype).max
    assert torch.equal(y.isfinite(), z.to(dtype).isfinite())
    rtol = 1e-3 if dtype == torch.float16 else 2e-5
    torch.testing.assert_close(
        y.detach().double(), z.detach().to(dtype).double(), rtol=rtol, atol=1e-6
    )
    assert dx[fits].isfinite().all()
    torch.testing.assert_close(dx[fits].double(), expected[fits], rtol=2 * rtol, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tiny_spread_about_a_far_mean(implementation):
    """float32 holds 1000 + 0.01 v to 3e-5: a hundredth of the spread, and no more is lost."""
    layer = Layer((4, 5, 9, 9), "mish")
    layer.x = 1000 + 0.01 * layer.x
    found, expected = layer.run(implementation), layer.expected()
    assert (found[0].double() - expected[0]).abs().max() < 0.01
    assert (found[1].double() - expected[1]).abs().max() < 0.01 * expected[1].abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pieces_of_two_processes_make_the_whole(implementation):
    """Moments joined before, sums added between: what an all-reduce does, by hand."""
    layer = Layer((5, 19, 6, 7), "mish")
    expected = layer.expected()
    shares = [(layer.x[:2], layer.dy[:2]), (layer.x[2:], layer.dy[2:])]
    rows = [(x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)) for x, dy in shares]
    option = {"implementation": implementation}
    parts = [join_moments(partial_moments(x, **option), **option) for x, _ in rows]
    statistics = batch_statistics(torch.stack(parts), EPS, **option)
    parameters = (statistics, layer.weight, layer.bias, "mish")
    y = torch.cat([normalise(x, *parameters, **option) for x, _ in rows])
    sums = [gradient_sums(x, dy, *parameters, **option) for x, dy in rows]
    total = sums[0] + sums[1]
    dx = torch.cat([input_gradient(x, dy, *parameters, total, **option) for x, dy in rows])
    found = (y.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2), total[1], total[0])
    check(found, expected, 1e-5)

    # The same through autograd: dx of the whole, each process's own dweight and dbias.
    for (x, dy), own, dx_own in zip(shares, sums, dx.split([2, 3]), strict=True):
        inputs = [t.detach().requires_grad_() for t in (x, layer.weight, layer.bias)]
        y = mish_bn_train(
            *(inputs[0], statistics, *inputs[1:], "mish"),
            sum_over=lambda sums: sums.copy_(total),
            implementation=implementation,
        )
        gradients = torch.autograd.grad(y, inputs, dy)
        assert torch.equal(gradients[0], dx_own.permute(0, 3, 1, 2))
        torch.testing.assert_close(gradients[1:], (own[1], own[0]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_that_came_before_are_constant_for_the_gradient(implementation):
    before = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    layer = Layer((2, 4, 5, 6), "mish")
    inputs = [t.double().requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    whole = torch.cat([before.to(DEVICE), inputs[0]])
    y = F.mish(F.batch_norm(whole, None, None, inputs[1], inputs[2], training=True, eps=EPS))[3:]
    expected = y.detach(), *torch.autograd.grad(y, inputs, layer.dy.double())
    parts = [
        join_moments(partial_moments(x.to(DEVICE).permute(0, 2, 3, 1).contiguous()))
        for x in (before.float(), layer.x)
    ]
    inputs = [t.detach().requires_grad_() for t in (layer.x, layer.weight, layer.bias)]
    statistics = batch_statistics(torch.stack(parts), EPS)
    y = mish_bn_train(inputs[0], statistics, *inputs[1:], "mish", implementation=implementation)
    check((y.detach(), *torch.autograd.grad(y, inputs, layer.dy)), expected, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_same_bits_in_every_run(implementation):
    layer = Layer((2, 20, 33, 37), "mish", torch.float16)
    first = layer.run(implementation)
    for a, b in zip(first, layer.run(implementation), strict=True):
        assert torch.equal(a, b)


def saved_bytes(function) -> int:
    """Of the tensors that autograd keeps, each memory once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_x_and_a_few_numbers_a_channel_are_kept(implementation):
    layer = Layer((2, 24, 16, 16), "mish")
    x = layer.x.requires_grad_()
    statistics = statistics_of(layer.x.detach())
    weight, bias = layer.weight.requires_grad_(), layer.bias.requires_grad_()
    one = x.nelement() * x.element_size()
    ours = saved_bytes(
        lambda: mish_bn_train(x, statistics, weight, bias, "mish", implementation=implementation)
    )
    torchs = saved_bytes(lambda: F.mish(F.batch_norm(x, None, None, weight, bias, training=True)))
    assert one <= ours <= one + 5 * 24 * 4 and torchs >= 2 * one


def test_kernels_run_on_cuda_tensors_and_the_reference_on_others():
    layer = Layer((1, 3, 4, 4), "mish")
    statistics = statistics_of(layer.x)
    chosen = mish_bn_train(layer.x, statistics, layer.weight, layer.bias, "mish")
    named = mish_bn_train(
        *(layer.x, statistics, layer.weight, layer.bias, "mish"),
        implementation="kernel" if DEVICE == "cuda" else "reference",
    )
    assert torch.equal(chosen, named)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_is_asked_for_needs_a_gradient(wanted):
    layer = Layer((2, 3, 4, 4), "mish")
    inputs = [
        t.requires_grad_(want)
        for t, want in zip((layer.x, layer.weight, layer.bias), wanted, strict=True)
    ]
    y = mish_bn_train(inputs[0], statistics_of(layer.x.detach()), *inputs[1:], "mish")
    y.backward(layer.dy)
    assert [t.grad is not None for t in inputs] == list(wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "must be one of linear"),
        ({"activation": "prelu"}, "must be one of linear"),
        ({"x": torch.zeros(1, 2, 3, 4).int()}, "x must be torch.float32"),
        ({"x": torch.zeros(0, 2, 3, 4)}, "no size 0"),
        ({"x": torch.zeros(1, 5, 3, 4)}, r"the statistics must be \[3, 5\]"),
        ({"statistics": torch.zeros(2, 2)}, r"the statistics must be \[3, 2\]"),
        ({"weight": torch.zeros(2).half()}, "the weight must be torch.float32"),
        ({"bias": torch.zeros(4)[::2]}, "the bias must be .* contiguous"),
        ({"x": torch.zeros(1, 2, 3, 4, device="meta")}, "one device"),
        ({"implementation": "fast"}, "implementation must be one of"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "x": torch.zeros(1, 2, 3, 4),
        "statistics": torch.ones(3, 2),
        "weight": torch.ones(2),
        "bias": torch.ones(2),
        "activation": "mish",
    }
    with pytest.raises(ValueError, match=message):
        mish_bn_train(**{**arguments, **change})


def test_mistakes_in_the_backward_pieces_are_named():
    x = torch.zeros(1, 3, 4, 2)
    parameters = (torch.ones(3, 2), torch.ones(2), torch.ones(2), "mish")
    with pytest.raises(ValueError, match="must have one shape"):
        gradient_sums(x, torch.zeros(1, 3, 3, 2), *parameters)
    with pytest.raises(ValueError, match=r"dy must be torch\.float32"):
        gradient_sums(x, x.half(), *parameters)
    with pytest.raises(ValueError, match=r"the sums must be \[2, 2\]"):
        input_gradient(x, x, *parameters, torch.zeros(2, 3))
