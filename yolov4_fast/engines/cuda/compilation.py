"""Compiling what tuning is about to try, in many processes: one after another it would be the
longest part of building an engine. cuDNN's plans: `cudnn_compile`; our kernels: `kernels.ahead`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.kernels import Kernels
from yolov4_fast.engines.cuda.plan import Convolution, Step, View
from yolov4_fast.ops.activation import activation_code
from yolov4_fast.ops.convolution import ConvConfig
from yolov4_fast.ops.kernels import ahead
from yolov4_fast.ops.kernels.convolution import binary


def compile_ahead(
    kernels: Kernels, steps: Iterable[tuple[Step, int]], processes: int, *, progress: bool = True
) -> int:
    """Compile the candidates of steps, each with a batch size; returns how many kernels of ours
    that were. What cannot be compiled is left for the tuning to meet.
    """
    convolutions = [(step, batch) for step, batch in steps if isinstance(step, Convolution)]
    kernels.compile_plans(convolutions)
    binaries = {
        _binary(kernels, step, config)
        for step, batch in convolutions
        for config in kernels.configs(step, batch).values()
    }
    ahead.compile_ahead(binaries, kernels.device.properties.sm, processes, progress=progress)
    return len(binaries)


def _binary(kernels: Kernels, step: Convolution, config: ConvConfig) -> ahead.Binary:
    """A kernel does not depend on the size of the map: one cell stands for it."""

    def tensor(view: View) -> Tensor:
        channels = kernels.plan.buffers[view.buffer].channels
        buffer = torch.empty(1, 1, 1, channels, dtype=kernels.dtypes[view.buffer])
        return buffer[..., view.offset : view.end]

    weight, bias = kernels.filters.weights[step.key]
    return binary(
        tensor(step.source),
        weight,
        bias,
        None if step.residual is None else tensor(step.residual),
        tensor(step.out),
        step.stride,
        step.padding,
        activation_code(step.activation),
        config,
    )
