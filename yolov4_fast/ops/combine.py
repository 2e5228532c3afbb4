"""combine: the sum, which may be weighted, or the product of one to four maps, activated.

    out = activation(w_1 * source_1 + w_2 * source_2 + ...)
    out = activation(source_1 * source_2 * ...)

What no convolution could take over: shortcuts with an activation or with weights of their own, SAM
(attention by multiplication), and PReLU, whose slopes no other kernel takes (of one source).
Computed in float32 in the sources' order, rounded once.
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
PRELU = "prelu"


def combine(
    sources: Sequence[Tensor],
    out: Tensor,
    product: bool,
    activation: str,
    *,
    weights: Tensor | None = None,
    slopes: Tensor | None = None,
    implementation: Implementation = "kernel",
) -> Tensor:
    """Fill `out` and return it.

    sources: one to four views [B, H, W, C]; out: a view like them, float32, float16 or bfloat16; it
    may be one of the sources, but not overlap them otherwise. activation: see ops/activation.py, or
    prelu. weights: [sources, C] float32, of a sum; None: all 1. slopes: [C] float32, for prelu
    alone. Raises ValueError.
    """
    if not 1 <= len(sources) <= MOST_SOURCES:
        raise ValueError(f"there must be 1 to {MOST_SOURCES} sources, not {len(sources)}")
    check_dtype(out, "out", FLOATS)
    row_stride(out, "out")
    for index, source in enumerate(sources):
        row_stride(source, f"source {index}")
        if source.shape != out.shape or source.dtype != out.dtype:
            raise ValueError(
                f"source {index} must be {list(out.shape)} {out.dtype} like out, not "
                f"{list(source.shape)} {source.dtype}"
            )
    _check_vectors(len(sources), out.shape[3], product, activation, weights, slopes)
    check_same_device([t for t in (*sources, out, weights, slopes) if t is not None])
    if not uses_kernel(out, implementation):
        return out.copy_(combine_reference(sources, product, activation, weights, slopes))
    from yolov4_fast.ops.kernels import combine as kernel

    code = activation_code("linear" if activation == PRELU else activation)
    with torch.cuda.device_of(out):
        kernel.launch(sources, out, product, code, weights, slopes)
    return out


def combine_reference(
    sources: Sequence[Tensor],
    product: bool,
    activation: str,
    weights: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """The definition in torch: maps of one shape -> float32 of that shape."""
    terms = [source.float() for source in sources]
    if weights is not None:
        terms = [weight * term for weight, term in zip(weights, terms, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total * term if product else total + term
    if slopes is not None:
        return torch.where(total > 0, total, slopes * total)
    return activate_reference(total, activation)


def _check_vectors(
    count: int,
    channels: int,
    product: bool,
    activation: str,
    weights: Tensor | None,
    slopes: Tensor | None,
) -> None:
    if activation != PRELU:
        activation_code(activation)
    if (slopes is not None) != (activation == PRELU):
        needed = "needs" if activation == PRELU else "takes no"
        raise ValueError(f"the activation {activation} {needed} slopes")
    if product and weights is not None:
        raise ValueError("weights are of a sum: a product takes none")
    for name, values, shape in (
        ("weights", weights, (count, channels)),
        ("slopes", slopes, (channels,)),
    ):
        if values is None:
            continue
        check_dtype(values, name, (torch.float32,))
        if values.shape != shape or not values.is_contiguous():
            raise ValueError(
                f"{name} must be {list(shape)} and contiguous, not {list(values.shape)} with "
                f"strides {list(values.stride())}"
            )
