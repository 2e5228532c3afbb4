"""A step on its own, to see whether a kernel computes it rightly and how long it takes.

The step's buffers are made anew with their real strides; its sources hold random numbers, all else
NaN: what the output keeps of it was not written, and what reads beyond its source spreads it.

An output may be off from the definition, unrounded, by

    ROUNDING |expected| + SUM (|x| + rms x)     x: the convolution alone, rms over one channel of it

The first is for the rounding of the result. The second is for the sums: in another order they round
otherwise, and torch's convolution goes through memory before the rest follows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.autotune import Trial
from yolov4_fast.engines.cuda.device import Run
from yolov4_fast.engines.cuda.fp8 import FP8, LARGEST
from yolov4_fast.engines.cuda.kernels import Kernels
from yolov4_fast.engines.cuda.numbers import Filters
from yolov4_fast.engines.cuda.plan import Step, View
from yolov4_fast.engines.cuda.scratch import Scratch

# One unit in the last place and more; of FP8, as nothing follows the rounding, half of one.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-15, FP8: 2.0**-4}
# By the type of what is summed. float32 convolutions may be transformed (Winograd), but TF32, off
# by 2^-11, is found out. Sums of FP8 products keep 14 bits on Hopper.
SUM = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-15, FP8: 2.0**-7}
SMALLEST_FP8 = 2.0**-9  # step of e4m3 near zero
SPREAD_FP8 = 32.0  # standard deviation of random e4m3, of which the largest is 448
SEED = 4


class StepTrial(Trial):
    """Memory of its own for one step; see `Trial`."""

    def __init__(self, kernels: Kernels, step: Step, batch: int) -> None:
        self._step = step
        self._device = kernels.device
        plan, dtypes = kernels.plan, kernels.dtypes
        used = {view.buffer for view in (*step.reads, *step.writes)}
        self._buffers = {
            number: torch.full(
                (batch, plan.buffers[number].height, plan.buffers[number].width,
                 plan.buffers[number].channels),
                torch.nan,
                dtype=torch.float32 if dtypes[number].itemsize == 1 else dtypes[number],
                device=kernels.device.torch_device,
            ).to(dtypes[number])
            for number in used
        }  # fmt: skip
        generator = torch.Generator(kernels.device.torch_device).manual_seed(SEED)
        for view in step.reads:
            target = self.tensor(view)
            values = torch.randn(target.shape, generator=generator, device=target.device)
            target.copy_(values * SPREAD_FP8 if target.dtype == FP8 else values)
        self._images = sorted({0, min(1, batch - 1), batch // 2, batch - 1})
        self._end = {view: _end(kernels, view) for view in step.writes}
        self._expected, self._allowed = self._definition(kernels.filters)
        self._kernels, self._batch = kernels, batch
        self.names = kernels.names(step, batch)

    def make(self, name: str) -> Run:
        scratch = Scratch(self._device.torch_device)
        with self._device.active():
            return self._kernels.make(name, self._step, self._batch, self.tensor, scratch)

    def problem(self, run: Run) -> str | None:
        for view in self._step.writes:
            self.tensor(view).fill_(torch.nan)
        before = {view.buffer: self._buffers[view.buffer].clone() for view in self._step.writes}
        run()
        self._device.synchronize()
        for view in self._step.writes:
            problem = self._compare(view, self.tensor(view))
            if problem:
                return problem
        return self._trespass(before)

    def tensor(self, view: View) -> Tensor:
        return self._buffers[view.buffer][..., view.offset : view.end]

    def _definition(self, filters: Filters) -> tuple[dict[View, Tensor], dict[View, Tensor]]:
        """For some of the images what is right, and how far off that a result may be; float32."""
        step = self._step
        sources = {view: self.tensor(view)[self._images].float() for view in step.reads}

        def outs() -> dict[View, Tensor]:
            return {
                view: torch.empty_like(self.tensor(view)[self._images], dtype=torch.float32)
                for view in step.writes
            }

        expected, plain = outs(), outs()
        filters.unrounded(step, (sources | expected).__getitem__)
        sums = filters.magnitudes(step, (sources | plain).__getitem__)
        allowed = {}
        for view, value in expected.items():
            dtype = self.tensor(view).dtype
            if dtype == FP8:
                value.clamp_(-LARGEST, LARGEST)
            if not sums:  # maxima and copies are exact
                allowed[view] = torch.zeros_like(value)
                continue
            x = plain[view]
            rms = x.square().mean((0, 1, 2)).sqrt()
            summed = SUM[self.tensor(step.reads[0]).dtype]
            allowed[view] = ROUNDING[dtype] * value.abs() + summed * (x.abs() + rms)
            if dtype == FP8:
                allowed[view] += SMALLEST_FP8
        return expected, allowed

    def _compare(self, view: View, out: Tensor) -> str | None:
        missing = int(out.float().isnan().sum())
        if missing:
            return f"{missing} of {out.numel()} values are NaN or were not written"
        expected, found = self._expected[view], out[self._images].float()
        off = (found - expected).abs()
        right = (off <= self._allowed[view]) | (found == expected.to(out.dtype).float())
        if bool(right.all()):
            return None
        at = int(torch.where(right, 0.0, off).argmax())
        worst, truth = float(off.flatten()[at]), float(expected.flatten()[at])
        return (
            f"{int((~right).sum())} of {right.numel()} values are off, the worst by {worst:.3g} "
            f"where {truth:.3g} is right"
        )

    def _trespass(self, before: Mapping[int, Tensor]) -> str | None:
        """Whether anything beside the outputs was written to; `before`: their buffers before."""
        for view in self._step.writes:
            inside = slice(view.offset, self._end[view])
            before[view.buffer][..., inside] = self._buffers[view.buffer][..., inside]
        for number, old in before.items():
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[old.itemsize]
            if not torch.equal(old.view(bits), self._buffers[number].view(bits)):
                return "it wrote beyond its output"
        return None


def _end(kernels: Kernels, view: View) -> int:
    """Where a view ends, with the channels behind it that belong to no view of the plan."""
    plan = kernels.plan
    views = (
        plan.image, *plan.maps, *(v for step in plan.steps for v in (*step.reads, *step.writes))
    )  # fmt: skip
    last = max(other.end for other in views if other.buffer == view.buffer)
    return plan.buffers[view.buffer].channels if view.end == last else view.end
