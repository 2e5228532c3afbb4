"""The kernels between convolutions on a GPU: every type, the sizes of real networks, slices whose
offsets pass 2^31, capture in a CUDA graph, other streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference
from yolov4_fast.ops.combine import combine
from yolov4_fast.ops.mish_bn import mish_bn
from yolov4_fast.ops.pool import max_pool, max_pool_reference, pyramid_pool
from yolov4_fast.ops.upsample import upsample, upsample_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# One unit in the last place of a rounded result; float32's exponential is a little less exact, and
# a sum that cancels keeps the absolute error of its terms.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
}
SHAPES = [(1, 13, 13, 1024), (3, 52, 52, 256), (2, 208, 208, 64), (2, 7, 5, 255), (1, 1, 1, 1)]
ALL_TYPES = (*TOLERANCES, torch.float8_e4m3fn)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_slice(shape: tuple[int, ...], dtype: torch.dtype, before: int = 32) -> Tensor:
    """Within a poisoned buffer, with 16 channels after it."""
    buffer = torch.full((*shape[:3], shape[3] + before + 16), math.nan, device="cuda").to(dtype)
    view = buffer[..., before : before + shape[3]]
    return view.copy_(3 * torch.randn(shape, device="cuda"))


def same(out: Tensor, expected: Tensor) -> bool:
    return torch.equal(out.float(), expected.to(out.device).float())


@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES)
def test_mish_bn(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    x, residual, out = (random_slice(shape, dtype) for _ in range(3))
    scale, bias = torch.randn(2, shape[3], device="cuda")
    arguments = (x, scale, bias, activation, residual)
    expected = mish_bn(*arguments, torch.empty_like(out), implementation="reference")
    torch.testing.assert_close(mish_bn(*arguments, out), expected, **TOLERANCES[dtype])
    mish_bn(*arguments, x)  # in place
    torch.testing.assert_close(x, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_partial_sums_are_exact_and_repeatable(splits: int, dtype: torch.dtype) -> None:
    shape = (1, 13, 13, 512)
    partial = torch.randn(splits, 169, 512, device="cuda")
    out = random_slice(shape, dtype)
    expected = mish_bn(
        partial, None, None, "linear", None, torch.empty_like(out), implementation="reference"
    )
    for _ in range(3):
        assert torch.equal(mish_bn(partial, None, None, "linear", None, out.fill_(0)), expected)


def test_extreme_values_stay_finite() -> None:
    powers = 10.0 ** torch.arange(-45, 39, dtype=torch.float64)
    values = torch.cat([powers, torch.tensor([0, 20, 88, 104, 65504, 3.4e38])]).float()
    x = torch.cat([values, -values]).cuda().reshape(1, 1, 1, -1)
    for dtype, most in ((torch.float32, math.inf), (torch.bfloat16, 3.38e38), (torch.float16, 6e4)):
        bounded = x.clamp(-most, most).to(dtype)
        for activation in ACTIVATION_CODES:
            out = mish_bn(bounded, None, None, activation, None, torch.empty_like(bounded))
            exact = activate_reference(bounded.double(), activation).to(dtype)
            assert not out.isnan().any(), (dtype, activation)
            assert (out.isfinite() | exact.isinf()).all(), (dtype, activation)  # SELU's slope: 1.05


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("shape", [(1, 13, 13, 512), (3, 19, 19, 512), (2, 20, 12, 83)])
@pytest.mark.parametrize("sizes", [(5, 9, 13), (3, 5, 7, 9, 11)])
def test_pyramid_pool(shape: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Repeated: passes of a block that did not wait for each other would differ now and then."""
    batch, height, width, channels = shape
    buffer = torch.empty((batch, height, width, channels * (len(sizes) + 1)), device="cuda")
    buffer = buffer.to(dtype)
    views = buffer.split(channels, 3)
    source = views[-1].copy_(torch.randn(shape, device="cuda") - 6)
    for _ in range(20):
        for view in views[:-1]:
            view.copy_(torch.full(shape, 400.0, device="cuda"))
        pyramid_pool(source, views[:-1], sizes)
        for size, out in zip(sizes, views[:-1], strict=True):
            assert same(out, max_pool_reference(source, size, 1, (size // 2,) * 4)), size


def test_every_window_is_covered() -> None:
    source = torch.zeros(1, 40, 36, 8, device="cuda")
    source[0, 19, 22] = 1
    for first in range(1, 16, 2):
        for second in range(first, 32, 2):
            outs = [torch.empty_like(source) for _ in range(2)]
            pyramid_pool(source, outs, (first, second))
            for size, out in zip((first, second), outs, strict=True):
                assert same(out, max_pool_reference(source, size, 1, (size // 2,) * 4))


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize(
    ("size", "stride", "pads"), [(2, 2, (0, 0, 0, 0)), (2, 1, (0, 1, 0, 1)), (3, 2, (1, 1, 1, 1))]
)
@pytest.mark.parametrize("shape", [(2, 104, 104, 128), (1, 13, 13, 512), (3, 9, 7, 21)])
def test_max_pool(
    shape: tuple[int, ...], size: int, stride: int, pads: tuple[int, ...], dtype: torch.dtype
) -> None:
    source = random_slice(shape, dtype)
    expected = max_pool_reference(source, size, stride, pads)
    out = torch.empty(expected.shape, dtype=dtype, device="cuda")
    assert same(max_pool(source, out, size, stride, pads), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    source = torch.zeros(1, 5, 5, 16, dtype=dtype, device="cuda")
    source[0, 2, 2, 3] = math.nan
    out = max_pool(source, torch.empty_like(source), 3, 1, (1, 1, 1, 1))
    assert out.isnan().sum() == 9
    pyramid_pool(source, [out], [5])
    assert out.isnan().sum() == 25
    for activation in ACTIVATION_CODES:
        mish_bn(source, None, None, activation, None, out)
        assert out.isnan().sum() == 1


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 26, 26, 128), (1, 13, 13, 256), (3, 5, 4, 33)])
def test_upsample(shape: tuple[int, ...], factor: int, dtype: torch.dtype) -> None:
    source = random_slice(shape, dtype)
    expected = upsample_reference(source, factor)
    out = random_slice(tuple(expected.shape), dtype)
    assert same(upsample(source, out, factor), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("product", [False, True])
def test_combine(dtype: torch.dtype, count: int, product: bool) -> None:
    shape = (2, 26, 26, 200)
    sources = [random_slice(shape, dtype) for _ in range(count)]
    out = random_slice(shape, dtype)
    expected = combine(sources, torch.empty_like(out), product, "mish", implementation="reference")
    torch.testing.assert_close(
        combine(sources, out, product, "mish"), expected, **TOLERANCES[dtype]
    )


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("activation", ["linear", "mish", "prelu"])
def test_weighted_sums(dtype: torch.dtype, count: int, activation: str) -> None:
    shape = (2, 26, 26, 200)
    sources = [random_slice(shape, dtype) for _ in range(count)]
    out = random_slice(shape, dtype)
    vectors = {
        "weights": torch.rand(count, 200, device="cuda"),
        "slopes": torch.randn(200, device="cuda") if activation == "prelu" else None,
    }
    expected = combine(
        sources, torch.empty_like(out), False, activation, **vectors, implementation="reference"
    )
    torch.testing.assert_close(
        combine(sources, out, False, activation, **vectors), expected, **TOLERANCES[dtype]
    )


@pytest.fixture
def far() -> Tensor:
    """[1, 65600, 1, 16] in a buffer of 2^31 values and more: the last rows are beyond 32 bits."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    buffer = torch.empty((1, 65600, 1, 32768), dtype=torch.float16, device="cuda")
    return buffer[..., 16:32].normal_()


def test_offsets_beyond_32_bits(far: Tensor) -> None:
    near, bias = torch.randn_like(far), torch.randn(16, device="cuda")
    assert near.stride(2) == 16
    plain = far.clone()
    tolerance = TOLERANCES[torch.float16]

    def both(function: Callable[[Tensor], Tensor]) -> None:
        """The same from afar as from nearby."""
        torch.testing.assert_close(function(far), function(plain), **tolerance)

    both(lambda x: mish_bn(x, None, bias, "mish", None, torch.empty_like(plain)))
    both(lambda x: mish_bn(near, None, bias, "mish", x, torch.empty_like(plain)))
    both(lambda x: combine([near, x], torch.empty_like(plain), False, "linear"))
    rows = torch.rand(2, 16, device="cuda")
    both(lambda x: combine([near, x], torch.empty_like(plain), False, "linear", weights=rows))
    both(lambda x: max_pool(x, torch.empty_like(plain), 3, 1, (1, 1, 1, 1)))
    both(lambda x: upsample(x, torch.empty_like(plain), 1))
    both(lambda x: mish_bn(near, None, bias, "mish", None, x))
    both(lambda x: upsample(near, x, 1))
    both(lambda x: max_pool(near, x, 3, 1, (1, 1, 1, 1)))


def test_capture_in_a_graph_on_another_stream() -> None:
    """Nothing waits for the device and nothing is lost: replays follow new inputs."""
    x = random_slice((2, 13, 13, 64), torch.float16)
    bias = torch.randn(64, device="cuda")
    buffer = torch.zeros((2, 13, 13, 192), dtype=torch.float16, device="cuda")
    first, second, third = buffer.split(64, 3)
    large = torch.zeros((2, 26, 26, 64), dtype=torch.float16, device="cuda")
    total = torch.zeros_like(large)
    small = torch.zeros_like(x)

    def run() -> None:
        mish_bn(x, None, bias, "mish", None, first)
        pyramid_pool(first, [second, third], [5, 9])
        upsample(third, large, 2)
        combine([large, large], total, False, "relu")
        max_pool(total, small, 2, 2, (0, 0, 0, 0))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    for _ in range(3):
        x.copy_(torch.randn(x.shape, device="cuda"))
        for output in (buffer, large, total, small):
            output.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        expected = mish_bn(
            x, None, bias, "mish", None, torch.empty_like(x), implementation="reference"
        )
        torch.testing.assert_close(first, expected, **TOLERANCES[torch.float16])
        pooled = max_pool_reference(first, 9, 1, (4, 4, 4, 4))
        assert same(third, pooled)
        assert same(small, (2 * pooled).relu())
