"""combine: the sum or the product of two to four maps, activated.

    out = activation(source_1 + source_2 + ...)    or    activation(source_1 * source_2 * ...)

What no convolution could take over: shortcuts with an activation of their own, and SAM (attention
by multiplication). Computed in float32 in the sources' order, rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from yolov4_fast.ops.activation import activate_reference, activation_code
from yolov4_fast.ops.views import (
    FLOATS,
    Implementation,
    check_dtype,
    check_same_device,
    row_stride,
    uses_kernel,
)

MOST_SOURCES = 4


def combine(
    sources: Sequence[Tensor],
    out: Tensor,
    product: bool,
    activation: str,
    *,
    implementation: Implementation = "kernel",
) -> Tensor:
    """Fill `out` and return it.

    sources: two to four views [B, H, W, C]; out: a view like them, float32, float16 or bfloat16; it
    may be one of the sources, but not overlap them otherwise. Raises ValueError.
    """
    activation_code(activation)
    if not 2 <= len(sources) <= MOST_SOURCES:
        raise ValueError(f"there must be 2 to {MOST_SOURCES} sources, not {len(sources)}")
    check_dtype(out, "out", FLOATS)
    row_stride(out, "out")
    for index, source in enumerate(sources):
        row_stride(source, f"source {index}")
        if source.shape != out.shape or source.dtype != out.dtype:
            raise ValueError(
                f"source {index} must be {list(out.shape)} {out.dtype} like out, not "
                f"{list(source.shape)} {source.dtype}"
            )
    check_same_device((*sources, out))
    if not uses_kernel(out, implementation):
        return out.copy_(combine_reference(sources, product, activation))
    from yolov4_fast.ops.kernels import combine as kernel

    with torch.cuda.device_of(out):
        kernel.launch(sources, out, product, activation_code(activation))
    return out


def combine_reference(sources: Sequence[Tensor], product: bool, activation: str) -> Tensor:
    """The definition in torch: maps of one shape -> float32 of that shape."""
    total = sources[0].float()
    for source in sources[1:]:
        total = total * source.float() if product else total + source.float()
    return activate_reference(total, activation)
