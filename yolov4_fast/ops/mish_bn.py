"""mish_bn: what follows a convolution when it is not in the convolution's own kernel.

    out = activation(x * scale + bias) + residual

scale and bias are per channel: batch normalisation in inference, or with scale None the bias of a
convolution that it was folded into. Everything is computed in float32 and rounded once. x may also
be the partial sums of a convolution split along K, [splits, B * H * W, C]; they are added in order,
so that the result is the same in every run.
"""

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


def mish_bn(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
    *,
    implementation: Implementation = "kernel",
) -> Tensor:
    """Scale, bias, activation and residual in one pass; fills `out` and returns it.

    x: view [B, H, W, C] of out's dtype or float32, or float32 partial sums [splits, B * H * W, C]
    with contiguous rows. scale, bias: [C] float32. residual: view like out, or None. out: view
    [B, H, W, C], float32, float16 or bfloat16; it may be x or the residual itself, but not overlap
    them otherwise. activation: see ops/activation.py. Raises ValueError.
    """
    _check(x, scale, bias, activation, residual, out)
    if not uses_kernel(out, implementation):
        return out.copy_(mish_bn_reference(x, scale, bias, activation, residual, out.shape))
    from yolov4_fast.ops.kernels import mish_bn as kernel

    with torch.cuda.device_of(out):
        kernel.launch(x, scale, bias, activation_code(activation), residual, out)
    return out


def mish_bn_reference(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    shape: torch.Size,
) -> Tensor:
    """The definition in torch: arguments as of `mish_bn`, shape [B, H, W, C]; float32."""
    x = x.float() if x.ndim == 4 else sum(x[1:], start=x[0]).reshape(shape)
    x = x if scale is None else x * scale
    x = x if bias is None else x + bias
    x = activate_reference(x, activation)
    return x if residual is None else x + residual.float()


def _check(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    activation_code(activation)
    row_stride(out, "out")
    check_dtype(out, "out", FLOATS)
    channels = out.shape[3]
    if x.ndim == 3:
        check_dtype(x, "partial sums", (torch.float32,))
        rows = out.shape[:3].numel()
        if x.shape[0] < 1 or x.shape[1:] != (rows, channels) or x.stride(2) != 1 < channels:
            raise ValueError(
                f"partial sums for {list(out.shape)} must be [splits, {rows}, {channels}] with "
                f"contiguous rows, not of shape {list(x.shape)} and strides {list(x.stride())}"
            )
    else:
        row_stride(x, "x")
        check_dtype(x, "x", tuple({out.dtype: None, torch.float32: None}))
        if x.shape != out.shape:
            raise ValueError(f"x {list(x.shape)} and out {list(out.shape)} must have one shape")
    for name, values in (("scale", scale), ("bias", bias)):
        if values is None:
            continue
        check_dtype(values, name, (torch.float32,))
        if values.shape != (channels,) or not values.is_contiguous():
            raise ValueError(
                f"{name} must be [{channels}] and contiguous, not {list(values.shape)} with "
                f"strides {list(values.stride())}"
            )
    if residual is not None:
        row_stride(residual, "the residual")
        check_dtype(residual, "the residual", (out.dtype,))
        if residual.shape != out.shape:
            raise ValueError(
                f"the residual {list(residual.shape)} and out {list(out.shape)} must have one shape"
            )
    check_same_device([t for t in (x, scale, bias, residual, out) if t is not None])
