"""max_pool and pyramid_pool: the largest value of a window around each cell, per channel.

    out[b, y, x, c] = max over i, j in 0..size-1 of
                      source[b, y * stride + i - top, x * stride + j - left, c]

Cells outside the source count as -inf. `pyramid_pool` is SPP: several of stride 1 and odd sizes,
each centred (padding size // 2), of one source that is read once. Nothing is rounded, and NaN wins
over everything, as in torch.

float8_e4m3fn is pooled through its bytes, so on any GPU; there a NaN wins only where its sign bit
is clear, which is how conversions write it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.ops.views import (
    FLOATS,
    Implementation,
    check_dtype,
    check_same_device,
    row_stride,
    uses_kernel,
)

DTYPES = (*FLOATS, torch.float8_e4m3fn)
Pads = tuple[int, int, int, int]  # top, bottom, left, right


def max_pool(
    source: Tensor,
    out: Tensor,
    size: int,
    stride: int,
    pads: Pads,
    *,
    implementation: Implementation = "kernel",
) -> Tensor:
    """Fill `out` and return it.

    source: view [B, H, W, C], float32, float16, bfloat16 or float8_e4m3fn; out: view [B, h, w, C]
    of the same dtype with h = (H + top + bottom - size) // stride + 1 and w likewise, not
    overlapping the source; pads: top, bottom, left, right, each less than size. Raises ValueError.
    """
    row_stride(source, "source")
    row_stride(out, "out")
    check_dtype(source, "source", DTYPES)
    check_same_device((source, out))
    if min(size, stride) < 1 or not all(0 <= pad < size for pad in pads):
        raise ValueError(
            "size and stride must be at least 1 and each pad in 0..size-1, not "
            f"size {size}, stride {stride}, pads {pads}"
        )
    batch, height, width, channels = source.shape
    expected = (
        batch,
        (height + pads[0] + pads[1] - size) // stride + 1,
        (width + pads[2] + pads[3] - size) // stride + 1,
        channels,
    )
    if out.shape != expected or out.dtype != source.dtype:
        raise ValueError(
            f"out must be {list(expected)} {source.dtype} for source {list(source.shape)}, size "
            f"{size}, stride {stride} and pads {pads}, not {list(out.shape)} {out.dtype}"
        )
    if not uses_kernel(source, implementation):
        return out.copy_(max_pool_reference(source, size, stride, pads))
    from yolov4_fast.ops.kernels import pool as kernel

    with torch.cuda.device_of(out):
        kernel.launch(source, out, size, stride, pads[0], pads[2])
    return out


def pyramid_pool(
    source: Tensor,
    outs: Sequence[Tensor],
    sizes: Sequence[int],
    *,
    implementation: Implementation = "kernel",
) -> Sequence[Tensor]:
    """Fill `outs`, one for each size in any order, and return them.

    source: view [B, H, W, C], float32, float16, bfloat16 or float8_e4m3fn; outs: views like it,
    none overlapping it or another (slices of one buffer, source among them, do not); an image of a
    buffer has less than 2^31 values. sizes: odd. Raises ValueError.
    """
    _check_image(source, "source")
    check_dtype(source, "source", DTYPES)
    check_same_device((source, *outs))
    if not sizes or len(sizes) != len(outs):
        raise ValueError(f"there must be one out for each size, not {len(outs)} for {list(sizes)}")
    if any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"sizes must be odd and positive, not {list(sizes)}")
    for size, out in zip(sizes, outs, strict=True):
        _check_image(out, f"the out of size {size}")
        if out.shape != source.shape or out.dtype != source.dtype:
            raise ValueError(
                f"the out of size {size} must be {list(source.shape)} {source.dtype} like the "
                f"source, not {list(out.shape)} {out.dtype}"
            )
    if not uses_kernel(source, implementation):
        for size, out in zip(sizes, outs, strict=True):
            out.copy_(max_pool_reference(source, size, 1, (size // 2,) * 4))
        return outs
    from yolov4_fast.ops.kernels import pool as kernel

    with torch.cuda.device_of(source):
        kernel.launch_pyramid(source, outs, sizes)
    return outs


def _check_image(x: Tensor, name: str) -> None:
    values = row_stride(x, name) * x.shape[1] * x.shape[2]
    if values >= 2**31:
        raise ValueError(f"an image of {name}'s buffer must have less than 2^31 values: {values}")


def max_pool_reference(source: Tensor, size: int, stride: int, pads: Pads) -> Tensor:
    """The definition in torch: [B, H, W, C] of any of the dtypes -> float32 [B, h, w, C]."""
    top, bottom, left, right = pads
    x = source.permute(0, 3, 1, 2).float()
    x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
    return F.max_pool2d(x, size, stride).permute(0, 2, 3, 1)
