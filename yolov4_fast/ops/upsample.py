"""upsample: nearest-neighbour by a whole factor, into a channel slice.

    out[b, y, x, c] = source[b, y // factor, x // factor, c]

Factor 1 is a copy into another buffer. Values are moved, not computed with, so any type will do.
"""

import torch
from torch import Tensor

from yolov4_fast.ops.views import Implementation, check_same_device, row_stride, uses_kernel

# What values are moved as: the kernel need not know float8, which older GPUs do not.
CARRIERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def upsample(
    source: Tensor, out: Tensor, factor: int, *, implementation: Implementation = "kernel"
) -> Tensor:
    """Fill `out` and return it.

    source: view [B, H, W, C]; out: view [B, H * factor, W * factor, C] of the same dtype (of 1, 2
    or 4 bytes) that does not overlap it. Raises ValueError.
    """
    row_stride(source, "source")
    row_stride(out, "out")
    check_same_device((source, out))
    batch, height, width, channels = source.shape
    if factor < 1:
        raise ValueError(f"the factor must be at least 1, not {factor}")
    expected = (batch, height * factor, width * factor, channels)
    if out.shape != expected or out.dtype != source.dtype:
        raise ValueError(
            f"out must be {list(expected)} {source.dtype} for source {list(source.shape)} and "
            f"factor {factor}, not {list(out.shape)} {out.dtype}"
        )
    if source.element_size() not in CARRIERS:
        raise ValueError(f"source must have a dtype of 1, 2 or 4 bytes, not {source.dtype}")
    if not uses_kernel(source, implementation):
        return out.copy_(upsample_reference(source, factor))
    from yolov4_fast.ops.kernels import upsample as kernel

    carrier = CARRIERS[source.element_size()]
    with torch.cuda.device_of(out):
        kernel.launch(source.view(carrier), out.view(carrier), factor)
    return out


def upsample_reference(source: Tensor, factor: int) -> Tensor:
    """The definition in torch: [B, H, W, C] -> [B, H * factor, W * factor, C]."""
    batch, height, width, channels = source.shape
    cells = source[:, :, None, :, None, :].expand(batch, height, factor, width, factor, channels)
    return cells.reshape(batch, height * factor, width * factor, channels)
