"""Nearest-neighbour upsampling into a channel slice; definition in ops/upsample.py.

Bound by what it writes. A program reads BLOCK_M cells of the source once and writes each to its
FACTOR x FACTOR cells of the output, 16 bytes at a time where addresses allow it.
"""

import torch
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import row_stride

TILE_BYTES = 4096  # of the source; a thread of 128 holds 32 of them


@triton.jit
def upsample_kernel(
    source,
    out,
    cells,
    width,
    channels,
    source_stride,
    out_stride,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """cells: B * H * W of the source; width: W; strides in values from cell to cell."""
    blocks = tl.cdiv(channels, BLOCK_C)
    m = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < cells)[:, None] & (c < channels)[None, :]
    values = tl.load(source + m.to(tl.int64)[:, None] * source_stride + c[None, :], inside)
    # b * H + y rows of the source lie above: FACTOR times as many of the output, image after image.
    row = (m // width) * FACTOR
    column = (m % width) * FACTOR
    for dy in range(FACTOR):
        for dx in range(FACTOR):
            target = ((row + dy) * (width * FACTOR) + column + dx).to(tl.int64)
            tl.store(out + target[:, None] * out_stride + c[None, :], values, inside)


def launch(source: torch.Tensor, out: torch.Tensor, factor: int) -> None:
    """source, out: as of `ops.upsample`, checked there, viewed as integers of their size."""
    _, _, width, channels = source.shape
    cells = source.shape[:3].numel()
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_m = TILE_BYTES // source.element_size() // block_c
    upsample_kernel[(triton.cdiv(cells, block_m) * triton.cdiv(channels, block_c),)](
        source,
        out,
        cells,
        width,
        channels,
        row_stride(source),
        row_stride(out),
        FACTOR=factor,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _variant(bits: int, factor: int, aligned: bool = True) -> Variant:
    return Variant(
        name=f"upsample {bits} bit by {factor}" + ("" if aligned else " unaligned"),
        kernel=upsample_kernel,
        signature={
            "source": f"*i{bits}",
            "out": f"*i{bits}",
            **dict.fromkeys(("cells", "width", "channels", "source_stride", "out_stride"), "i32"),
        },
        constexprs={"FACTOR": factor, "BLOCK_M": TILE_BYTES * 8 // bits // 128, "BLOCK_C": 128},
        aligned=("source", "out", "channels", "source_stride", "out_stride") if aligned else (),
    )


VARIANTS = (
    _variant(16, 2),
    _variant(32, 2),
    _variant(8, 2),
    _variant(16, 1),
    _variant(16, 4),
    _variant(16, 2, aligned=False),
    _variant(32, 2, aligned=False),
)
