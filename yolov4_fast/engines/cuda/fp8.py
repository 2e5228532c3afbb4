"""FP8: activations and filters as e4m3 (three bits of mantissa, largest value 448), each with a
scale, products summed in float32.

    value = stored * scale          a scale for each buffer, found with calibration images
    filter = stored * scale[o]      a scale for each output channel, found from the filters

Buffers between which steps only select or copy values (pooling, upsampling) share a scale, and so
does all that lies in one buffer to be concatenated. In half precision stay: the image; the raw
maps, whose small differences decide scores; what is combined without a convolution; what grouped
convolutions read and write, which no kernel does in FP8; buffers with views that are not aligned.

`quantised_kernels` defines the result of each step, in torch, on any device: with it the loss of
AP can be measured without a GPU that has FP8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.cudnn_problem import FP8, OUT_SCALE, RESCALE, RESIDUAL_SCALE
from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.place import place
from yolov4_fast.engines.cuda.plan import Combine, Convolution, Plan, View
from yolov4_fast.engines.cuda.reference import (
    convolution,
    prepare_weights,
    reference_kernel,
    reference_kernels,
)
from yolov4_fast.engines.engine import EngineError

HALF = torch.float16
LARGEST = 448.0  # that e4m3 holds; larger values become it
ALIGNMENT = 16  # bytes and so elements, of all views of an FP8 buffer
FORMAT = "yolov4_fast.fp8"


@dataclass(frozen=True)
class Scales:
    """values: by buffer of a plan, what a stored 1.0 is worth; None where it is half precision."""

    values: tuple[float | None, ...]

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the plan's buffers."""
        return tuple(HALF if value is None else FP8 for value in self.values)

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, "scales": self.values}).encode()

    @classmethod
    def from_json(cls, text: bytes, plan: Plan) -> Scales:
        """Raises EngineError where the text is none of ours, or for another plan."""
        try:
            value: Any = json.loads(text)
            if value["format"] != FORMAT:
                raise ValueError(value["format"])
            scales = tuple(None if item is None else float(item) for item in value["scales"])
            if not all(item is None or 0 < item < float("inf") for item in scales):
                raise ValueError("scales must be positive")
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"the scales are damaged ({error!r}): build the engine again"
            ) from None
        if len(scales) != len(plan.buffers):
            raise EngineError(
                f"{len(scales)} scales for a plan of {len(plan.buffers)} buffers: build the engine "
                "again"
            )
        return cls(scales)


@dataclass(frozen=True)
class QuantisedWeights:
    """Of one convolution. weight: [O, size, size, I / groups] as FP8, or half precision where the
    source is. bias: [O] float32. rescale: [O] float32, what a product of stored ones is worth; None
    for half precision. Of a Combine, which is never quantised: its weights and slopes.
    """

    weight: Tensor
    bias: Tensor
    rescale: Tensor | None


def sharing(plan: Plan) -> list[frozenset[int]]:
    """The plan's buffers in groups of one scale each."""
    parent = list(range(len(plan.buffers)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for step in plan.steps:
        if not isinstance(step, (Convolution, Combine)):
            first, *others = {root(view.buffer) for view in (*step.reads, *step.writes)}
            for other in others:
                parent[other] = first
    groups: dict[int, set[int]] = {}
    for number in range(len(plan.buffers)):
        groups.setdefault(root(number), set()).add(number)
    return [frozenset(group) for group in groups.values()]


def in_half(plan: Plan) -> frozenset[int]:
    """Buffers that stay in half precision; the module says why."""
    maps = {view.buffer for view in plan.maps}
    half = {plan.image.buffer, *maps}
    for step in plan.steps:
        views = (*step.reads, *step.writes)
        if (
            isinstance(step, Combine)
            or (isinstance(step, Convolution) and step.groups > 1)
            or any(view.buffer in maps for view in step.writes)
        ):
            half |= {view.buffer for view in views}
        half |= {view.buffer for view in views if not _aligned(plan, view)}
    return frozenset().union(*(group for group in sharing(plan) if group & half))


def calibrate(
    plan: Plan,
    state: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    device: str | torch.device = "cpu",
) -> Scales:
    """Scales that let the largest value met in each group of buffers become the largest of e4m3.

    state: of the folded network. batches: images [B, 3, height, width] float32 in 0..1 of the
    network's size. Runs in float32 on `device`. Raises EngineError for no images or activations
    that are not finite.
    """
    weights = prepare_weights(plan, state, torch.float32, device)
    placement = place(plan)
    largest = torch.zeros(len(plan.buffers), device=device)
    memories: dict[int, Memory] = {}
    for images in batches:
        batch = images.shape[0]
        if batch not in memories:
            memories[batch] = Memory(plan, placement, batch, torch.float32, device=device)
        memory = memories[batch]
        memory.image.copy_(images.permute(0, 2, 3, 1))
        for step, kernel in zip(plan.steps, reference_kernels(plan, memory, weights), strict=True):
            kernel()
            for view in step.writes:  # at once: its memory is another's soon
                found = memory.tensor(view).abs().amax()
                largest[view.buffer] = torch.maximum(largest[view.buffer], found)
    if not memories:
        raise EngineError("no calibration images: FP8 needs some to find its scales")
    if not bool(largest.isfinite().all()):
        raise EngineError("the activations of the calibration images are not finite")
    half, maxima = in_half(plan), largest.tolist()
    scales: list[float | None] = [None] * len(plan.buffers)
    for group in sharing(plan):
        scale = max(maxima[number] for number in group) / LARGEST
        for number in group - half:
            scales[number] = scale or 1.0
    return Scales(tuple(scales))


def quantise_weights(
    plan: Plan,
    state: Mapping[str, Tensor],
    scales: Scales,
    device: str | torch.device = "cpu",
) -> dict[int, QuantisedWeights]:
    """Filters and biases of each convolution, weights and slopes of each Combine, by `step.key`."""
    exact = prepare_weights(plan, state, torch.float32, device)
    quantised = {}
    for step in plan.steps:
        if isinstance(step, Combine) and step.key is not None:
            quantised[step.key] = QuantisedWeights(*exact[step.key], None)
        if not isinstance(step, Convolution):
            continue
        weight, bias = exact[step.key]
        source = scales.values[step.source.buffer]
        if source is None:
            quantised[step.key] = QuantisedWeights(weight.to(HALF), bias, None)
            continue
        largest = weight.abs().amax((1, 2, 3))
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        stored = to_fp8(weight / scale.view(-1, 1, 1, 1))
        quantised[step.key] = QuantisedWeights(stored, bias, scale * source)
    return quantised


def step_scales(step: Convolution, weights: QuantisedWeights, scales: Scales) -> dict[int, Tensor]:
    """The scales that a fused convolution of a step takes, on the device of its weights.

    RESCALE [O], RESIDUAL_SCALE [1], OUT_SCALE [1] (of which a value becomes what is stored), all
    float32: those of them that belong to an FP8 tensor.
    """

    def scalar(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float32, device=weights.bias.device)

    found = {}
    if weights.rescale is not None:
        found[RESCALE] = weights.rescale
    residual = None if step.residual is None else scales.values[step.residual.buffer]
    if residual is not None:
        found[RESIDUAL_SCALE] = scalar(residual)
    out = scales.values[step.out.buffer]
    if out is not None:
        found[OUT_SCALE] = scalar(1 / out)
    return found


def quantised_kernels(
    plan: Plan, memory: Memory, weights: Mapping[int, QuantisedWeights], scales: Scales
) -> list[Callable[[], None]]:
    """What runs the plan when called in order, one for each step.

    memory: with the types of `scales.dtypes()`. weights: of `quantise_weights`.
    """
    plain = {key: (own.weight, own.bias) for key, own in weights.items()}
    return [
        quantised_kernel(step, memory.tensor, weights, scales)
        if isinstance(step, Convolution)
        else reference_kernel(step, memory.tensor, plain)
        for step in plan.steps
    ]


def quantised_kernel(
    step: Convolution,
    tensor: Callable[[View], Tensor],
    weights: Mapping[int, QuantisedWeights],
    scales: Scales,
) -> Callable[[], None]:
    """What runs one convolution when called. tensor: from a view to its tensor, as stored."""
    own = weights[step.key]
    factors = step_scales(step, own, scales)
    weight = own.weight.float()
    if own.rescale is not None:
        weight = weight * own.rescale.view(-1, 1, 1, 1)
    source, out = tensor(step.source), tensor(step.out)
    residual = None if step.residual is None else tensor(step.residual)

    def run() -> None:
        added = residual
        if added is not None and RESIDUAL_SCALE in factors:
            added = added.float() * factors[RESIDUAL_SCALE]
        value = convolution(step, source, weight, own.bias, added)
        out.copy_(to_fp8(value * factors[OUT_SCALE]) if OUT_SCALE in factors else value)

    return run


def run_quantised(
    plan: Plan, weights: Mapping[int, QuantisedWeights], scales: Scales, images: Tensor
) -> tuple[Tensor, ...]:
    """Raw maps [B, A * (5 + classes), h, w] float32 of images [B, 3, H, W], on their device."""
    dtypes = dict(enumerate(scales.dtypes()))
    memory = Memory(plan, place(plan), images.shape[0], HALF, device=images.device, dtypes=dtypes)
    memory.poison()
    memory.image.copy_(images.permute(0, 2, 3, 1))
    for kernel in quantised_kernels(plan, memory, weights, scales):
        kernel()
    return tuple(raw.permute(0, 3, 1, 2).float().contiguous() for raw in memory.maps)


def to_fp8(x: Tensor) -> Tensor:
    """e4m3, rounded to the nearest; what is too large becomes the largest, as on the GPU."""
    return x.clamp(-LARGEST, LARGEST).to(FP8)


def _aligned(plan: Plan, view: View) -> bool:
    row = plan.buffers[view.buffer].channels
    return not any(number % ALIGNMENT for number in (view.offset, view.channels, row))
