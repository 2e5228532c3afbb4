"""Moments of the channels of a map, and the statistics of batch normalisation from them.

Moments are [3, C]: mean, sum of squared differences from it, and count. They come in parts, which
are joined by Chan, Golub and LeVeque 1983 (equation 2.1): no sum of squares is ever taken about
zero, so that a mean far from zero costs no digits. Parts may be of one map, of several processes,
or of mini-batches that came one after the other; all are joined alike:

    count = sum n_p        mean = sum n_p mean_p / count
    squares = sum (squares_p + n_p (mean_p - mean)^2)

Statistics are [3, C] too: mean, 1 / sqrt(squares / count + eps), and count. All are float32,
whatever x is; for float64, which only the reference takes, float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yolov4_fast.ops.views import (
    FLOATS,
    Implementation,
    check_dtype,
    check_same_device,
    row_stride,
    uses_kernel,
)

Running = tuple[Tensor, Tensor]  # mean and variance, each [C]


def partial_moments(x: Tensor, *, implementation: Implementation | None = None) -> Tensor:
    """Moments of each channel in some parts: [parts, 3, C], parts >= 1, the same in every run.

    x: view [B, H, W, C]. implementation: the kernel for a CUDA tensor and the reference for any
    other, unless one is asked for. Raises ValueError.
    """
    row_stride(x, "x")
    if not on_kernel(x, implementation):
        check_dtype(x, "x", (*FLOATS, torch.float64))
        return moments_reference(x)[None]
    check_dtype(x, "x", FLOATS)
    from yolov4_fast.ops.kernels import channel_moments as kernel

    with torch.cuda.device_of(x):
        return kernel.launch_moments(x)


def join_moments(parts: Tensor, *, implementation: Implementation | None = None) -> Tensor:
    """[parts, 3, C] -> [3, C], the same in every run. Raises ValueError."""
    _check_parts(parts, implementation)
    if not on_kernel(parts, implementation):
        return join_reference(parts)
    from yolov4_fast.ops.kernels import channel_moments as kernel

    with torch.cuda.device_of(parts):
        return kernel.launch_join(parts)


def batch_statistics(
    parts: Tensor,
    eps: float,
    running: Running | None = None,
    momentum: float = 0.0,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """[parts, 3, C] -> statistics [3, C].

    running: moved in place by the share `momentum` to the mean, and to the variance with the
    denominator count - 1, as in torch. Raises ValueError.
    """
    _check_parts(parts, implementation)
    for name, values in zip(("mean", "variance"), running or (), strict=False):
        check_dtype(values, f"the running {name}", (parts.dtype,))
        check_same_device([parts, values])
        if values.shape != parts.shape[2:] or not values.is_contiguous():
            raise ValueError(
                f"the running {name} must be [{parts.shape[2]}] and contiguous, not "
                f"{list(values.shape)} with strides {list(values.stride())}"
            )
    if not on_kernel(parts, implementation):
        return statistics_reference(parts, eps, running, momentum)
    from yolov4_fast.ops.kernels import channel_moments as kernel

    with torch.cuda.device_of(parts):
        return kernel.launch_join(parts, eps, running, momentum)


def moments_reference(x: Tensor) -> Tensor:
    """[B, H, W, C] of any float dtype -> [3, C]: the mean, then the squares about it."""
    rows = x.reshape(-1, x.shape[3]).to(precision(x))
    mean = rows.mean(0)
    squares = (rows - mean).square_().sum(0)
    return torch.stack([mean, squares, torch.full_like(mean, rows.shape[0])])


def join_reference(parts: Tensor) -> Tensor:
    means, squares, counts = parts.unbind(1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    return torch.stack([mean, (squares + counts * (means - mean).square()).sum(0), count])


def statistics_reference(
    parts: Tensor, eps: float, running: Running | None, momentum: float
) -> Tensor:
    mean, squares, count = join_reference(parts)
    if running is not None:
        running[0].lerp_(mean, momentum)
        running[1].lerp_(squares / (count - 1).clamp(min=1), momentum)
    return torch.stack([mean, torch.rsqrt(squares / count + eps), count])


def precision(x: Tensor) -> torch.dtype:
    """Of moments, statistics and parameters of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def on_kernel(x: Tensor, implementation: Implementation | None) -> bool:
    """Whether the kernel is to run, which it does for CUDA tensors unless something is asked for.
    Raises ValueError where it cannot.
    """
    return uses_kernel(x, implementation or ("kernel" if x.is_cuda else "reference"))


def _check_parts(parts: Tensor, implementation: Implementation | None) -> None:
    wide = () if on_kernel(parts, implementation) else (torch.float64,)
    check_dtype(parts, "moments", (torch.float32, *wide))
    if parts.ndim != 3 or parts.shape[1] != 3 or not parts.numel() or not parts.is_contiguous():
        raise ValueError(
            "moments must be [parts, 3, C], contiguous and not empty, not "
            f"{list(parts.shape)} with strides {list(parts.stride())}"
        )
