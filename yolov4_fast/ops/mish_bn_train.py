"""Batch normalisation by the batch's own statistics with the activation behind it, for training.

    z = (x - mean) / deviation * weight + bias        y = activation(z)

Only x, which the convolution made, and a few numbers a channel are kept for the backward pass; z is
made anew there. torch keeps x for the normalisation and z for the activation. With

    dz = dy activation'(z)      x' = (x - mean) / deviation
    dbias = sum dz              dweight = sum dz x'
    dx = weight / deviation (dz - dbias / n - x' dweight / n)

(arXiv 1502.03167, section 3), where n counts all values that the statistics are of. Those may be
more than x's: values of other processes, whose sums are then added before dx, or of mini-batches
that came before, which are constant for the gradient. So it comes in pieces: moments and statistics
(ops/channel_moments.py), `normalise`, `gradient_sums`, `input_gradient`; and `mish_bn_train`, the
last three behind autograd.

Everything is computed in float32 and rounded once. x, dy, y and dx are float32, float16 or
bfloat16; weight, bias and statistics float32. The reference also takes float64 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolov4_fast.ops.activation import activate_reference, activation_code
from yolov4_fast.ops.channel_moments import on_kernel, precision
from yolov4_fast.ops.views import (
    FLOATS,
    Implementation,
    check_dtype,
    check_same_device,
    row_stride,
)

SumOver = Callable[[Tensor], object]  # in place, over all processes


def mish_bn_train(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    *,
    sum_over: SumOver | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """activation of x normalised by `statistics` [3, C], which x's values are part of.

    x: [B, C, H, W], in channels-last memory (else it is copied); returns its like. weight, bias:
    [C]. The gradient of x takes in that mean and deviation follow x; sum_over adds its two sums
    over the processes that the statistics are of. implementation: the kernel for a CUDA tensor and
    the reference for any other, unless one is asked for. Raises ValueError.
    """
    y: Tensor = _MishBnTrain.apply(  # type: ignore[no-untyped-call]
        x, statistics, weight, bias, activation, sum_over, implementation
    )
    return y


class _MishBnTrain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        statistics: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str,
        sum_over: SumOver | None,
        implementation: Implementation | None,
    ) -> Tensor:
        x = _rows(x)
        ctx.save_for_backward(x, statistics, weight, bias)
        ctx.settings = activation, sum_over, implementation
        y = normalise(x, statistics, weight, bias, activation, implementation=implementation)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, statistics, weight, bias = ctx.saved_tensors
        activation, sum_over, implementation = ctx.settings
        dy = _rows(dy)
        if on_kernel(x, implementation):
            from yolov4_fast.ops.kernels import mish_bn_train as kernel

            arguments = (x, dy, statistics, weight, bias, activation_code(activation))
            with torch.cuda.device_of(x):
                sums = kernel.launch_sums(*arguments)
                dx = kernel.launch_input_gradient(*arguments, _summed(sums, sum_over))
        else:  # dz once for both
            dz = activation_gradient(x, dy, statistics, weight, bias, activation)
            sums = _sums(x, dz, statistics)
            dx = _input_gradient(x, dz, statistics, weight, _summed(sums, sum_over))
        return dx.permute(0, 3, 1, 2), None, sums[1], sums[0], None, None, None


def _rows(x: Tensor) -> Tensor:
    """[B, C, H, W] as a view [B, H, W, C], copied where its memory is not channels-last."""
    x = x.permute(0, 2, 3, 1)
    try:
        row_stride(x)
    except ValueError:
        x = x.contiguous()
    return x


def _summed(sums: Tensor, sum_over: SumOver | None) -> Tensor:
    """dweight and dbias stay this process's own: what trains on several adds those itself."""
    if sum_over is None:
        return sums
    total = sums.clone()
    sum_over(total)
    return total


def normalise(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """y [B, H, W, C], contiguous and of x's dtype. x: view [B, H, W, C]. Raises ValueError."""
    _check(x, statistics, weight, bias, activation, implementation)
    if not on_kernel(x, implementation):
        z = _z(x, statistics, weight, bias)
        return activate_reference(z, activation).to(x.dtype).contiguous()
    from yolov4_fast.ops.kernels import mish_bn_train as kernel

    with torch.cuda.device_of(x):
        return kernel.launch_normalise(x, statistics, weight, bias, activation_code(activation))


def gradient_sums(
    x: Tensor,
    dy: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """[2, C]: sum dz and sum dz x', which are also the gradients of bias and weight; the same in
    every run. x, dy: views [B, H, W, C] of one dtype. Raises ValueError.
    """
    _check(x, statistics, weight, bias, activation, implementation, dy)
    if not on_kernel(x, implementation):
        dz = activation_gradient(x, dy, statistics, weight, bias, activation)
        return _sums(x, dz, statistics)
    from yolov4_fast.ops.kernels import mish_bn_train as kernel

    with torch.cuda.device_of(x):
        return kernel.launch_sums(x, dy, statistics, weight, bias, activation_code(activation))


def input_gradient(
    x: Tensor,
    dy: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    sums: Tensor,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """dx [B, H, W, C], contiguous and of x's dtype. sums: [2, C], of all processes that the
    statistics are of; the rest as in `gradient_sums`. Raises ValueError.
    """
    _check(x, statistics, weight, bias, activation, implementation, dy)
    check_dtype(sums, "the sums", (precision(x),))
    check_same_device([x, sums])
    if sums.shape != (2, x.shape[3]) or not sums.is_contiguous():
        raise ValueError(f"the sums must be [2, {x.shape[3]}] and contiguous: {list(sums.shape)}")
    if not on_kernel(x, implementation):
        dz = activation_gradient(x, dy, statistics, weight, bias, activation)
        return _input_gradient(x, dz, statistics, weight, sums)
    from yolov4_fast.ops.kernels import mish_bn_train as kernel

    code = activation_code(activation)
    with torch.cuda.device_of(x):
        return kernel.launch_input_gradient(x, dy, statistics, weight, bias, code, sums)


def _z(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x.to(statistics.dtype) - statistics[0]).mul_(statistics[1] * weight).add_(bias)


def activation_gradient(
    x: Tensor, dy: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """dz, by torch's own derivatives; in the statistics' dtype."""
    z = _z(x, statistics, weight, bias)
    dy = dy.to(z.dtype)
    if activation == "mish":  # without the forward pass that autograd needs before it
        return torch.ops.aten.mish_backward(dy, z)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        y = activate_reference(z, activation)
    return torch.autograd.grad(y, z, dy)[0]


def _sums(x: Tensor, dz: Tensor, statistics: Tensor) -> Tensor:
    away = x.to(dz.dtype) - statistics[0]
    return torch.stack([dz.sum((0, 1, 2)), (dz * away).sum((0, 1, 2)) * statistics[1]])


def _input_gradient(
    x: Tensor, dz: Tensor, statistics: Tensor, weight: Tensor, sums: Tensor
) -> Tensor:
    mean, inverse, count = statistics
    dbias, dweight = sums / count
    away = x.to(dz.dtype) - mean
    dx = away.mul_(-inverse * dweight).add_(dz).sub_(dbias).mul_(inverse * weight)
    return dx.to(x.dtype).contiguous()


def _check(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    implementation: Implementation | None,
    dy: Tensor | None = None,
) -> None:
    activation_code(activation)
    row_stride(x, "x")
    check_dtype(x, "x", FLOATS if on_kernel(x, implementation) else (*FLOATS, torch.float64))
    channels = x.shape[3]
    for name, values, shape in (
        ("the statistics", statistics, (3, channels)),
        ("the weight", weight, (channels,)),
        ("the bias", bias, (channels,)),
    ):
        check_dtype(values, name, (precision(x),))
        if values.shape != shape or not values.is_contiguous():
            raise ValueError(
                f"{name} must be {list(shape)} and contiguous, not {list(values.shape)} with "
                f"strides {list(values.stride())}"
            )
    if dy is not None:
        row_stride(dy, "dy")
        check_dtype(dy, "dy", (x.dtype,))
        if dy.shape != x.shape:
            raise ValueError(f"dy {list(dy.shape)} and x {list(x.shape)} must have one shape")
    check_same_device([t for t in (x, statistics, weight, bias, dy) if t is not None])
