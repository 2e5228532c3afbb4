"""Sum or product of two to four view tensors, activated; definition in ops/combine.py.

Bound by memory: every value is read and written once. A program takes BLOCK_M cells of BLOCK_C
channels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.activation import activate
from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import row_stride

TILE = 1024  # values of a program


@triton.jit
def _merge(total, source, stride, m, c, inside, PRODUCT: tl.constexpr):
    values = tl.load(source + m[:, None] * stride + c[None, :], inside, other=0.0).to(tl.float32)
    if PRODUCT:
        total *= values
    else:
        total += values
    return total


@triton.jit
def combine_kernel(
    first,
    second,
    third,
    fourth,
    out,
    cells,
    channels,
    first_stride,
    second_stride,
    third_stride,
    fourth_stride,
    out_stride,
    PRODUCT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """third and fourth may be None; cells: B * H * W; strides in values from cell to cell."""
    blocks = tl.cdiv(channels, BLOCK_C)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < cells)[:, None] & (c < channels)[None, :]
    total = tl.load(first + m[:, None] * first_stride + c[None, :], inside, other=0.0)
    total = _merge(total.to(tl.float32), second, second_stride, m, c, inside, PRODUCT)
    if third is not None:
        total = _merge(total, third, third_stride, m, c, inside, PRODUCT)
    if fourth is not None:
        total = _merge(total, fourth, fourth_stride, m, c, inside, PRODUCT)
    total = activate(total, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + m[:, None] * out_stride + c[None, :], total, inside)


def launch(
    sources: Sequence[torch.Tensor], out: torch.Tensor, product: bool, activation: int
) -> None:
    """Arguments as of `ops.combine`, checked there; activation by number."""
    channels = out.shape[3]
    cells = out.shape[:3].numel()
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_m = TILE // block_c
    absent = 4 - len(sources)
    combine_kernel[(triton.cdiv(cells, block_m) * triton.cdiv(channels, block_c),)](
        *sources,
        *[None] * absent,
        out,
        cells,
        channels,
        *(row_stride(source) for source in sources),
        *[0] * absent,
        row_stride(out),
        PRODUCT=product,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _variant(dtype: str, sources: int, product: bool, activation: int) -> Variant:
    kind = "product" if product else "sum"
    pointers = ("first", "second", "third", "fourth")
    strides = tuple(f"{name}_stride" for name in (*pointers, "out"))
    return Variant(
        name=f"combine {kind} of {sources} {dtype} activation {activation}",
        kernel=combine_kernel,
        signature={
            **dict.fromkeys((*pointers[:sources], "out"), f"*{dtype}"),
            **dict.fromkeys(("cells", "channels", *strides), "i32"),
        },
        constexprs={
            **dict.fromkeys(pointers[sources:]),
            "PRODUCT": product,
            "ACTIVATION": activation,
            "BLOCK_M": TILE // 128,
            "BLOCK_C": 128,
        },
        aligned=(*pointers[:sources], "out", "channels", *strides),
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    _variant("fp16", 2, False, 0),
    _variant("bf16", 2, False, 1),
    _variant("fp32", 2, False, 2),
    _variant("fp16", 2, True, 0),
    _variant("bf16", 2, True, 0),
    _variant("fp16", 4, False, 2),
)
