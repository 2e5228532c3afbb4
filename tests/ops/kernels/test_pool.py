"""The pooling kernels against torch, in the interpreter without a GPU: bit by bit."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yolov4_fast.network.layers import MaxPool
from yolov4_fast.network.module import max_pool as max_pool_in_network
from yolov4_fast.ops.pool import max_pool, max_pool_reference, pyramid_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[3]
DTYPES = (torch.float32, torch.float16, torch.float8_e4m3fn)


def random_slice(shape: tuple[int, ...], dtype: torch.dtype, before: int = 3) -> torch.Tensor:
    """Below zero, so that a padding of 0 would show."""
    torch.manual_seed(0)
    wide = torch.randn(*shape[:3], shape[3] + before + 5) - 6
    return wide.to(dtype).to(DEVICE)[..., before:-5]


def same(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(out.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "stride", "pads"),
    [
        (2, 2, (0, 0, 0, 0)),
        (2, 1, (0, 1, 0, 1)),
        (3, 1, (1, 1, 1, 1)),
        (3, 2, (1, 0, 0, 1)),
        (5, 3, (4, 2, 0, 3)),
        (1, 2, (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 9, 5, 140)])
def test_max_pool(shape, size, stride, pads, dtype):
    source = random_slice(shape, dtype)
    expected = max_pool_reference(source, size, stride, pads)
    buffer = torch.full((*expected.shape[:3], shape[3] + 9), 1.5).to(dtype).to(DEVICE)
    out = buffer[..., 4:-5]
    assert max_pool(source, out, size, stride, pads) is out
    assert same(out, expected)
    assert buffer[..., :4].float().eq(1.5).all() and buffer[..., -5:].float().eq(1.5).all()


@pytest.mark.parametrize(
    ("size", "stride", "height", "width"),
    [(2, 2, 8, 10), (2, 2, 7, 9), (2, 1, 6, 5), (3, 2, 7, 8), (13, 1, 4, 20)],
)
def test_the_reference_pools_as_networks_do(size, stride, height, width):
    """With the pads that Darknet's rule gives, also for odd sizes."""
    layer = MaxPool(inputs=(0,), size=size, stride=stride)
    x = torch.randn(2, 3, height, width)
    expected = max_pool_in_network(x, layer)
    pads = (*layer.pads(height, expected.shape[2]), *layer.pads(width, expected.shape[3]))
    out = max_pool_reference(x.permute(0, 2, 3, 1), size, stride, pads)
    assert torch.equal(out.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(5, 9, 13), (13, 9, 5), (3,), (13,), (1, 7), (5, 5), (9, 3, 7, 13, 5)]
)
@pytest.mark.parametrize("shape", [(2, 5, 4, 19), (1, 13, 13, 16)])
def test_pyramid_into_the_buffer_of_its_source(shape, sizes, dtype):
    """Poisoned: what is read before it is written shows as NaN."""
    channels = shape[3]
    buffer = torch.full((*shape[:3], channels * (len(sizes) + 1) + 2), math.nan)
    buffer = buffer.to(dtype).to(DEVICE)
    views = [buffer[..., i * channels : (i + 1) * channels] for i in range(len(sizes) + 1)]
    source, outs = views[-1], views[:-1]
    source.copy_(random_slice(shape, dtype))
    before = source.clone()
    assert pyramid_pool(source, outs, sizes) is outs
    for size, out in zip(sizes, outs, strict=True):
        assert same(out, max_pool_reference(before, size, 1, (size // 2,) * 4)), size
    assert same(source, before) and buffer[..., -2:].float().isnan().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 1, 30, 9), (1, 19, 19, 8), (2, 2, 40, 3)])
def test_pyramid_of_other_maps(shape):
    source = random_slice(shape, torch.float32)
    sizes = (5, 9, 13)
    outs = [torch.empty(shape, device=DEVICE) for _ in sizes]
    pyramid_pool(source, outs, sizes)
    for size, out in zip(sizes, outs, strict=True):
        assert same(out, max_pool_reference(source, size, 1, (size // 2,) * 4))


def test_every_size_covers_its_window():
    """One large value: its shadow in each map is the window, whatever sizes the chain went by."""
    source = torch.zeros(1, 11, 9, 1, device=DEVICE)
    source[0, 4, 5] = 1
    for first in (1, 3, 5):
        for second in range(first, 12, 2):
            outs = [torch.empty_like(source) for _ in range(2)]
            pyramid_pool(source, outs, (first, second))
            for size, out in zip((first, second), outs, strict=True):
                assert same(out, max_pool_reference(source, size, 1, (size // 2,) * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_and_infinities(dtype):
    source = torch.full((1, 4, 4, 3), -math.inf, dtype=dtype, device=DEVICE)
    source[0, 1, 1, 0], source[0, 2, 2, 1] = math.nan, math.inf
    out = torch.empty_like(source)
    max_pool(source, out, 3, 1, (1, 1, 1, 1))
    expected = max_pool_reference(source, 3, 1, (1, 1, 1, 1))
    assert same(out, expected) and expected.isnan().sum() == 9
    pyramid_pool(source, [out], [3])
    assert same(out, expected)


def test_every_pair_of_float8_values():
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    source = torch.empty(256, 2, 1, 256, dtype=torch.float8_e4m3fn)
    source[:, 0, 0] = bits[:, None]
    source[:, 1, 0] = bits[None, :]
    source = source.to(DEVICE)
    out = torch.empty(256, 1, 1, 256, dtype=torch.float8_e4m3fn, device=DEVICE)
    max_pool(source, out, 2, 2, (0, 0, 0, 1))
    pairs = source[:, :, 0].float()
    expected = torch.maximum(pairs[:, 0], pairs[:, 1])
    negative_nan = (source.view(torch.uint8) == 0xFF).any(1)[:, 0]
    assert same(out[:, 0, 0][~negative_nan], expected[~negative_nan])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size and stride must be at least 1"),
        ({"pads": (2, 0, 0, 0)}, r"each pad in 0\.\.size-1, not size 2"),
        ({"out": torch.zeros(1, 2, 2, 3)}, r"out must be \[1, 2, 3, 3\] torch\.float32"),
        ({"out": torch.zeros(1, 2, 3, 3).half()}, "out must be .* torch.float32"),
        ({"source": torch.zeros(1, 4, 6, 3).int()}, r"source must be torch\.float32 or"),
        ({"source": torch.zeros(1, 3, 4, 6).permute(0, 2, 3, 1)}, "source must be a channel slice"),
    ],
)
def test_mistakes_of_max_pool_are_named(change, message):
    arguments = {
        "source": torch.zeros(1, 4, 6, 3),
        "out": torch.zeros(1, 2, 3, 3),
        "size": 2,
        "stride": 2,
        "pads": (0, 0, 0, 0),
    }
    with pytest.raises(ValueError, match=message):
        max_pool(**{**arguments, **change})


@pytest.mark.parametrize(
    ("outs", "sizes", "message"),
    [
        ([torch.zeros(1, 4, 4, 3)], (5, 9), "one out for each size, not 1"),
        ([], (), "one out for each size"),
        ([torch.zeros(1, 4, 4, 3)], (4,), r"sizes must be odd and positive, not \[4\]"),
        ([torch.zeros(1, 4, 4, 2)], (5,), r"the out of size 5 must be \[1, 4, 4, 3\]"),
        ([torch.zeros(1, 4, 4, 3).half()], (5,), "the out of size 5 must be .* torch.float32"),
    ],
)
def test_mistakes_of_pyramid_pool_are_named(outs, sizes, message):
    with pytest.raises(ValueError, match=message):
        pyramid_pool(torch.zeros(1, 4, 4, 3), outs, sizes)


@pytest.mark.slow
def test_compiled_passes_are_separated_by_barriers_and_read_no_stale_cache():
    """The machine code as PTX: what a pass wrote is read only after a barrier of the block, and not
    through the read-only cache (ld.global.nc), which need not see it.
    """
    code = (
        "from benchmarks.kernel_resources import compile_variant\n"
        "from yolov4_fast.ops.kernels.pool import VARIANTS\n"
        "for variant in VARIANTS:\n"
        "    if variant.name.startswith('pyramid_pool fp16'):\n"
        "        print(compile_variant(variant, 90).asm['ptx'])\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ".nc" not in run.stdout
    order = re.findall(r"ld\.global|st\.global|bar\.sync", run.stdout)
    passes = [name for name, previous in zip(order, ["", *order], strict=False) if name != previous]
    step = ["ld.global", "st.global"]
    assert passes == [*step, "bar.sync", *step, "bar.sync", *step]


def test_images_of_pyramid_pool_must_fit_32_bits():
    wide = torch.empty(1, 2**14, 2**14, 8, device="meta")[..., :3]
    with pytest.raises(ValueError, match=r"source's buffer must have less than 2\^31 values"):
        pyramid_pool(wide, [wide], (5,))
