"""Max-pooling of view tensors; definitions in ops/pool.py.

max_pool: a program takes BLOCK_M cells of the output and BLOCK_C channels and reads each window.

pyramid_pool: a program takes one image and BLOCK_C channels, and makes the sizes in ascending
order, each of the one before. A window of radius R is covered by T windows per axis of the smaller
radius r, T = ceil((2R + 1) / (2r + 1)), spread evenly over -(R - r)..(R - r): for SPP's 5, 9 and 13
that is 25 + 4 + 4 reads instead of 25 + 81 + 169, all but the first pass of the source from the
cache of the SM that just wrote them. Centres are clamped to the map, which needs no padding: a
clamped window lies within the true one, and what it leaves out lies outside the map.

float8 values are compared through their bytes (FP8), as integers in the order of the numbers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import row_stride

TILE = 1024  # values that a program of max_pool holds
PYRAMID_CELLS = 64  # cells of a pass of pyramid_pool: 16 bytes a thread
PYRAMID_BYTES = 32  # of channels of a program of pyramid_pool: a sector of memory
PYRAMID_SIZES = 3  # of one launch


@triton.jit
def _ordered(x, FP8: tl.constexpr):
    """float8 bytes (int8) as integers in the numbers' order, and back; others unchanged."""
    if FP8:
        x = x ^ ((x >> 7) & 0x7F)
    return x


@triton.jit
def _larger(a, b, FP8: tl.constexpr):
    if FP8:
        larger = tl.maximum(a, b)
    else:
        larger = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return larger.to(a.dtype)  # Triton before 3.7 returns bfloat16 as float32


@triton.jit
def max_pool_kernel(
    source,
    out,
    cells,
    height,
    width,
    out_height,
    out_width,
    channels,
    source_stride,
    out_stride,
    top,
    left,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """cells: of the output, B * out_height * out_width; strides in values from cell to cell."""
    blocks = tl.cdiv(channels, BLOCK_C)
    m = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = (c < channels)[None, :]
    x = (m % out_width) * STRIDE - left
    y = ((m // out_width) % out_height) * STRIDE - top
    image = m // (out_width * out_height) * (height * width)
    best = tl.full((BLOCK_M, BLOCK_C), -128 if FP8 else float("-inf"), source.dtype.element_ty)
    outside = -1 if FP8 else float("-inf")  # the byte that comes lowest in order
    for tap in range(SIZE * SIZE):
        row = y + tap // SIZE
        column = x + tap % SIZE
        there = (m < cells) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        cell = (image + row * width + column).to(tl.int64)[:, None] * source_stride
        values = tl.load(source + cell + c[None, :], there[:, None] & within, outside)
        best = _larger(best, _ordered(values, FP8), FP8)
    target = out + m.to(tl.int64)[:, None] * out_stride + c[None, :]
    tl.store(target, _ordered(best, FP8), (m < cells)[:, None] & within)


@triton.jit
def _widen(
    source,
    out,
    source_stride,
    out_stride,
    height,
    width,
    channels,
    c,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    PASSES: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From windows of radius FROM at source to windows of radius TO at out, one image."""
    REACH: tl.constexpr = TO - FROM
    TAPS: tl.constexpr = (2 * TO + 2 * FROM + 1) // (2 * FROM + 1)
    GAPS: tl.constexpr = TAPS - 1 if TAPS > 1 else 1
    for index in range(PASSES):
        # Beyond the last cell the last again: fewer masks, and the same values are written twice.
        m = tl.minimum(index * BLOCK_M + tl.arange(0, BLOCK_M), height * width - 1)
        inside = (c < channels)[None, :]
        y = m // width
        x = m % width
        best = tl.full((BLOCK_M, BLOCK_C), -128 if FP8 else float("-inf"), out.dtype.element_ty)
        for i in range(TAPS):
            row = tl.minimum(tl.maximum(y - REACH + 2 * REACH * i // GAPS, 0), height - 1)
            for j in tl.static_range(TAPS):
                column = tl.minimum(tl.maximum(x - REACH + 2 * REACH * j // GAPS, 0), width - 1)
                cell = (row * width + column)[:, None] * source_stride
                values = tl.load(source + cell + c[None, :], inside)
                best = _larger(best, _ordered(values, FP8), FP8)
        tl.store(out + m[:, None] * out_stride + c[None, :], _ordered(best, FP8), inside)


@triton.jit
def pyramid_pool_kernel(
    source,
    first,
    second,
    third,
    source_stride,
    first_stride,
    second_stride,
    third_stride,
    height,
    width,
    channels,
    R0: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    R3: tl.constexpr,
    PASSES: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Radii in ascending order; R0: of the windows that the source already holds the maxima of.
    second and third may be None; strides in values from cell to cell.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(tl.int64) * (height * width)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    source += image * source_stride
    first += image * first_stride
    _widen(
        *(source, first, source_stride, first_stride, height, width, channels, c),
        *(R0, R1, PASSES, FP8, BLOCK_M, BLOCK_C),
    )
    if second is not None:
        # Values that other threads of this program wrote are read next.
        tl.debug_barrier()
        second += image * second_stride
        _widen(
            *(first, second, first_stride, second_stride, height, width, channels, c),
            *(R1, R2, PASSES, FP8, BLOCK_M, BLOCK_C),
        )
    if third is not None:
        tl.debug_barrier()
        third += image * third_stride
        _widen(
            *(second, third, second_stride, third_stride, height, width, channels, c),
            *(R2, R3, PASSES, FP8, BLOCK_M, BLOCK_C),
        )


def launch(
    source: torch.Tensor, out: torch.Tensor, size: int, stride: int, top: int, left: int
) -> None:
    """Arguments as of `ops.max_pool`, checked there."""
    fp8 = source.dtype == torch.float8_e4m3fn
    _, out_height, out_width, channels = out.shape
    cells = out.shape[:3].numel()
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_m = TILE // block_c
    max_pool_kernel[(triton.cdiv(cells, block_m) * triton.cdiv(channels, block_c),)](
        source.view(torch.int8) if fp8 else source,
        out.view(torch.int8) if fp8 else out,
        cells,
        source.shape[1],
        source.shape[2],
        out_height,
        out_width,
        channels,
        row_stride(source),
        row_stride(out),
        top,
        left,
        SIZE=size,
        STRIDE=stride,
        FP8=fp8,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


def launch_pyramid(
    source: torch.Tensor, outs: Sequence[torch.Tensor], sizes: Sequence[int]
) -> None:
    """Arguments as of `ops.pyramid_pool`, checked there."""
    fp8 = source.dtype == torch.float8_e4m3fn
    batch, height, width, channels = source.shape
    block_c = PYRAMID_BYTES // source.element_size()
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    radius = 0
    for start in range(0, len(order), PYRAMID_SIZES):
        part = order[start : start + PYRAMID_SIZES]
        absent = PYRAMID_SIZES - len(part)
        views = [source, *(outs[index] for index in part)]
        radii = [radius, *(sizes[index] // 2 for index in part)]
        pyramid_pool_kernel[(batch * triton.cdiv(channels, block_c),)](
            *(view.view(torch.int8) if fp8 else view for view in views),
            *[None] * absent,
            *(row_stride(view) for view in views),
            *[0] * absent,
            height,
            width,
            channels,
            *radii,
            *[0] * absent,
            PASSES=triton.cdiv(height * width, PYRAMID_CELLS),
            FP8=fp8,
            BLOCK_M=PYRAMID_CELLS,
            BLOCK_C=block_c,
            num_warps=4,
            enable_fp_fusion=True,
        )
        source, radius = views[-1], radii[-1]


def _pool_variant(dtype: str, size: int, stride: int) -> Variant:
    pointer = "*i8" if dtype == "fp8" else f"*{dtype}"
    integers = ("cells", "height", "width", "out_height", "out_width", "channels")
    strides = ("source_stride", "out_stride")
    return Variant(
        name=f"max_pool {dtype} size {size} stride {stride}",
        kernel=max_pool_kernel,
        signature={
            **dict.fromkeys(("source", "out"), pointer),
            **dict.fromkeys((*integers, *strides, "top", "left"), "i32"),
        },
        constexprs={
            "SIZE": size,
            "STRIDE": stride,
            "FP8": dtype == "fp8",
            "BLOCK_M": TILE // 128,
            "BLOCK_C": 128,
        },
        aligned=("source", "out", "channels", *strides),
        minimum_sm=80 if dtype == "bf16" else 75,
    )


def _pyramid_variant(dtype: str, item: int, passes: int) -> Variant:
    pointers = ("source", "first", "second", "third")
    strides = tuple(f"{name}_stride" for name in pointers)
    return Variant(
        name=f"pyramid_pool {dtype} 5 9 13 passes {passes}",
        kernel=pyramid_pool_kernel,
        signature={
            **dict.fromkeys(pointers, "*i8" if dtype == "fp8" else f"*{dtype}"),
            **dict.fromkeys((*strides, "height", "width", "channels"), "i32"),
        },
        constexprs={
            **{"R0": 0, "R1": 2, "R2": 4, "R3": 6},
            "PASSES": passes,
            "FP8": dtype == "fp8",
            "BLOCK_M": PYRAMID_CELLS,
            "BLOCK_C": PYRAMID_BYTES // item,
        },
        aligned=(*pointers, "channels", *strides),
        num_warps=4,
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    _pool_variant("fp16", 2, 2),
    _pool_variant("bf16", 3, 1),
    _pool_variant("fp32", 2, 1),
    _pool_variant("fp8", 2, 2),
    _pyramid_variant("fp16", 2, 3),
    _pyramid_variant("bf16", 2, 6),
    _pyramid_variant("fp32", 4, 3),
    _pyramid_variant("fp8", 1, 3),
)
