"""Kernels of single steps: what is told apart, what is offered, and that a trial finds each way of
being wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from yolov4_fast.engines.cuda.autotune import KernelWarning, tune
from yolov4_fast.engines.cuda.choices import Choices
from yolov4_fast.engines.cuda.compilation import compile_ahead
from yolov4_fast.engines.cuda.cudnn_plans import PlanStore
from yolov4_fast.engines.cuda.cudnn_problem import Problem
from yolov4_fast.engines.cuda.fp8 import FP8, Scales
from yolov4_fast.engines.cuda.kernels import Kernels
from yolov4_fast.engines.cuda.numbers import Filters, Types
from yolov4_fast.engines.cuda.plan import (
    Buffer,
    Combine,
    Convolution,
    Plan,
    Pool,
    PyramidPool,
    Step,
    Upsample,
    View,
)
from yolov4_fast.engines.cuda.scratch import Scratch
from yolov4_fast.engines.cuda.trial import StepTrial
from yolov4_fast.ops.activation import activation_code
from yolov4_fast.ops.kernels.ahead import Binary
from yolov4_fast.ops.kernels.convolution import binary

CPU = torch.device("cpu")
STEPS = (
    *("conv", "strided", "grouped", "residual", "sum", "product", "weighted", "prelu"),
    *("pool", "pyramid", "upsample"),
)


def plan_of(*names: str) -> Plan:
    """Steps of each kind, one after the other, with slices, strides and spare channels."""
    half, quarter = 1, 2
    buffers = (
        Buffer(8, 6, 3),  # the image
        Buffer(8, 6, 24),  # half: [0, 8) and [8, 20) in use, the last 4 spare
        Buffer(4, 3, 40),  # quarter
        Buffer(8, 6, 16),
    )
    image, a, b = View(0, 0, 3), View(half, 0, 8), View(half, 8, 12)
    c = [View(quarter, 10 * n, 10) for n in range(4)]
    d = View(3, 0, 12)
    maps = (View(half, 0, 20), View(quarter, 0, 40), d)

    def conv(source: View, out: View, **values: object) -> Convolution:
        settings = dict(
            layers=(0,), weights=(0,), residual=None, size=3, stride=1, padding=1, groups=1,
            activation="mish",
        )  # fmt: skip
        return Convolution(source=source, out=out, **(settings | values))  # type: ignore[arg-type]

    steps: dict[str, Step] = {
        "conv": conv(image, a),
        "strided": conv(a, c[0], stride=2, activation="leaky", weights=(1,)),
        "grouped": conv(a, b, size=1, padding=0, groups=2, activation="linear", weights=(2,)),
        "residual": conv(a, b, residual=d, size=1, padding=0, activation="swish", weights=(3,)),
        "sum": Combine(
            layers=(4,), sources=(c[0], c[1], c[2]), out=c[3], product=False, activation="relu"
        ),
        "product": Combine(
            layers=(5,), sources=(c[0], c[1]), out=c[2], product=True, activation="linear"
        ),
        "weighted": Combine(
            layers=(9,), sources=(c[0], c[2]), out=c[3], product=False, activation="mish", row=1
        ),
        "prelu": Combine(
            layers=(10,), sources=(a,), out=View(3, 0, 8), product=False, activation="prelu"
        ),
        "pool": Pool(layers=(6,), source=b, out=View(quarter, 20, 12), size=2, stride=2,
                     pads=(0, 1, 0, 1)),
        "pyramid": PyramidPool(layers=(7,), source=c[0], outs=(c[1], c[2], c[3]), sizes=(3, 5, 7)),
        "upsample": Upsample(layers=(8,), source=View(quarter, 3, 12), out=d, factor=2),
    }  # fmt: skip
    return Plan(buffers, tuple(steps[name] for name in names or STEPS), image, maps)


def state_of(plan: Plan) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for step in plan.steps:
        if isinstance(step, Convolution):
            (layer,), filters = step.weights, step.out.channels
            shape = (filters, step.source.channels // step.groups, step.size, step.size)
            state[f"layers.{layer}.conv.weight"] = torch.randn(shape, generator=generator) / 3
            state[f"layers.{layer}.conv.bias"] = torch.randn(filters, generator=generator)
    state["layers.9.weights"] = torch.randn(4, 10, generator=generator)
    state["layers.10.slope"] = torch.randn(8, generator=generator)
    return state


@pytest.fixture
def make(cpu_device) -> Callable[..., Kernels]:
    def kernels(
        *names: str, precision: str = "f32", backends: tuple[str, ...] = ("torch",)
    ) -> Kernels:
        plan = plan_of(*names)
        scales = Scales((None, 0.02, 0.03, 0.01)) if precision == "fp8" else None
        types = Types(plan, precision, scales)
        return Kernels(Filters.of(types, state_of(plan), CPU), cpu_device(backends))

    return kernels


def test_keys_tell_apart_what_matters(make: Callable[..., Kernels]) -> None:
    kernels = make()
    steps = kernels.plan.steps
    assert len({kernels.key(step, batch) for step in steps for batch in (1, 2)}) == 2 * len(steps)
    assert kernels.key(steps[0], 1) == make().key(make().plan.steps[0], 1)
    assert kernels.key(steps[0], 1) != make(precision="fp16").key(steps[0], 1)
    assert kernels.key(steps[0], 4).shape == (
        "convolution 3x3/1 pad 1 mish f32 8x6x3 -> f32 8x6x8 of 24"
    )
    assert "@8" in kernels.key(steps[1], 4).shape or "@" not in kernels.key(steps[1], 4).shape


def test_what_is_offered(make: Callable[..., Kernels]) -> None:
    kernels = make("conv", "grouped", "pool", backends=("triton", "torch"))
    conv, grouped, pool = (kernels.names(step, 2) for step in kernels.plan.steps)
    assert conv[-1] == "torch" and len(conv) > 1
    assert all(name.startswith("triton ") for name in conv[:-1])
    assert grouped == ["torch"]
    assert pool == ["triton", "torch"]
    for step, names in zip(kernels.plan.steps, (conv, grouped, pool), strict=True):
        assert all(kernels.knows(name, step) for name in names)
        for unknown in (
            "triton 7x7x7 warps 4 stages 3 split 1 group 8",
            "triton 64x64x32",
            "cudnn eng4_k24=3",
            "warp",
        ):
            assert not kernels.knows(unknown, step)
            with pytest.raises(KeyError):
                kernels.make(unknown, step, 2, lambda view: torch.empty(1), Scratch(CPU))
    plain = make("conv")
    assert plain.names(plain.plan.steps[0], 2) == ["torch"]
    assert not plain.knows("triton", plain.plan.steps[0])


@pytest.mark.parametrize("precision", ["f32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_torch_computes_every_step(
    make: Callable[..., Kernels], name: str, batch: int, precision: str
) -> None:
    kernels = make(name, precision=precision)
    trial = StepTrial(kernels, kernels.plan.steps[0], batch)
    assert trial.names == ["torch"]
    run = trial.make("torch")
    assert trial.problem(run) is None
    assert trial.problem(run) is None  # again: the sources are as they were


@pytest.mark.parametrize("precision", ["f32", "fp16"])
@pytest.mark.parametrize("name", STEPS)
def test_our_kernels_compute_every_step(
    make: Callable[..., Kernels], name: str, precision: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter runs only where there is no GPU")
    kernels = make(name, precision=precision, backends=("triton", "torch"))
    trial = StepTrial(kernels, kernels.plan.steps[0], 2)
    assert len(trial.names) > 1 or name == "grouped"
    for kernel in trial.names:
        assert trial.problem(trial.make(kernel)) is None, kernel


def test_weights_of_sums_are_float32_and_their_own(make: Callable[..., Kernels]) -> None:
    """In every precision; of a step those of its sources, and a wrong one is found out."""
    for precision in ("f32", "fp16", "fp8"):
        kernels = make("conv", "weighted", "prelu", precision=precision)
        _, weighted, prelu = kernels.plan.steps
        state = state_of(kernels.plan)
        rows, none = kernels.filters.weights[weighted.key]
        assert torch.equal(rows, state["layers.9.weights"]) and none.numel() == 0
        none, slopes = kernels.filters.weights[prelu.key]
        assert torch.equal(slopes, state["layers.10.slope"]) and none.numel() == 0
        least = 4 * (2 * 10 + 8) + sum(t.numel() for t in state.values())
        assert kernels.filters.types.weight_bytes(state) >= least
    kernels = make("weighted")
    (step,) = kernels.plan.steps
    trial = StepTrial(kernels, step, 2)
    run = trial.make("torch")
    kernels.filters.weights[step.key][0].mul_(1.01)
    assert "values are off" in (trial.problem(run) or "")


Break = Callable[[Tensor, Tensor], None]  # of an output and its whole buffer


@pytest.mark.parametrize("name", ["conv", "residual", "pool", "sum", "upsample"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda out, buffer: out[-1, -1, -1, -1:].fill_(torch.nan), "1 of .* NaN or were not"),
        (lambda out, buffer: out[0].fill_(torch.nan), "values are NaN"),
        (lambda out, buffer: out[1, 2, 1, 3:4].add_(0.05), "1 of .* off, the worst by 0.05"),
        (lambda out, buffer: out.mul_(1 + 2**-10), "values are off"),  # as TF32 would be
        (lambda out, buffer: out.copy_(out.flip(1)), "values are off"),
        (lambda out, buffer: out.copy_(out.roll(1, 0)), "values are off"),
    ],
)
def test_a_wrong_result_is_found(
    make: Callable[..., Kernels], name: str, spoil: Break, says: str
) -> None:
    kernels = make(name)
    (step,) = kernels.plan.steps
    trial = StepTrial(kernels, step, 2)
    right = trial.make("torch")

    def run() -> None:
        right()
        view = step.writes[0]
        spoil(trial.tensor(view), trial.tensor(view))

    assert trial.problem(right) is None
    problem = trial.problem(run)
    assert problem is not None
    assert pytest.importorskip("re").search(says, problem), problem


@pytest.mark.parametrize(("channel", "allowed"), [(0, False), (7, False), (20, True), (23, True)])
def test_only_spare_channels_may_be_written_beside_the_output(
    make: Callable[..., Kernels], channel: int, allowed: bool
) -> None:
    kernels = make("residual", "grouped")  # write [8, 20) of 24 channels, where [20, 24) are spare
    step = kernels.plan.steps[0]
    trial = StepTrial(kernels, step, 2)
    right = trial.make("torch")

    def run() -> None:
        right()
        trial.tensor(View(1, channel, 1))[1, 3, 2] = 1.0

    assert trial.problem(run) == (None if allowed else "it wrote beyond its output")


def test_half_precision_that_rounds_twice_is_right(make: Callable[..., Kernels]) -> None:
    kernels = make("conv", precision="fp16")
    (step,) = kernels.plan.steps
    trial = StepTrial(kernels, step, 2)
    right = trial.make("torch")

    def run(factor: float) -> None:
        right()
        trial.tensor(step.writes[0]).mul_(factor)

    assert trial.problem(lambda: run(1 + 2**-10)) is None
    assert trial.problem(lambda: run(1 + 2**-7)) is not None


@pytest.mark.parametrize("name", ["conv", "strided", "residual"])
@pytest.mark.parametrize(
    ("spoil", "allowed"),
    [
        (lambda x: x * (1 + 2**-9), True),  # rounds to the same, or over an edge to the next
        (lambda x: x * 1.25, False),  # a scale that is wrong
        (lambda x: x * 0.8, False),
        (lambda x: x + 3, False),
        (lambda x: x.round(), False),
    ],
)
def test_what_fp8_may_be_off(
    make: Callable[..., Kernels], name: str, spoil: Callable[[Tensor], Tensor], allowed: bool
) -> None:
    kernels = make(name, precision="fp8")
    (step,) = kernels.plan.steps
    trial = StepTrial(kernels, step, 2)
    assert trial.names == ["torch"]
    exact = {view: trial.tensor(view).float() for view in step.reads}
    exact |= {view: torch.empty(trial.tensor(view).shape) for view in step.writes}
    kernels.filters.unrounded(step, exact.__getitem__)

    def run() -> None:
        out = trial.tensor(step.writes[0])
        assert out.dtype == FP8
        out.copy_(spoil(exact[step.writes[0]]).clamp(-448, 448))

    assert (trial.problem(run) is None) == allowed


def test_in_fp8_ours_run_only_what_is_half(make: Callable[..., Kernels]) -> None:
    kernels = make("conv", "pool", precision="fp8", backends=("triton", "torch"))
    conv, pool = kernels.plan.steps
    assert kernels.names(conv, 1) == ["torch"]
    assert kernels.names(pool, 1) == ["triton", "torch"]
    assert (
        kernels.key(conv, 1).shape == "convolution 3x3/1 pad 1 mish fp16 8x6x3 -> fp8 8x6x8 of 24"
    )


def test_a_kernel_that_disagrees_does_not_win(
    make: Callable[..., Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Triton configuration that a compiler got wrong: fast, and off by a row."""
    kernels = make("conv", backends=("triton", "torch"))
    (step,) = kernels.plan.steps

    def wrong(source: Tensor, weight: Tensor, bias: Tensor, out: Tensor, **_: object) -> None:
        out.zero_()

    monkeypatch.setattr("yolov4_fast.engines.cuda.kernels.convolution", wrong)
    key, choices = kernels.key(step, 1), Choices({})
    with pytest.warns(KernelWarning, match="the kernel triton .* is not used"):
        tune(
            {key: lambda: StepTrial(kernels, step, 1)},
            choices,
            lambda run: 1.0,
            measure=True,
            progress=False,
        )
    assert choices.table[key].kernel == "torch"


class FakeCudnn:
    """Two plans for every convolution; compiling is counted."""

    properties = "{}"

    def __init__(self) -> None:
        self.compiled: list[tuple[Problem, str]] = []
        self.asked = 0

    def plan_names(self, problem: Problem) -> list[str]:
        self.asked += 1
        return ["eng4_k24=3", "eng4_k24=9"]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Stands in for cuDNN's compiled plans; returns what each run was given."""
    runs: list[dict[str, object]] = []

    class Fused:
        workspace_bytes = 48

        def __init__(self, cudnn: FakeCudnn, problem: Problem, name: str, store: object) -> None:
            cudnn.compiled.append((problem, name))
            self.problem = problem

        def run(self, source, weight, bias, out, residual, workspace, scales) -> None:
            given = dict(source=source, weight=weight, bias=bias, out=out, residual=residual)
            assert workspace.numel() >= self.workspace_bytes
            runs.append(given | {"problem": self.problem, "scales": scales})

    monkeypatch.setattr("yolov4_fast.engines.cuda.kernels.FusedConvolution", Fused)
    return runs


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_cudnn_plans(
    cpu_device, fused: list[dict[str, Any]], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cudnn, store = plan_of("residual", "grouped", "pool"), FakeCudnn(), PlanStore(Path("x"))
    scales = Scales((None, 0.02, 0.03, 0.01)) if precision == "fp8" else None
    filters = Filters.of(Types(plan, precision, scales), state_of(plan), CPU)
    kernels = Kernels(filters, cpu_device(), cudnn, store)  # type: ignore[arg-type]
    conv, grouped, pool = plan.steps
    assert kernels.names(conv, 3) == ["cudnn eng4_k24=3", "cudnn eng4_k24=9", "torch"]
    assert kernels.names(grouped, 3) == kernels.names(pool, 3) == ["torch"]
    assert kernels.knows("cudnn eng4_k24=55", conv) and not kernels.knows("cudnn x", pool)

    buffers = {n: torch.zeros(3, b.height, b.width, b.channels) for n, b in enumerate(plan.buffers)}
    for plan_name in ("eng4_k24=9", "eng4_k24=9", "eng4_k24=55"):  # the last from another batch
        kernels.make(
            f"cudnn {plan_name}", conv, 3,
            lambda view: buffers[view.buffer][..., view.offset : view.end], Scratch(CPU),
        )()  # fmt: skip
    assert [name for _, name in cudnn.compiled] == ["eng4_k24=9", "eng4_k24=55"]
    half, low = torch.float16, torch.float8_e4m3fn if precision == "fp8" else torch.float16
    assert fused[0]["problem"] == Problem(
        batch=3, height=8, width=6, channels=8, filters=12, size=1, stride=1, padding=0,
        activation="swish", dtype=low, out_dtype=low, source_row=24, out_row=24,
        residual_dtype=low, residual_row=16,
    )  # fmt: skip
    assert fused[0]["weight"].dtype == low and fused[0]["weight"].shape == (12, 1, 1, 8)
    assert set(fused[0]["scales"]) == set(fused[0]["problem"].scales())
    assert half == kernels.dtypes[0]

    ahead: list[tuple[Problem, str]] = []
    monkeypatch.setattr(
        "yolov4_fast.engines.cuda.kernels.compile_plans",
        lambda plans, gpu, where: ahead.extend(plans),
    )
    compile_ahead(kernels, [(conv, 3), (conv, 1), (grouped, 1), (pool, 1)], 2, progress=False)
    assert [(problem.batch, name) for problem, name in ahead] == [
        (batch, name) for batch in (3, 1) for name in ("eng4_k24=3", "eng4_k24=9")
    ]
    assert cudnn.asked == 2  # once a problem


def test_kernels_are_compiled_ahead_once_a_kind(
    make: Callable[..., Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is what the launches will look for, whatever the size of the maps."""
    told: list[tuple[set[Binary], int]] = []

    def compile_binaries(
        binaries: Iterable[Binary], sm: int, processes: int, *, progress: bool
    ) -> None:
        told.append((set(binaries), processes))

    monkeypatch.setattr("yolov4_fast.ops.kernels.ahead.compile_ahead", compile_binaries)
    kernels = make("conv", "strided", "residual", "grouped", "pool", backends=("triton", "torch"))
    steps = [(step, batch) for step in kernels.plan.steps for batch in (1, 1, 2)]
    count = compile_ahead(kernels, steps, 3, progress=False)
    launched: set[Binary] = set()
    for step, batch in steps:
        if isinstance(step, Convolution):
            for config in kernels.configs(step, batch).values():
                sizes = [kernels.plan.buffers[view.buffer] for view in (*step.reads, *step.writes)]
                tensors = [
                    torch.empty(batch, size.height, size.width, size.channels)[
                        ..., view.offset : view.end
                    ]
                    for size, view in zip(sizes, (*step.reads, *step.writes), strict=True)
                ]
                source, *residual, out = tensors
                launched.add(
                    binary(
                        source,
                        *kernels.filters.weights[step.weights[0]],
                        residual[0] if residual else None,
                        out,
                        step.stride,
                        step.padding,
                        activation_code(step.activation),
                        config,
                    )
                )
    assert told == [(launched, 3)] and count == len(launched) > 1
    assert compile_ahead(make("pool"), [(make("pool").plan.steps[0], 1)], 2, progress=False) == 0


def test_scratch_is_as_large_as_the_largest_need() -> None:
    scratch = Scratch(CPU)
    scratch.need(10)
    scratch.need(1000)
    scratch.need(5)
    block = scratch.block()
    assert (block.numel(), block.dtype) == (1000, torch.uint8)
    assert scratch.block().data_ptr() == block.data_ptr()
    scratch.need(1000)
    with pytest.raises(RuntimeError, match="after others had run"):
        scratch.need(1001)
