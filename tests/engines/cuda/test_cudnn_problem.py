"""Problems for cuDNN without a GPU or cuDNN: what their graphs compute, by a stand-in that computes
them with torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.engines.cuda.cudnn_problem import (
    BIAS,
    CONSTANTS,
    FP8,
    OUT,
    OUT_SCALE,
    RESCALE,
    RESIDUAL,
    RESIDUAL_SCALE,
    SOURCE,
    WEIGHT,
    Problem,
    describe,
)
from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference

PROBLEM = Problem(
    batch=2,
    height=7,
    width=9,
    channels=16,
    filters=24,
    size=3,
    stride=1,
    padding=1,
    activation="mish",
    dtype=torch.float16,
    out_dtype=torch.float16,
    source_row=16,
    out_row=24,
)


class Value:
    """A tensor of a `TorchGraph`; its setters do what cuDNN's do."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("set_"):
            raise AttributeError(name)

        def set_(argument: Any) -> Value:
            self.told[name.removeprefix("set_")] = argument
            return self

        return set_


class TorchGraph:
    """Takes the operations of a graph and computes them at once, in float32."""

    def __init__(self, storages: dict[int, Tensor]) -> None:
        self.storages = storages  # flat, by the tensors' numbers
        self.result: Value | None = None
        self.used: set[int] = set()

    def tensor(self, dim: list[int], stride: list[int], data_type: Any, uid: int) -> Value:
        assert uid not in self.used, f"tensor {uid} is told twice"
        self.used.add(uid)
        return Value(self.storages[uid].as_strided(dim, stride).float())

    def conv_fprop(
        self, x: Value, w: Value, padding: list[int], stride: list[int], dilation: list[int]
    ) -> Value:
        return Value(F.conv2d(x.value, w.value, None, stride, padding, dilation))

    def relu(self, x: Value, negative_slope: float = 0.0) -> Value:
        self.result = Value(F.leaky_relu(x.value, negative_slope))
        return self.result

    def __getattr__(self, name: str) -> Any:
        operation = {
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "div": torch.div,
            "min": torch.minimum,
            "exp": torch.exp,
            "neg": torch.neg,
        }[name]

        def compute(*values: Value) -> Value:
            self.result = Value(operation(*(value.value for value in values)))
            return self.result

        return compute


def storages(problem: Problem, seed: int = 0) -> dict[int, Tensor]:
    """Random tensors for all that a problem names, flat and in their own types."""
    generator = torch.Generator().manual_seed(seed)

    def random(count: int, dtype: torch.dtype | None) -> Tensor:
        return torch.randn(count, generator=generator).to(dtype)

    batch, height, width, filters = problem.out_shape
    cells = batch * height * width
    found = {
        SOURCE: random(batch * problem.height * problem.width * problem.source_row, problem.dtype),
        WEIGHT: random(filters * problem.size**2 * problem.channels, problem.dtype),
        BIAS: random(filters, torch.float32),
        **{number: torch.tensor([value]) for number, value in CONSTANTS.items()},
    }
    if problem.residual_row is not None:
        found[RESIDUAL] = random(cells * problem.residual_row, problem.residual_dtype)
    for number in problem.scales():
        found[number] = torch.rand(filters, generator=generator) + 0.5
    return found


def expected(problem: Problem, found: dict[int, Tensor]) -> Tensor:
    """[B, filters, h, w] float32 by the formula of the module."""

    def image(number: int, rows: tuple[int, int], row: int, channels: int) -> Tensor:
        full = found[number].float().view(problem.batch, *rows, row)
        return full[..., :channels].permute(0, 3, 1, 2)

    _, height, width, filters = problem.out_shape
    size, channels = problem.size, problem.channels
    weight = found[WEIGHT].float().view(filters, size, size, channels).permute(0, 3, 1, 2)
    source = image(SOURCE, (problem.height, problem.width), problem.source_row, channels)
    x = F.conv2d(source, weight, None, problem.stride, problem.padding)
    if RESCALE in found:
        x = x * found[RESCALE].view(1, -1, 1, 1)
    x = activate_reference(x + found[BIAS].view(1, -1, 1, 1), problem.activation)
    if problem.residual_row is not None:
        residual = image(RESIDUAL, (height, width), problem.residual_row, filters)
        x = x + residual * (found[RESIDUAL_SCALE][0] if RESIDUAL_SCALE in found else 1.0)
    return x * (found[OUT_SCALE][0] if OUT_SCALE in found else 1.0)


def computed(problem: Problem, found: dict[int, Tensor]) -> tuple[Tensor, TorchGraph]:
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    graph = TorchGraph(found)
    describe(graph, problem)
    assert graph.result is not None
    return graph.result.value, graph


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stride": 2, "height": 13, "width": 6, "source_row": 40, "out_row": 32},
        {"size": 1, "padding": 0, "residual_dtype": torch.float16, "residual_row": 48},
        {"channels": 3, "source_row": 3, "batch": 1},
        {"dtype": FP8, "out_dtype": FP8, "residual_dtype": FP8, "residual_row": 24},
        {"dtype": FP8, "residual_dtype": torch.float16, "residual_row": 32},
        {"out_dtype": FP8, "out_row": 64},
    ],
    ids=str,
)
def test_what_a_graph_computes(activation: str, change: dict[str, Any]) -> None:
    problem = dataclasses.replace(PROBLEM, activation=activation, **change)
    found = storages(problem)
    value, graph = computed(problem, found)
    torch.testing.assert_close(value, expected(problem, found), rtol=1e-5, atol=1e-5)
    asked = {SOURCE, WEIGHT, BIAS, *problem.constants(), *problem.scales()}
    assert graph.used == asked | ({RESIDUAL} if problem.residual_row is not None else set())


def test_the_output_is_told_its_strides() -> None:
    problem = dataclasses.replace(PROBLEM, activation="linear", out_row=40, stride=2)
    _, graph = computed(problem, storages(problem))
    assert graph.result is not None
    told = graph.result.told
    assert told["dim"] == [2, 24, 4, 5]
    assert told["stride"] == [4 * 5 * 40, 1, 5 * 40, 40]
    assert told["output"] is True and told["uid"] == OUT


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_activations_of_extreme_values(activation: str) -> None:
    """Sums of half-precision products reach far: no NaN, no infinity, and the right limits."""
    values = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 89.0, -89.0, 65504.0, -65504.0, 1e30, -1e30]
    problem = dataclasses.replace(
        PROBLEM, batch=1, height=1, width=1, channels=1, filters=len(values), size=1, padding=0,
        source_row=1, out_row=len(values), activation=activation,
    )  # fmt: skip
    found = storages(problem)
    found[SOURCE] = torch.zeros(1, dtype=torch.float16)
    found[BIAS] = torch.tensor(values)
    value, _ = computed(problem, found)
    assert torch.isfinite(value).all()
    exact = activate_reference(torch.tensor(values, dtype=torch.float64), activation).float()
    smallest = 1e-7 if activation == "selu" else 1e-35  # exp(x) - 1 near zero, see `_activate`
    torch.testing.assert_close(value.flatten(), exact, rtol=1e-5, atol=smallest)


# ---------------------------------------------------------------- problems


def views(**change: Any) -> dict[str, Any]:
    source = torch.zeros(2, 8, 6, 32, dtype=torch.float16)[..., 8:24]
    return {
        "source": source,
        "weight": torch.zeros(24, 3, 3, 16, dtype=torch.float16),
        "out": torch.zeros(2, 4, 3, 40, dtype=torch.float16)[..., :24],
        "stride": 2,
        "padding": 1,
        "activation": "leaky",
    } | change


def test_a_problem_of_tensors() -> None:
    residual = torch.zeros(2, 4, 3, 24, dtype=torch.float16)
    problem = Problem.of(**views(residual=residual))
    assert problem.out_shape == (2, 4, 3, 24)
    assert (problem.source_row, problem.out_row, problem.residual_row) == (32, 40, 24)
    assert problem.scales() == ()
    assert hash(problem) == hash(Problem.of(**views(residual=residual)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(24, 3, 3, 8, dtype=torch.float16)}, r"\[O, k, k, 16\]"),
        ({"weight": torch.zeros(24, 3, 3, 16)}, "torch.float16"),
        ({"weight": torch.zeros(24, 3, 16, 3).half().transpose(2, 3)}, "contiguous"),
        ({"out": torch.zeros(2, 8, 6, 24).half()}, r"\[2, 4, 3, 24\], not \[2, 8, 6, 24\]"),
        ({"out": torch.zeros(2, 24, 4, 3).half().permute(0, 2, 3, 1)}, "the output must be"),
        ({"residual": torch.zeros(2, 4, 3, 8).half()}, "the residual must be"),
        ({"activation": "gelu"}, "gelu"),
        ({"out": torch.zeros(2, 4, 3, 24, dtype=torch.int8)}, "torch.int8"),
    ],
    ids=str,
)
def test_tensors_that_make_no_problem(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem.of(**views(**change))


def test_a_residual_has_type_and_stride() -> None:
    with pytest.raises(ValueError, match="both"):
        dataclasses.replace(PROBLEM, residual_row=8)
