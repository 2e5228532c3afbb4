"""How a precision stores the numbers of a plan: the types of its buffers, its filters, and what
each step therefore has to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.device import Run
from yolov4_fast.engines.cuda.fp8 import (
    FP8,
    HALF,
    QuantisedWeights,
    Scales,
    quantise_weights,
    quantised_kernel,
    step_scales,
)
from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.place import place
from yolov4_fast.engines.cuda.plan import Combine, Convolution, Plan, Step, View
from yolov4_fast.engines.cuda.reference import Weights, prepare_weights, reference_kernel

# Of the image and the raw maps; and of all else, but for fp8.
DTYPES = {"fp16": HALF, "bf16": torch.bfloat16, "f32": torch.float32, "fp8": HALF}

Tensors = Callable[[View], Tensor]


class Types:
    """Of the buffers of a plan, and where these lie. scales: for precision fp8."""

    def __init__(self, plan: Plan, precision: str, scales: Scales | None = None) -> None:
        self.plan = plan
        self.dtype = DTYPES[precision]
        self.scales = scales
        self.dtypes = (self.dtype,) * len(plan.buffers) if scales is None else scales.dtypes()
        itemsizes = None if scales is None else [dtype.itemsize for dtype in self.dtypes]
        self._placement = place(plan, itemsizes)

    def bytes(self, batch: int) -> int:
        """Of the arena, in proportion to the batch."""
        return self._placement.bytes(batch, self.dtype.itemsize)

    def weight_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Of filters and biases, at most, and of what sums are weighted with."""
        filters = sum(
            values.numel() * (self.dtype.itemsize if name.endswith("conv.weight") else 4)
            for name, values in state.items()
        )
        return filters + sum(
            4 * len(step.sources) * step.out.channels
            for step in self.plan.steps
            if isinstance(step, Combine) and step.row is not None
        )

    def memory(self, batch: int, storage: Tensor) -> Memory:
        dtypes = None if self.scales is None else dict(enumerate(self.dtypes))
        return Memory(self.plan, self._placement, batch, self.dtype, storage, dtypes=dtypes)


@dataclass(frozen=True)
class Filters:
    """Of all convolutions of a plan, as they are stored, and the weights and slopes of its sums.
    quantised: for precision fp8.
    """

    types: Types
    weights: Weights
    quantised: Mapping[int, QuantisedWeights] = field(default_factory=dict)

    @classmethod
    def of(cls, types: Types, state: Mapping[str, Tensor], device: torch.device) -> Filters:
        """state: of the folded network."""
        if types.scales is None:
            return cls(types, prepare_weights(types.plan, state, types.dtype, device))
        quantised = quantise_weights(types.plan, state, types.scales, device)
        weights = {number: (own.weight, own.bias) for number, own in quantised.items()}
        return cls(types, weights, quantised)

    def scales(self, step: Convolution) -> dict[int, Tensor]:
        """What cuDNN's graph of a step takes beside its tensors; empty where nothing is FP8."""
        if self.types.scales is None:
            return {}
        return step_scales(step, self.quantised[step.key], self.types.scales)

    def definition(self, step: Step, tensor: Tensors) -> Run:
        """What a step is to compute, in torch: rounded to what `tensor` gives for its outputs."""
        if self.types.scales is None or not isinstance(step, Convolution):
            return reference_kernel(step, tensor, self.weights)
        return quantised_kernel(step, tensor, self.quantised, self.types.scales)

    def unrounded(self, step: Step, tensor: Tensors) -> None:
        """The same in float32 tensors, in units of what is stored, before it is rounded to that."""
        scales = self.types.scales
        if scales is None or not isinstance(step, Convolution):
            return reference_kernel(step, tensor, self.weights)()
        unit = scales.values[step.out.buffer]
        values = list(scales.values)
        values[step.out.buffer] = None
        quantised_kernel(step, tensor, self.quantised, Scales(tuple(values)))()
        if unit is not None:
            tensor(step.out).div_(unit)
        return None

    def magnitudes(self, step: Step, tensor: Tensors) -> bool:
        """As `unrounded`, without bias, activation and residual: what rounding errors of the sums
        are in proportion to. Returns False where a step does not sum.
        """
        match step:
            case Convolution():
                weight, bias = self.weights[step.key]
                zero = torch.zeros_like(bias)
                key, quantised = step.key, dict(self.quantised)
                if key in quantised:
                    quantised[key] = replace(quantised[key], bias=zero)
                plain = Filters(self.types, {key: (weight, zero)}, quantised)
                plain.unrounded(replace(step, activation="linear", residual=None), tensor)
            case Combine():
                self.unrounded(replace(step, activation="linear"), tensor)
            case _:
                return False
        return True

    def is_quantised(self, step: Step) -> bool:
        """Whether a step reads or writes FP8."""
        views = (*step.reads, *step.writes)
        return any(self.types.dtypes[view.buffer] == FP8 for view in views)
