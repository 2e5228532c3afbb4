"""The shape of a step in words: all that the speed of its kernels depends on, but for the batch.

For example "convolution 3x3/1 pad 1 mish fp16 52x52x64 of 128 -> fp16 52x52x64".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from yolov4_fast.engines.cuda.plan import (
    Combine,
    Convolution,
    Plan,
    Pool,
    PyramidPool,
    Step,
    Upsample,
    View,
)

DTYPE_NAMES = {
    torch.float32: "f32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
}
VECTOR = 16  # bytes that kernels would load at once


def shape_of(step: Step, plan: Plan, dtypes: Sequence[torch.dtype]) -> str:
    """dtypes: of the plan's buffers."""
    reads, writes = (
        " + ".join(_view(view, plan, dtypes[view.buffer]) for view in views)
        for views in (step.reads, step.writes)
    )
    return f"{_kind(step)} {reads} -> {writes}"


def _view(view: View, plan: Plan, dtype: torch.dtype) -> str:
    """Such as "fp16 52x52x64 of 128": the row's channels where they are more. An offset at which
    wide loads are not aligned is told as "@6", in bytes.
    """
    buffer = plan.buffers[view.buffer]
    text = f"{DTYPE_NAMES[dtype]} {buffer.height}x{buffer.width}x{view.channels}"
    if buffer.channels != view.channels:
        text += f" of {buffer.channels}"
    odd = view.offset * dtype.itemsize % VECTOR
    return f"{text} @{odd}" if odd else text


def _kind(step: Step) -> str:
    match step:
        case Convolution():
            groups = f" groups {step.groups}" if step.groups > 1 else ""
            return (
                f"convolution {step.size}x{step.size}/{step.stride} pad {step.padding}{groups} "
                f"{step.activation}"
            )
        case Pool():
            pads = ",".join(map(str, step.pads))
            return f"pool {step.size}x{step.size}/{step.stride} pads {pads}"
        case PyramidPool():
            return f"pyramid {','.join(map(str, step.sizes))}"
        case Upsample():
            return f"upsample {step.factor}"
        case Combine():
            weighted = "" if step.row is None else "weighted "
            return f"{weighted}{'product' if step.product else 'sum'} {step.activation}"
    raise TypeError(f"no kernel for {type(step).__name__}")
