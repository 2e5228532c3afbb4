"""Moments of each channel, and statistics from them; definitions in ops/channel_moments.py.

moments: a program takes BLOCK_C channels and every parts-th tile of BLOCK_M rows. Each position of
the tile runs Welford's update by itself, with no word between threads, and the positions are
joined once at the end. The tiles are taken from the last row to the first: the convolution wrote
the last rows last, so they may still be in the cache, and what reads x next begins with the first.

join: one program joins BLOCK_C channels of all parts, BLOCK_P parts at a time. There are no atomic
sums: on one GPU model every run gives the same bits.
"""

import torch
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import row_stride

TILE = 2048  # values of a tile: 8 a thread of 8 warps, one load of 16 bytes in half precision
UNROLL = 4  # tiles whose loads are in flight together
RESIDENT = 3  # programs that an SM holds at once (80 registers a thread)
INTERPRETED = 2  # SMs where there is no GPU
BLOCK_P, JOINED = 128, 16  # parts and channels that `join` holds at a time


@triton.jit
def _joined(mean, squares, count):
    """Moments over axis 0 of [M, C] blocks: Chan, Golub and LeVeque 1983, equation 2.1."""
    total = tl.sum(count, 0)
    least = tl.maximum(total, 1.0)
    center = tl.sum(mean * count, 0) / least
    away = mean - center[None, :]
    squares = tl.sum(squares + count * away * away, 0)
    # The sum of means may have lost digits of a mean far from zero; of their differences, none.
    return center + tl.sum(away * count, 0) / least, squares, total


@triton.jit
def moments_kernel(
    x,
    out,
    rows,
    channels,
    x_stride,
    parts,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x: rows of `channels` values, x_stride apart. out: [parts, 3, channels] float32."""
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    m = tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(0, tl.cdiv(tl.cdiv(rows, BLOCK_M) - part, parts), UNROLL):
        for index in tl.static_range(UNROLL):
            # Counted from the end, so that a tile that is not whole is the last of its program.
            first = rows - (part + (step + index) * parts + 1) * BLOCK_M
            inside = (first + m >= 0)[:, None] & there[None, :]
            source = x + first.to(tl.int64) * x_stride + (m[:, None] * x_stride + c[None, :])
            values = tl.load(source, inside, other=0.0).to(tl.float32)
            away = tl.where(inside, values - mean, 0.0)
            mean += away * (1.0 / (step + index + 1))
            squares += away * (values - mean)
    tiles = (rows + m) // BLOCK_M  # that have a row at this position
    count = tl.cdiv(tl.maximum(tiles - part, 0), parts).to(tl.float32)
    count = tl.broadcast_to(count[:, None], (BLOCK_M, BLOCK_C))
    center, total, amount = _joined(mean, squares, count)
    out += part.to(tl.int64) * 3 * channels + c
    tl.store(out, center, there)
    tl.store(out + channels, total, there)
    tl.store(out + 2 * channels, amount, there)


@triton.jit
def join_kernel(
    parts,
    out,
    running_mean,
    running_var,
    count,
    channels,
    eps,
    momentum,
    STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """parts: [count, 3, channels]. out: [3, channels], the moments or, with STATISTICS, mean, 1 /
    deviation and count; running_mean and running_var then move to them where they are not None.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    number = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < count)[:, None] & there[None, :]
        source = parts + p.to(tl.int64)[:, None] * (3 * channels) + c[None, :]
        added = tl.load(source + 2 * channels, inside, other=0.0)
        away = tl.where(inside, tl.load(source, inside, other=0.0) - mean, 0.0)
        before = number
        number += added
        share = added / tl.maximum(number, 1.0)
        mean += away * share
        squares += tl.load(source + channels, inside, other=0.0) + away * away * (before * share)
    center, total, amount = _joined(mean, squares, number)
    if STATISTICS:
        if running_mean is not None:
            old = tl.load(running_mean + c, there, other=0.0)
            tl.store(running_mean + c, old + momentum * (center - old), there)
            old = tl.load(running_var + c, there, other=0.0)
            unbiased = total / tl.maximum(amount - 1.0, 1.0)
            tl.store(running_var + c, old + momentum * (unbiased - old), there)
        total = 1.0 / tl.sqrt_rn(total / tl.maximum(amount, 1.0) + eps)
    tl.store(out + c, center, there)
    tl.store(out + channels + c, total, there)
    tl.store(out + 2 * channels + c, amount, there)


def programs(x: torch.Tensor, each: int) -> int:
    """For the whole GPU, with `each` on every SM."""
    if not x.is_cuda:
        return each * INTERPRETED
    return each * torch.cuda.get_device_properties(x.device).multi_processor_count


def tiling(x: torch.Tensor, tile: int, most: int) -> tuple[int, int, int, int]:
    """Rows and channels of a tile of view x, programs that share the tiles of one block of
    channels, evenly, and programs in all: about `most`.
    """
    channels = x.shape[3]
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_m, blocks = tile // block_c, triton.cdiv(channels, block_c)
    tiles = triton.cdiv(x.shape[:3].numel(), block_m)
    parts = triton.cdiv(tiles, triton.cdiv(tiles, max(1, most // blocks)))
    return block_m, block_c, parts, parts * blocks


def launch_moments(x: torch.Tensor) -> torch.Tensor:
    """x: as of `partial_moments`, checked there."""
    channels = x.shape[3]
    block_m, block_c, parts, grid = tiling(x, TILE, programs(x, RESIDENT))
    out = torch.empty((parts, 3, channels), dtype=torch.float32, device=x.device)
    moments_kernel[(grid,)](
        *(x, out, x.shape[:3].numel(), channels, row_stride(x), parts),
        UNROLL=UNROLL,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out


def launch_join(
    parts: torch.Tensor,
    eps: float | None = None,
    running: tuple[torch.Tensor, torch.Tensor] | None = None,
    momentum: float = 0.0,
) -> torch.Tensor:
    """Arguments as of `join_moments` and, with eps, of `batch_statistics`; checked there."""
    count, _, channels = parts.shape
    out = torch.empty((3, channels), dtype=torch.float32, device=parts.device)
    join_kernel[(triton.cdiv(channels, JOINED),)](
        *(parts, out, *(running or (None, None)), count, channels, eps or 0.0, momentum),
        STATISTICS=eps is not None,
        BLOCK_P=BLOCK_P,
        BLOCK_C=JOINED,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _moments_variant(dtype: str, block_c: int, aligned: bool = True) -> Variant:
    return Variant(
        name=f"moments {dtype} {block_c} channels{'' if aligned else ' unaligned'}",
        kernel=moments_kernel,
        signature={
            **{"x": f"*{dtype}", "out": "*fp32"},
            **dict.fromkeys(("rows", "channels", "x_stride", "parts"), "i32"),
        },
        constexprs={"UNROLL": UNROLL, "BLOCK_M": TILE // block_c, "BLOCK_C": block_c},
        aligned=("x", "out", "channels", "x_stride") if aligned else (),
        num_warps=8,
        minimum_sm=80 if dtype == "bf16" else 75,
    )


def _join_variant(statistics: bool, running: bool) -> Variant:
    moving = ("running_mean", "running_var")
    return Variant(
        name=f"join {'statistics' if statistics else 'moments'}{' running' if running else ''}",
        kernel=join_kernel,
        signature={
            **dict.fromkeys(("parts", "out", *(moving if running else ())), "*fp32"),
            **dict.fromkeys(("count", "channels"), "i32"),
            **dict.fromkeys(("eps", "momentum"), "fp32"),
        },
        constexprs={
            **({} if running else dict.fromkeys(moving)),
            **{"STATISTICS": statistics, "BLOCK_P": BLOCK_P, "BLOCK_C": JOINED},
        },
        aligned=("parts", "out", *(moving if running else ()), "channels"),
    )


VARIANTS = (
    _moments_variant("bf16", 128),
    _moments_variant("bf16", 32),
    _moments_variant("fp16", 128),
    _moments_variant("fp32", 64),
    _moments_variant("fp16", 16, aligned=False),
    _moments_variant("fp32", 128, aligned=False),
    _join_variant(statistics=False, running=False),
    _join_variant(statistics=True, running=False),
    _join_variant(statistics=True, running=True),
)
