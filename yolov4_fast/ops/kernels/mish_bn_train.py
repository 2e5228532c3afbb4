"""Batch normalisation by given statistics with its activation, and the gradients of both;
definitions in ops/mish_bn_train.py.

Bound by memory: `normalise` reads x and writes y, `sums` reads x and dy, `input_gradient` reads
both and writes dx; z and the slope at it are made anew from x each time. At the rate of an H200's
memory there is time for some 28 instructions a value of `sums` (4 bytes at 4.3 TB/s, 132 SMs of
128 lanes at 1.8 GHz); Mish takes 23 (activation_slope.py).

Every program takes BLOCK_C channels, whose numbers it keeps in registers, and every parts-th tile
of BLOCK_M rows. `sums` goes from the last row to the first, as the moments do and for the same
reason; the others from the first to the last.
"""

import torch
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.activation_slope import activate_fast, slope
from yolov4_fast.ops.kernels.channel_moments import BLOCK_P, JOINED, RESIDENT, programs, tiling
from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import row_stride

TILE = 4096  # values of a tile where one is written: 16 a thread of 8 warps
SUMS_TILE = 2048  # of `sums`, which keeps two more for each of a tile's values
WAVES = 4  # of programs that write, so that those which end early do not leave SMs idle for long


@triton.jit
def normalise_kernel(
    x,
    statistics,
    weight,
    bias,
    out,
    rows,
    channels,
    x_stride,
    parts,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out: contiguous [rows, channels], activation(normalised x); statistics: [3, channels]."""
    blocks = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    mean = tl.load(statistics + c, there, other=0.0)
    scale = tl.load(statistics + channels + c, there, other=0.0)
    scale *= tl.load(weight + c, there, other=0.0)
    shift = tl.load(bias + c, there, other=0.0)
    m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0) // blocks, tl.cdiv(rows, BLOCK_M), parts):
        first = tile * BLOCK_M
        inside = (first + m < rows)[:, None] & there[None, :]
        source = x + first.to(tl.int64) * x_stride + (m[:, None] * x_stride + c[None, :])
        away = tl.load(source, inside, other=0.0).to(tl.float32) - mean[None, :]
        y = activate_fast(away * scale[None, :] + shift[None, :], ACTIVATION)
        target = out + first.to(tl.int64) * channels + (m[:, None] * channels + c[None, :])
        tl.store(target, y.to(out.dtype.element_ty), inside)


@triton.jit
def sums_kernel(
    x,
    dy,
    statistics,
    weight,
    bias,
    out,
    rows,
    channels,
    x_stride,
    dy_stride,
    parts,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out: [parts, 2, channels], the sums of dz and of dz times the normalised x."""
    blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    mean = tl.load(statistics + c, there, other=0.0)
    inverse = tl.load(statistics + channels + c, there, other=0.0)
    scale = inverse * tl.load(weight + c, there, other=0.0)
    shift = tl.load(bias + c, there, other=0.0)
    m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), parts):
        first = rows - (tile + 1) * BLOCK_M
        inside = (first + m >= 0)[:, None] & there[None, :]
        source = x + first.to(tl.int64) * x_stride + (m[:, None] * x_stride + c[None, :])
        above = dy + first.to(tl.int64) * dy_stride + (m[:, None] * dy_stride + c[None, :])
        away = tl.load(source, inside, other=0.0).to(tl.float32) - mean[None, :]
        dz = tl.load(above, inside, other=0.0).to(tl.float32)
        dz *= slope(away * scale[None, :] + shift[None, :], ACTIVATION)
        total += dz
        product += dz * away
    out += part.to(tl.int64) * 2 * channels + c
    tl.store(out, tl.sum(total, 0), there)
    tl.store(out + channels, tl.sum(product, 0) * inverse, there)


@triton.jit
def add_kernel(parts, out, count, columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out: [columns], the sums of parts [count, columns]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < count)[:, None] & (c < columns)[None, :]
        source = parts + p.to(tl.int64)[:, None] * columns + c[None, :]
        total += tl.load(source, inside, other=0.0)
    tl.store(out + c, tl.sum(total, 0), c < columns)


@triton.jit
def input_gradient_kernel(
    x,
    dy,
    statistics,
    weight,
    bias,
    sums,
    dx,
    rows,
    channels,
    x_stride,
    dy_stride,
    parts,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx: contiguous [rows, channels]; sums: [2, channels]."""
    blocks = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < channels
    mean = tl.load(statistics + c, there, other=0.0)
    inverse = tl.load(statistics + channels + c, there, other=0.0)
    each = 1.0 / tl.load(statistics + 2 * channels + c, there, other=1.0)
    scale = inverse * tl.load(weight + c, there, other=0.0)
    shift = tl.load(bias + c, there, other=0.0)
    constant = scale * (each * tl.load(sums + c, there, other=0.0))
    factor = scale * inverse * (each * tl.load(sums + channels + c, there, other=0.0))
    m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0) // blocks, tl.cdiv(rows, BLOCK_M), parts):
        first = tile * BLOCK_M
        inside = (first + m < rows)[:, None] & there[None, :]
        source = x + first.to(tl.int64) * x_stride + (m[:, None] * x_stride + c[None, :])
        above = dy + first.to(tl.int64) * dy_stride + (m[:, None] * dy_stride + c[None, :])
        away = tl.load(source, inside, other=0.0).to(tl.float32) - mean[None, :]
        dz = tl.load(above, inside, other=0.0).to(tl.float32)
        dz *= slope(away * scale[None, :] + shift[None, :], ACTIVATION)
        value = dz * scale[None, :] - (away * factor[None, :] + constant[None, :])
        target = dx + first.to(tl.int64) * channels + (m[:, None] * channels + c[None, :])
        tl.store(target, value.to(dx.dtype.element_ty), inside)


def launch_normalise(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: int,
) -> torch.Tensor:
    """Arguments as of `ops.normalise`, checked there; activation by number."""
    rows, channels = x.shape[:3].numel(), x.shape[3]
    block_m, block_c, parts, grid = tiling(x, TILE, programs(x, WAVES * RESIDENT))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalise_kernel[(grid,)](
        *(x, statistics, weight, bias, out, rows, channels, row_stride(x), parts),
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out


def launch_sums(
    x: torch.Tensor,
    dy: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: int,
) -> torch.Tensor:
    """Arguments as of `ops.gradient_sums`, checked there; activation by number."""
    rows, channels = x.shape[:3].numel(), x.shape[3]
    block_m, block_c, parts, grid = tiling(x, SUMS_TILE, programs(x, RESIDENT))
    part_sums = torch.empty((parts, 2, channels), dtype=torch.float32, device=x.device)
    sums_kernel[(grid,)](
        *(x, dy, statistics, weight, bias, part_sums),
        *(rows, channels, row_stride(x), row_stride(dy), parts),
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=8,
        enable_fp_fusion=True,
    )
    out = torch.empty((2, channels), dtype=torch.float32, device=x.device)
    add_kernel[(triton.cdiv(2 * channels, JOINED),)](
        *(part_sums, out, parts, 2 * channels), BLOCK_P=BLOCK_P, BLOCK_C=JOINED, num_warps=4
    )
    return out


def launch_input_gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: int,
    sums: torch.Tensor,
) -> torch.Tensor:
    """Arguments as of `ops.input_gradient`, checked there; activation by number."""
    rows, channels = x.shape[:3].numel(), x.shape[3]
    block_m, block_c, parts, grid = tiling(x, TILE, programs(x, WAVES * RESIDENT))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    input_gradient_kernel[(grid,)](
        *(x, dy, statistics, weight, bias, sums, dx),
        *(rows, channels, row_stride(x), row_stride(dy), parts),
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return dx


POINTERS = {"normalise": ("x", "out"), "sums": ("x", "dy"), "input_gradient": ("x", "dy", "dx")}
KERNELS = {
    "normalise": normalise_kernel,
    "sums": sums_kernel,
    "input_gradient": input_gradient_kernel,
}


def _variant(
    name: str, dtype: str, activation: int, block_c: int = 128, aligned: bool = True
) -> Variant:
    kernel, of_dtype = KERNELS[name], POINTERS[name]
    strides = tuple(f"{pointer}_stride" for pointer in ("x", "dy") if pointer in of_dtype)
    floats = ("statistics", "weight", "bias", *(("sums",) if name == "input_gradient" else ()))
    floats = (*floats, "out") if name == "sums" else floats
    tile = SUMS_TILE if name == "sums" else TILE
    return Variant(
        name=f"{name} {dtype} activation {activation} {block_c} channels"
        f"{'' if aligned else ' unaligned'}",
        kernel=kernel,
        signature={
            **dict.fromkeys(of_dtype, f"*{dtype}"),
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(("rows", "channels", "parts", *strides), "i32"),
        },
        constexprs={
            "ACTIVATION": activation,
            "BLOCK_M": tile // block_c,
            "BLOCK_C": block_c,
        },
        aligned=(*of_dtype, *floats, "channels", *strides) if aligned else (),
        num_warps=8,
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    *(
        _variant(name, *settings)
        for name in KERNELS
        for settings in (
            ("bf16", 2),
            ("bf16", 1, 32),
            ("fp16", 2),
            ("fp32", 2, 64),
            ("fp32", 3, 128, False),
            ("fp16", 4, 16, False),
            ("bf16", 7, 64),
            ("fp32", 8),
        )
    ),
    Variant(
        name="add",
        kernel=add_kernel,
        signature={"parts": "*fp32", "out": "*fp32", "count": "i32", "columns": "i32"},
        constexprs={"BLOCK_P": BLOCK_P, "BLOCK_C": JOINED},
        aligned=("parts", "out", "columns"),
    ),
)
