"""What a plan cannot run faster than: the bytes and operations of each step over what a copy and a
matrix product reach on the same device in the same run.

A step reads each of its inputs and its weights once and writes its output once; a convolution does
2 operations a multiply-add. The larger of the two times is the step's floor, the sum over the steps
the plan's. Caches can beat the floor of a memory-bound step whose inputs were just written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from yolov4_fast.engines.cuda.plan import Convolution, Plan, Step, View


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a copy (read and written both counted) and operations per second of a
    matrix product.
    """

    copy: float
    matrix: float


@dataclass(frozen=True)
class Cost:
    """What one step must move and compute for one batch."""

    read: int  # bytes
    written: int  # bytes
    weights: int  # bytes, whatever the batch
    operations: int

    def floor(self, rates: Rates) -> float:
        """Seconds that the step takes at least."""
        return max(self.bytes / rates.copy, self.operations / rates.matrix)

    @property
    def bytes(self) -> int:
        return self.read + self.written + self.weights


def cost(plan: Plan, step: Step, batch: int, itemsize: int) -> Cost:
    """itemsize: bytes of an activation and of a weight."""

    def size(view: View) -> int:
        buffer = plan.buffers[view.buffer]
        return batch * buffer.height * buffer.width * view.channels * itemsize

    weights = operations = 0
    if isinstance(step, Convolution):
        out = plan.buffers[step.out.buffer]
        filters = step.out.channels * step.source.channels // step.groups * step.size**2
        weights = filters * itemsize
        operations = 2 * batch * out.height * out.width * filters
    return Cost(sum(map(size, step.reads)), sum(map(size, step.writes)), weights, operations)


def costs(plan: Plan, batch: int, itemsize: int) -> list[Cost]:
    return [cost(plan, step, batch, itemsize) for step in plan.steps]


def measure_rates(device: torch.device, dtype: torch.dtype, *, gigabytes: float = 4.0) -> Rates:
    """The device's own rates now: a copy many times its cache, a product of random matrices."""
    return Rates(copy_rate(device, int(gigabytes * 2**30)), matrix_rate(device, dtype))


def copy_rate(device: torch.device, moved: int) -> float:
    """Bytes per second of a copy that reads and writes `moved` bytes in all."""
    source = torch.randint(0, 255, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return moved / time_on(device, lambda: target.copy_(source))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product of random numbers."""
    side = 8192 if device.type == "cuda" else 512
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    if dtype == torch.float8_e4m3fn:
        one, columns = torch.ones((), device=device), right.t()
        return (
            2
            * side**3
            / time_on(
                device, lambda: torch._scaled_mm(left, columns, one, one, out_dtype=torch.float16)
            )
        )
    return 2 * side**3 / time_on(device, lambda: left @ right)


def time_on(device: torch.device, function: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call, by the device's own events where it is a GPU."""
    for _ in range(3):
        function()
    return median(_time_once(device, function) for _ in range(repeats))


def _time_once(device: torch.device, function: Callable[[], object]) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
