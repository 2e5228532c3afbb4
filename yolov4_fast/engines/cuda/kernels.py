"""What can run the steps of a plan: the names of each step's kernels, and a kernel bound to memory.

    cudnn PLAN      a plan of cuDNN's for convolution, bias, activation and residual in one kernel
    triton CONFIG   our implicit GEMM in a configuration; "triton" alone for what has only one
    torch           torch's convolution, our epilogue; of other steps and in FP8 the definition

All compute what `numbers.Filters` defines. Which one a step gets is for `autotune` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.engines.cuda.choices import Key
from yolov4_fast.engines.cuda.cudnn_compile import compile_plans
from yolov4_fast.engines.cuda.cudnn_graphs import Cudnn, FusedConvolution
from yolov4_fast.engines.cuda.cudnn_plans import PlanStore
from yolov4_fast.engines.cuda.cudnn_problem import Problem
from yolov4_fast.engines.cuda.device import Device, Run
from yolov4_fast.engines.cuda.numbers import Filters, Tensors
from yolov4_fast.engines.cuda.plan import (
    Combine,
    Convolution,
    Pool,
    PyramidPool,
    Step,
    Upsample,
)
from yolov4_fast.engines.cuda.reference import Weights, vectors
from yolov4_fast.engines.cuda.scratch import Scratch
from yolov4_fast.engines.cuda.shape import shape_of
from yolov4_fast.ops.combine import combine
from yolov4_fast.ops.convolution import ConvConfig, configs_for, convolution, workspace_bytes
from yolov4_fast.ops.full_precision import full_precision
from yolov4_fast.ops.mish_bn import mish_bn
from yolov4_fast.ops.pool import max_pool, pyramid_pool
from yolov4_fast.ops.upsample import upsample
from yolov4_fast.ops.views import Implementation

CUDNN, TRITON, TORCH = "cudnn", "triton", "torch"


class Kernels:
    """For the steps of one plan on one device.

    cudnn: None to do without. store: keeps its compiled plans.
    """

    def __init__(
        self,
        filters: Filters,
        device: Device,
        cudnn: Cudnn | None = None,
        store: PlanStore | None = None,
    ) -> None:
        self.filters = filters
        self.plan = filters.types.plan
        self.dtypes = filters.types.dtypes
        self.device = device
        self._cudnn = cudnn
        self._store = store
        self._suggested: dict[Problem, list[str]] = {}
        self._fused: dict[tuple[Problem, str], FusedConvolution] = {}  # compiled once, run anywhere

    def close(self) -> None:
        """Let go of filters and compiled plans."""
        self._fused.clear()
        self.filters = Filters(self.filters.types, {})

    def key(self, step: Step, batch: int) -> Key:
        """Steps of one key take the same time in the same kernel."""
        return Key(shape_of(step, self.plan, self.dtypes), batch)

    def names(self, step: Step, batch: int) -> list[str]:
        """The kernels that may be tried for a step, likely ones first."""
        names = []
        if isinstance(step, Convolution):
            names += [f"{CUDNN} {plan}" for plan in self._plans(step, batch)]
            names += self.configs(step, batch)
        elif TRITON in self.device.backends:
            names.append(TRITON)
        if TORCH in self.device.backends:
            names.append(TORCH)
        return names

    def knows(self, name: str, step: Step) -> bool:
        """Whether a kernel that was chosen before is one of ours still, for all that is known
        without making it.
        """
        if name.startswith(f"{CUDNN} "):
            return self._cudnn is not None and isinstance(step, Convolution)
        if name.startswith(f"{TRITON} "):
            return isinstance(step, Convolution) and _config(name) is not None
        return name in self.device.backends

    def make(self, name: str, step: Step, batch: int, tensor: Tensors, scratch: Scratch) -> Run:
        """A kernel bound to the tensors of the step's views; its name may also be one that `names`
        gives for another batch. Raises KeyError for an unknown name, and whatever its library
        raises where it cannot run.
        """
        if name == TORCH and (self.filters.is_quantised(step) or not isinstance(step, Convolution)):
            return self.filters.definition(step, tensor)
        if isinstance(step, Convolution):
            return self._convolution(name, step, batch, tensor, scratch)
        if name != TRITON:
            raise KeyError(name)
        return _own(step, tensor, self.filters.weights)

    def _convolution(
        self, name: str, step: Convolution, batch: int, tensor: Tensors, scratch: Scratch
    ) -> Run:
        weight, bias = self.filters.weights[step.key]
        source, out = tensor(step.source), tensor(step.out)
        residual = None if step.residual is None else tensor(step.residual)
        if name == TORCH:
            epilogue: Implementation = "kernel" if TRITON in self.device.backends else "reference"
            return partial(_torch, step, source, weight, bias, residual, out, epilogue)
        if name.startswith(f"{CUDNN} "):
            fused = self._compiled(self._problem(step, batch), name.removeprefix(f"{CUDNN} "))
            scratch.need(fused.workspace_bytes)
            scales = self.filters.scales(step)
            return lambda: fused.run(source, weight, bias, out, residual, scratch.block(), scales)
        config = _config(name)
        if config is None:
            raise KeyError(name)
        rows, filters = batch * out.shape[1] * out.shape[2], out.shape[3]
        size = workspace_bytes(config, rows, filters)
        scratch.need(size)

        def run() -> None:
            convolution(
                source,
                weight,
                bias,
                out,
                stride=step.stride,
                padding=step.padding,
                activation=step.activation,
                residual=residual,
                config=config,
                workspace=scratch.block() if size else None,
            )

        return run

    def configs(self, step: Convolution, batch: int) -> Mapping[str, ConvConfig]:
        """The tilings of our own convolution to try, by the kernel's name."""
        if TRITON not in self.device.backends or step.groups > 1 or self.filters.is_quantised(step):
            return {}
        out, source = self.plan.buffers[step.out.buffer], step.source
        found = configs_for(
            batch * out.height * out.width,
            step.out.channels,
            step.size**2 * source.channels,
            self.device.properties.processors,
            self.dtypes[source.buffer],
            self.device.properties.sm,
        )
        return {_config_name(config): config for config in found}

    def compile_plans(self, steps: Iterable[tuple[Convolution, int]]) -> None:
        """Compile all of cuDNN's candidates for steps and batch sizes, on several processors."""
        if self._cudnn is None or self._store is None:
            return
        plans = [
            (self._problem(step, batch), plan)
            for step, batch in steps
            for plan in self._plans(step, batch)
        ]
        compile_plans(plans, self._cudnn, self._store)

    def _plans(self, step: Convolution, batch: int) -> list[str]:
        """Names of cuDNN's plans for a step."""
        if self._cudnn is None or step.groups > 1:
            return []
        problem = self._problem(step, batch)
        if problem not in self._suggested:
            self._suggested[problem] = self._cudnn.plan_names(problem)
        return self._suggested[problem]

    def _problem(self, step: Convolution, batch: int) -> Problem:
        source, out = self.plan.buffers[step.source.buffer], self.plan.buffers[step.out.buffer]
        residual = None if step.residual is None else step.residual.buffer
        return Problem(
            batch=batch,
            height=source.height,
            width=source.width,
            channels=step.source.channels,
            filters=step.out.channels,
            size=step.size,
            stride=step.stride,
            padding=step.padding,
            activation=step.activation,
            dtype=self.dtypes[step.source.buffer],
            out_dtype=self.dtypes[step.out.buffer],
            source_row=source.channels,
            out_row=out.channels,
            residual_dtype=None if residual is None else self.dtypes[residual],
            residual_row=None if residual is None else self.plan.buffers[residual].channels,
        )

    def _compiled(self, problem: Problem, plan: str) -> FusedConvolution:
        if self._cudnn is None:
            raise KeyError(plan)
        if (problem, plan) not in self._fused:
            self._fused[problem, plan] = FusedConvolution(self._cudnn, problem, plan, self._store)
        return self._fused[problem, plan]


def _own(step: Step, tensor: Tensors, weights: Weights) -> Run:
    """The Triton kernel of a step that has a single one."""
    match step:
        case Pool():
            source, out = tensor(step.source), tensor(step.out)
            return _bound(max_pool, source, out, step.size, step.stride, step.pads)
        case PyramidPool():
            outs = [tensor(view) for view in step.outs]
            return _bound(pyramid_pool, tensor(step.source), outs, step.sizes)
        case Upsample():
            return _bound(upsample, tensor(step.source), tensor(step.out), step.factor)
        case Combine():
            sources = [tensor(view) for view in step.sources]
            rows, slopes = vectors(step, weights)
            run = partial(combine, weights=rows, slopes=slopes)
            return _bound(run, sources, tensor(step.out), step.product, step.activation)
    raise TypeError(f"no kernel for {type(step).__name__}")


def _bound(op: Callable[..., object], *arguments: object) -> Run:
    def run() -> None:
        op(*arguments)

    return run


def _torch(
    step: Convolution,
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    epilogue: Implementation,
) -> None:
    """torch's convolution into memory of its own, then the rest in one pass."""
    with full_precision():
        x = F.conv2d(
            source.permute(0, 3, 1, 2),
            weight.permute(0, 3, 1, 2),
            None,
            step.stride,
            step.padding,
            groups=step.groups,
        )
    x = x.permute(0, 2, 3, 1).contiguous()  # torch picks the layout of its result itself
    mish_bn(x, None, bias, step.activation, residual, out, implementation=epilogue)


def _config_name(config: ConvConfig) -> str:
    """All of a configuration, as `_config` reads it."""
    return (
        f"{TRITON} {config.block_m}x{config.block_n}x{config.block_k} warps {config.num_warps} "
        f"stages {config.num_stages} split {config.split_k} group {config.group_m}"
    )


def _config(name: str) -> ConvConfig | None:
    """The configuration of a name; None where it is none."""
    numbers = re.fullmatch(
        rf"{TRITON} (\d+)x(\d+)x(\d+) warps (\d+) stages (\d+) split (\d+) group (\d+)", name
    )
    try:
        return None if numbers is None else ConvConfig(*map(int, numbers.groups()))
    except ValueError:
        return None
