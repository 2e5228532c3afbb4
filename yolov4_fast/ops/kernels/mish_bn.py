"""out = activation(x * scale + bias) + residual over view tensors; definition in ops/mish_bn.py.

Bound by memory: every value is read and written once, 16 bytes at a time where addresses allow it.
A program takes BLOCK_M rows of BLOCK_C channels. Large maps take tiles of 2,048 values, which keep
several loads in flight per thread; small ones 1,024, so that batch 1 still fills the GPU.
"""

import torch
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.activation import activate
from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import row_stride

LARGE = 2**21  # values from which the larger tile is taken: 1,024 of them, eight per SM of an H200


@triton.jit
def mish_bn_kernel(
    x,
    scale,
    bias,
    residual,
    out,
    rows,
    channels,
    x_split,
    x_stride,
    residual_stride,
    out_stride,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """rows of `channels` values; x_split: from one partial sum to the next; strides in values."""
    blocks = tl.cdiv(channels, BLOCK_C)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < rows)[:, None] & (c < channels)[None, :]
    source = x + m[:, None] * x_stride + c[None, :]
    values = tl.load(source, inside, other=0.0).to(tl.float32)
    for _ in range(1, SPLITS):
        source += x_split
        values += tl.load(source, inside, other=0.0)
    if scale is not None:
        values *= tl.load(scale + c, c < channels, other=0.0)[None, :]
    if bias is not None:
        values += tl.load(bias + c, c < channels, other=0.0)[None, :]
    values = activate(values, ACTIVATION)
    if residual is not None:
        added = tl.load(residual + m[:, None] * residual_stride + c[None, :], inside, other=0.0)
        values += added.to(tl.float32)
    tl.store(out + m[:, None] * out_stride + c[None, :], values.to(out.dtype.element_ty), inside)


def launch(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Arguments as of `ops.mish_bn`, checked there; activation by number."""
    channels = out.shape[3]
    rows = out.shape[:3].numel()
    splits, split_stride, x_stride = 1, 0, 0
    if x.ndim == 3:
        splits, split_stride, x_stride = x.shape[0], x.stride(0), x.stride(1)
    else:
        x_stride = row_stride(x)
    block_c = min(128, max(16, triton.next_power_of_2(channels)))
    block_m = (2048 if rows * channels >= LARGE and splits == 1 else 1024) // block_c
    mish_bn_kernel[(triton.cdiv(rows, block_m) * triton.cdiv(channels, block_c),)](
        x,
        scale,
        bias,
        residual,
        out,
        rows,
        channels,
        split_stride,
        x_stride,
        0 if residual is None else row_stride(residual),
        row_stride(out),
        SPLITS=splits,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )


ALIGNED = (
    *("x", "scale", "bias", "residual", "out"),
    *("channels", "x_split", "x_stride", "residual_stride", "out_stride"),
)


def _variant(
    dtype: str,
    x_dtype: str,
    activation: int,
    values: int,
    splits: int = 1,
    scale: bool = False,
    residual: bool = True,
    aligned: bool = True,
) -> Variant:
    name = f"mish_bn {x_dtype} to {dtype} activation {activation} tile {values} splits {splits}"
    absent = [name for name, there in (("scale", scale), ("residual", residual)) if not there]
    return Variant(
        name=name if aligned else f"{name} unaligned",
        kernel=mish_bn_kernel,
        signature={
            "x": f"*{x_dtype}",
            "bias": "*fp32",
            "out": f"*{dtype}",
            **({"scale": "*fp32"} if scale else {}),
            **({"residual": f"*{dtype}"} if residual else {}),
            **dict.fromkeys(("rows", "channels", "x_split"), "i32"),
            **dict.fromkeys(("x_stride", "residual_stride", "out_stride"), "i32"),
        },
        constexprs={
            **dict.fromkeys(absent),
            "SPLITS": splits,
            "ACTIVATION": activation,
            "BLOCK_M": values // 128,
            "BLOCK_C": 128,
        },
        aligned=ALIGNED if aligned else (),
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    _variant("fp16", "fp16", 2, 2048),
    _variant("bf16", "bf16", 2, 2048),
    _variant("fp32", "fp32", 2, 2048, scale=True),
    _variant("fp16", "fp32", 1, 1024, splits=4),
    _variant("bf16", "fp32", 2, 1024, splits=4),
    _variant("fp16", "fp16", 3, 1024, residual=False),
    _variant("fp32", "fp32", 4, 2048, residual=False, aligned=False),
    _variant("fp16", "fp16", 5, 2048, residual=False, aligned=False),
    _variant("bf16", "bf16", 6, 2048),
    _variant("fp16", "fp16", 7, 2048),
    _variant("fp16", "fp16", 8, 2048),
)
