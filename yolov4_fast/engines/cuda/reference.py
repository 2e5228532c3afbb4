"""The reference executor: a plan run step by step in plain torch, on any device.

It defines what every kernel must compute: sources and filters as they are stored, converted to
float32; sums, bias, activation and residual in float32; one rounding to the type of `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.place import place
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
from yolov4_fast.network.module import activate
from yolov4_fast.ops.full_precision import full_precision

Weights = Mapping[int, tuple[Tensor, Tensor]]
Kernel = Callable[[], None]


def prepare_weights(
    plan: Plan, state: Mapping[str, Tensor], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> dict[int, tuple[Tensor, Tensor]]:
    """Filters and biases of each convolution, weights and slopes of each Combine that has some, by
    `step.key`.

    state: of the folded network. Filters are OHWI, [O, size, size, I / groups] contiguous of
    `dtype`, those of merged siblings one after the other; biases [O] float32. Weights are [inputs,
    C] of a whole shortcut, slopes [C], both float32, and empty where there are none.
    """
    prepared: dict[int, tuple[Tensor, Tensor]] = {}
    for step in plan.steps:
        if isinstance(step, Combine) and step.key is not None:
            prepared[step.key] = _vectors(step, state, device)
        if not isinstance(step, Convolution):
            continue
        filters = [state[f"layers.{layer}.conv.weight"] for layer in step.weights]
        biases = [state[f"layers.{layer}.conv.bias"] for layer in step.weights]
        weight = torch.cat([f.to(device, dtype) for f in filters]).permute(0, 2, 3, 1)
        bias = torch.cat([b.to(device, torch.float32) for b in biases])
        prepared[step.key] = weight.contiguous(), bias
    return prepared


def _vectors(
    step: Combine, state: Mapping[str, Tensor], device: str | torch.device
) -> tuple[Tensor, Tensor]:
    weights, slopes = (
        state.get(f"layers.{step.layers[0]}.{name}", torch.empty(0)).to(device, torch.float32)
        for name in ("weights", "slope")
    )
    if len(weights):
        weights = weights.view(len(weights), -1).expand(-1, step.out.channels).contiguous()
    return weights, slopes


def vectors(step: Combine, weights: Weights) -> tuple[Tensor | None, Tensor | None]:
    """Weights [sources, C] and slopes [C] of one step, as far as it has them."""
    if step.key is None:
        return None, None
    rows, slopes = weights[step.key]
    return (
        None if step.row is None else rows[step.row : step.row + len(step.sources)],
        slopes if step.activation == "prelu" else None,
    )


def reference_kernels(plan: Plan, memory: Memory, weights: Weights) -> list[Kernel]:
    """What runs the plan when called in order, one for each step.

    weights: of `prepare_weights`. The image must have been written to memory.image.
    """
    return [reference_kernel(step, memory.tensor, weights) for step in plan.steps]


def reference_kernel(step: Step, tensor: Callable[[View], Tensor], weights: Weights) -> Kernel:
    """What runs one step when called. tensor: from a view to its tensor."""
    out = [tensor(view) for view in step.writes]
    match step:
        case Convolution():
            weight, bias = weights[step.key]
            source = tensor(step.source)
            residual = None if step.residual is None else tensor(step.residual)
            return lambda: _write(out[0], convolution(step, source, weight, bias, residual))
        case Pool():
            source = tensor(step.source)
            return lambda: _write(out[0], pool(source, step.size, step.stride, step.pads, out[0]))
        case PyramidPool():
            source = tensor(step.source)

            def pyramid() -> None:
                for size, target in zip(step.sizes, out, strict=True):
                    _write(target, pool(source, size, 1, (size // 2,) * 4, target))

            return pyramid
        case Upsample():
            source = tensor(step.source)
            return lambda: _write(
                out[0],
                source.repeat_interleave(step.factor, 1).repeat_interleave(step.factor, 2),
            )
        case Combine():
            sources = [tensor(view) for view in step.sources]
            rows, slopes = vectors(step, weights)
            return lambda: _write(out[0], combine(step, sources, rows, slopes))
    raise TypeError(f"no reference for {type(step).__name__}")


def run_reference(
    plan: Plan, state: Mapping[str, Tensor], images: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Raw maps [B, A * (5 + classes), h, w] float32 of images [B, 3, H, W], on their device.

    state: of the folded network. The arena is poisoned before, so a map without NaN shows that
    every step read only what was written.
    """
    memory = Memory(plan, place(plan), images.shape[0], dtype, device=images.device)
    kernels = reference_kernels(plan, memory, prepare_weights(plan, state, dtype, images.device))
    memory.poison()
    memory.image.copy_(images.permute(0, 2, 3, 1))
    for kernel in kernels:
        kernel()
    return tuple(raw.permute(0, 3, 1, 2).float().contiguous() for raw in memory.maps)


def convolution(
    step: Convolution, source: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """activation(convolution(source) + bias) (+ residual), [B, h, w, O] float32."""
    with full_precision():
        result = F.conv2d(
            source.permute(0, 3, 1, 2).float(),
            weight.permute(0, 3, 1, 2).float(),
            bias,
            step.stride,
            step.padding,
            groups=step.groups,
        )
    result = activate(result, step.activation).permute(0, 2, 3, 1)
    return result if residual is None else result + residual.float()


def pool(
    source: Tensor, size: int, stride: int, pads: tuple[int, int, int, int], out: Tensor
) -> Tensor:
    """Maxima [B, h, w, C] float32, h and w those of `out`; padding never wins."""
    top, bottom, left, right = pads
    padded = F.pad(source.permute(0, 3, 1, 2).float(), (left, right, top, bottom), value=-torch.inf)
    maxima = F.max_pool2d(padded, size, stride)[:, :, : out.shape[1], : out.shape[2]]
    return maxima.permute(0, 2, 3, 1)


def combine(
    step: Combine,
    sources: list[Tensor],
    weights: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """activation(sum, weighted or not, or product of the sources) in float32."""
    terms = [source.float() for source in sources]
    if weights is not None:
        terms = [term * weight for term, weight in zip(terms, weights, strict=True)]
    total = prod(terms[1:], start=terms[0]) if step.product else sum(terms[1:], start=terms[0])
    return activate(total.permute(0, 3, 1, 2), step.activation, slopes).permute(0, 2, 3, 1)


def _write(out: Tensor, values: Tensor) -> None:
    """Rounded to the type of `out`; what is too large for FP8 becomes its largest."""
    if out.dtype == torch.float8_e4m3fn:  # else NaN, in some versions of torch
        largest = torch.finfo(out.dtype).max
        values = values.float().clamp(-largest, largest)
    out.copy_(values)
