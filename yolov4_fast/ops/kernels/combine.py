"""Sum, weighted or not, or product of one to four view tensors; definition in ops/combine.py.

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
def _load(source, stride, weights, row: tl.constexpr, channels, m, c, inside):
    """A source's values in float32, times its row of the weights where there are any."""
    values = tl.load(source + m[:, None] * stride + c[None, :], inside, other=0.0).to(tl.float32)
    if weights is not None:
        values *= tl.load(weights + row * channels + c, c < channels, other=0.0)[None, :]
    return values


@triton.jit
def combine_kernel(
    first,
    second,
    third,
    fourth,
    weights,
    slopes,
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
    """second, third, fourth, weights [sources, channels] and slopes [channels] may be None; cells:
    B * H * W; strides in values from cell to cell.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < cells)[:, None] & (c < channels)[None, :]
    total = _load(first, first_stride, weights, 0, channels, m, c, inside)
    if second is not None:
        values = _load(second, second_stride, weights, 1, channels, m, c, inside)
        total = total * values if PRODUCT else total + values
    if third is not None:
        values = _load(third, third_stride, weights, 2, channels, m, c, inside)
        total = total * values if PRODUCT else total + values
    if fourth is not None:
        values = _load(fourth, fourth_stride, weights, 3, channels, m, c, inside)
        total = total * values if PRODUCT else total + values
    if slopes is not None:
        slope = tl.load(slopes + c, c < channels, other=0.0)[None, :]
        total = tl.where(total > 0, total, slope * total)
    total = activate(total, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + m[:, None] * out_stride + c[None, :], total, inside)


def launch(
    sources: Sequence[torch.Tensor],
    out: torch.Tensor,
    product: bool,
    activation: int,
    weights: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> None:
    """Arguments as of `ops.combine`, checked there; activation by number, linear for prelu."""
    channels = out.shape[3]
    cells = out.shape[:3].numel()
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_m = TILE // block_c
    absent = 4 - len(sources)
    combine_kernel[(triton.cdiv(cells, block_m) * triton.cdiv(channels, block_c),)](
        *sources,
        *[None] * absent,
        weights,
        slopes,
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


def _variant(dtype: str, sources: int, product: bool, activation: int, *vectors: str) -> Variant:
    """vectors: those of "weights" and "slopes" that there are."""
    kind = "product" if product else "sum"
    pointers = ("first", "second", "third", "fourth")
    strides = tuple(f"{name}_stride" for name in (*pointers, "out"))
    absent = {*pointers[sources:], "weights", "slopes"} - set(vectors)
    return Variant(
        name=" ".join(
            ["combine", kind, "of", str(sources), dtype, "activation", str(activation), *vectors]
        ),
        kernel=combine_kernel,
        signature={
            **dict.fromkeys(pointers[:sources], f"*{dtype}"),
            **dict.fromkeys(vectors, "*fp32"),
            "out": f"*{dtype}",
            **dict.fromkeys(("cells", "channels", *strides), "i32"),
        },
        constexprs={
            **dict.fromkeys(absent),
            "PRODUCT": product,
            "ACTIVATION": activation,
            "BLOCK_M": TILE // 128,
            "BLOCK_C": 128,
        },
        aligned=(*pointers[:sources], *vectors, "out", "channels", *strides),
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    _variant("fp16", 2, False, 0),
    _variant("bf16", 2, False, 1),
    _variant("fp32", 2, False, 2),
    _variant("fp16", 2, True, 0),
    _variant("bf16", 2, True, 0),
    _variant("fp16", 4, False, 2),
    _variant("fp16", 2, False, 0, "weights"),
    _variant("bf16", 4, False, 2, "weights"),
    _variant("fp16", 1, False, 0, "slopes"),
    _variant("fp32", 4, False, 0, "weights", "slopes"),
)
