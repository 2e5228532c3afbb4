"""View tensors: what the ops of the CUDA engine read and write.

A view tensor is a channel slice of a contiguous channels-last buffer: [B, H, W, C] whose rows (the
channels of one cell) are contiguous and lie S >= C elements apart, all B * H * W of them evenly.
So most of these ops see B * H * W rows, whatever the shape.
"""

import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["kernel", "reference"]

MOST_CELLS = 2**30  # B * H * W, so that kernels can number cells in 32 bits (not offsets)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def row_stride(x: Tensor, name: str = "the tensor") -> int:
    """S of a view tensor, in elements. Raises ValueError, naming it, where x is none."""
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{name} must be [B, height, width, channels] with no size 0, not {list(x.shape)}"
        )
    _, height, width, channels = x.shape
    if x.numel() // channels > MOST_CELLS:
        raise ValueError(f"{name} has more than {MOST_CELLS} cells: {list(x.shape)}")
    # The stride of a size 1 means nothing.
    steps = [step for size, step in zip(x.shape[2::-1], x.stride()[2::-1], strict=True) if size > 1]
    stride = steps[0] if steps else channels
    expected = (height * width * stride, width * stride, stride, 1)
    if stride < channels or any(
        size > 1 and step != want
        for size, step, want in zip(x.shape, x.stride(), expected, strict=True)
    ):
        raise ValueError(
            f"{name} must be a channel slice of a contiguous channels-last buffer, not a tensor of "
            f"shape {list(x.shape)} and strides {list(x.stride())}"
        )
    return stride


def check_dtype(x: Tensor, name: str, dtypes: Sequence[torch.dtype]) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {x.dtype}")


def check_same_device(tensors: Sequence[Tensor]) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {sorted(map(str, devices))}")


def uses_kernel(x: Tensor, implementation: str) -> bool:
    """Whether the kernel is asked for, not the reference. Raises ValueError where it cannot run."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {', '.join(get_args(Implementation))}, "
            f"not {implementation!r}"
        )
    if implementation == "reference":
        return False
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"the kernel runs on CUDA tensors, not on {x.device}; ask for "
            "implementation='reference', or set TRITON_INTERPRET=1 to interpret it on the CPU"
        )
    return True
