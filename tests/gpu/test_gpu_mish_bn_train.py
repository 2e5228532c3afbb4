"""Normalisation with activation in training, on a GPU: every type, the sizes of real networks,
offsets beyond 2^31, the same bits in every run, capture in a CUDA graph, a whole network.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.batch_norm import BatchNorm, begin_batch, convert, frozen
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference
from yolov4_fast.ops.channel_moments import batch_statistics, join_moments, partial_moments
from yolov4_fast.ops.full_precision import full_precision
from yolov4_fast.ops.mish_bn_train import gradient_sums, input_gradient, mish_bn_train, normalise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Of the largest value: y and dx are rounded once, half a unit in the last place; float32's
# exponential and its sums of up to a million values are a little less exact.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}
SHAPES = [
    (8, 1024, 13, 13),
    (8, 256, 52, 52),
    (4, 64, 208, 208),
    (2, 32, 416, 416),
    (2, 255, 7, 5),
    (5, 1, 9, 1),
    (1, 300, 1, 3),
]
EPS = 1e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Layer:
    """Random operands on the GPU, and what torch makes of them in float64."""

    def __init__(self, shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
        spread = torch.rand(shape[1], 1, 1, device="cuda") + 0.5
        x = 2 * spread * torch.randn(shape, device="cuda") + torch.randn(
            shape[1], 1, 1, device="cuda"
        )
        self.x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        dy = torch.randn(shape, device="cuda").to(dtype)
        self.dy = dy.contiguous(memory_format=torch.channels_last)
        self.weight = torch.rand(shape[1], device="cuda") + 0.5
        self.bias = torch.randn(shape[1], device="cuda")
        self.activation = activation

    def expected(self) -> tuple[Tensor, ...]:
        inputs = [t.double().requires_grad_() for t in (self.x, self.weight, self.bias)]
        z = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True, eps=EPS)
        y = activate_reference(z, self.activation)
        return y.detach(), *torch.autograd.grad(y, inputs, self.dy.double())

    def run(self) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in (self.x, self.weight, self.bias)]
        statistics = batch_statistics(partial_moments(self.x.permute(0, 2, 3, 1)), EPS)
        y = mish_bn_train(inputs[0], statistics, *inputs[1:], self.activation)
        return y.detach(), *torch.autograd.grad(y, inputs, self.dy)


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), found, expected, strict=True):
        error = float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3))
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES)
def test_mish_of_every_type_and_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Layer(shape, "mish", dtype)
    found = layer.run()
    assert found[0].dtype == found[1].dtype == dtype
    check(found, layer.expected(), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    layer = Layer((4, 72, 31, 17), activation, dtype)
    check(layer.run(), layer.expected(), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = (torch.randn(shape, device="cuda") + 30).to(dtype).permute(0, 2, 3, 1).contiguous()
    mean, squares, count = join_moments(partial_moments(rows))
    wide = rows.double().flatten(0, 2)
    expected = wide.mean(0)
    assert (mean - expected).abs().max() <= 1e-5
    torch.testing.assert_close(
        squares.double(), (wide - expected).square().sum(0), rtol=1e-5, atol=1e-8
    )
    assert (count == len(wide)).all()


def test_running_statistics_are_those_of_torch() -> None:
    x = torch.randn(4, 96, 20, 20, device="cuda").contiguous(memory_format=torch.channels_last)
    plain, fused = (nn.BatchNorm2d(96, momentum=0.3).cuda() for _ in range(2))
    ours = BatchNorm(fused, "mish")
    for _ in range(3):
        torch.testing.assert_close(ours(x), F.mish(plain(x)), rtol=1e-5, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    """With other work on the device in between, which moves programs to other SMs."""
    layer = Layer((16, 128, 76, 76), "mish", dtype)
    first = layer.run()
    for _ in range(5):
        torch.randn(2**22, device="cuda").sort()
        assert all(torch.equal(a, b) for a, b in zip(first, layer.run(), strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
def test_extreme_values_stay_finite(activation: str, dtype: torch.dtype) -> None:
    most = 1e4 if dtype == torch.float16 else 1e18
    powers = 10.0 ** torch.arange(-8, math.log10(most) + 1)
    values = torch.cat([powers, torch.tensor([0, 20, 88, 104, 700.0])])
    x = torch.cat([values, -values]).cuda().to(dtype).reshape(1, 1, -1, 1)
    statistics = torch.tensor([[0.0], [1.0], [x.numel()]], device="cuda")  # z = x
    parameters = (statistics, torch.ones(1, device="cuda"), torch.zeros(1, device="cuda"))
    assert normalise(x, *parameters, activation).isfinite().all()
    dy = torch.ones_like(x)
    sums = gradient_sums(x, dy, *parameters, activation)
    assert sums.isfinite().all()
    none = torch.zeros_like(sums)
    dz = input_gradient(x, dy, *parameters, activation, none)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(activate_reference(wide, activation).sum(), wide)
    torch.testing.assert_close(dz.double(), expected, rtol=1e-2, atol=1e-5)


def test_a_gradient_that_is_a_slice() -> None:
    layer = Layer((4, 64, 26, 26), "mish", torch.bfloat16)
    expected = layer.run()
    buffer = torch.full((4, 26, 26, 160), math.nan, device="cuda", dtype=torch.bfloat16)
    wider = buffer.permute(0, 3, 1, 2)[:, 32:96]
    layer.dy = wider.copy_(layer.dy)
    assert all(torch.equal(a, b) for a, b in zip(expected, layer.run(), strict=True))


def test_offsets_beyond_32_bits() -> None:
    """[1, 65600, 1, 32768] has more than 2^31 values: first slices of it, then all of it."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    buffer = torch.zeros((1, 65600, 1, 32768), dtype=torch.bfloat16, device="cuda")
    x, dy = buffer[..., :16].normal_(), buffer[..., 32:48].normal_()
    near = x.contiguous(), dy.contiguous()
    statistics = batch_statistics(partial_moments(x), EPS)
    assert torch.equal(statistics, batch_statistics(partial_moments(near[0]), EPS))
    parameters = (statistics, torch.ones(16, device="cuda"), torch.zeros(16, device="cuda"), "mish")
    assert torch.equal(normalise(x, *parameters), normalise(near[0], *parameters))
    sums = gradient_sums(x, dy, *parameters)
    assert torch.equal(sums, gradient_sums(*near, *parameters))
    dx = input_gradient(x, dy, *parameters, sums)
    assert torch.equal(dx, input_gradient(*near, *parameters, sums))

    statistics = batch_statistics(partial_moments(buffer), EPS)
    ones, zeros = torch.ones(32768, device="cuda"), torch.zeros(32768, device="cuda")
    whole = normalise(buffer, statistics, ones, zeros, "linear")
    last = (buffer[0, -1, 0, :16].float() - statistics[0, :16]) * statistics[1, :16]
    torch.testing.assert_close(whole[0, -1, 0, :16].float(), last, rtol=1e-2, atol=1e-2)
    assert whole[0, -1, 0, 64:].eq(0).all()


def test_capture_in_a_graph_on_another_stream() -> None:
    """Forward and backward wait for nothing on the host: replays follow new inputs."""
    layer = Layer((4, 64, 26, 26), "mish", torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = layer.run()
    for _ in range(3):
        layer.x.normal_()
        layer.dy.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, layer.run(), strict=True))


def small_network() -> tuple[NetworkModule, Tensor]:
    module = NetworkModule(by_name("yolov4-nano", num_classes=3, width=96, height=96)).cuda()
    images = torch.rand(4, 3, 96, 96, device="cuda").contiguous(memory_format=torch.channels_last)
    return module.to(memory_format=torch.channels_last).train(), images


def gradients(module: NetworkModule, images: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    sum(raw.float().square().mean() for raw in module(images)).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def test_a_network_in_float32_learns_what_it_learns_in_torch() -> None:
    module, images = small_network()
    fused = copy.deepcopy(module)
    convert(fused, "local")
    with full_precision():
        expected, found = gradients(module, images), gradients(fused, images)
    for name, gradient in expected.items():
        limit = 1e-3 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=limit, msg=name)
    for (name, value), other in zip(module.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)


def test_under_autocast_maps_are_bf16_and_a_third_less_is_kept() -> None:
    module, images = small_network()
    fused = copy.deepcopy(module)
    convert(fused, "sync")
    images = images.repeat(8, 1, 2, 2)
    kept = {}
    for name, program in {"plain": module, "fused": fused}.items():
        for _ in range(2):  # the first also compiles and chooses algorithms
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                maps = program(images)
            kept[name] = torch.cuda.memory_allocated() - before
            sum(raw.float().sum() for raw in maps).backward()
            assert all(raw.dtype == torch.bfloat16 and raw.isfinite().all() for raw in maps)
            program.zero_grad(set_to_none=True)
            del maps
    assert kept["fused"] < 0.72 * kept["plain"]


def test_cross_and_frozen_are_as_on_the_cpu() -> None:
    module, images = small_network()
    wide = copy.deepcopy(module).cpu().double()
    for m in (module, wide):
        convert(m, "cross", 2)
    with full_precision():
        for _ in range(2):
            for m in (module, wide):
                begin_batch(m)
            for half in images.split(2):
                with frozen(module):
                    attacked = module(half)
                found, expected = module(half), wide(half.cpu().double())
                for a, b, c in zip(found, expected, attacked, strict=True):
                    assert torch.equal(a, c)
                    limit = 1e-3 * float(b.detach().abs().max())
                    torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=limit)
    for (name, value), other in zip(wide.named_buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(
            other.cpu().to(value.dtype), value, rtol=1e-3, atol=1e-4, msg=name
        )
