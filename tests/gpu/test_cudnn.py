"""cuDNN's fused convolutions on a GPU, against their definition in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.engines.cuda.cudnn_compile import compile_plans
from yolov4_fast.engines.cuda.cudnn_graphs import Cudnn, FusedConvolution, available
from yolov4_fast.engines.cuda.cudnn_plans import PlanName, PlanStore
from yolov4_fast.engines.cuda.cudnn_problem import Problem
from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(available() is not None, reason=str(available())),
]
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(scope="module")
def cudnn() -> Cudnn:
    return Cudnn(torch.device("cuda", torch.cuda.current_device()))


class Case:
    """Random tensors of a convolution; rows of the buffers are wider than what is used of them."""

    def __init__(
        self,
        batch: int = 2,
        height: int = 14,
        width: int = 11,
        channels: int = 32,
        filters: int = 48,
        size: int = 3,
        stride: int = 1,
        activation: str = "mish",
        residual: bool = False,
        dtype: torch.dtype = torch.float16,
        spare: int = 16,
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        padding = size // 2
        rows, columns = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        self.buffer = torch.full(
            (batch, rows, columns, filters + 2 * spare), torch.nan, dtype=dtype, device="cuda"
        )
        out = self.buffer[..., spare : spare + filters]
        source = random(batch, height, width, channels + spare).to(dtype)[..., spare:]
        weight = random(filters, size, size, channels).div(size * channels**0.5).to(dtype)
        added = random(batch, rows, columns, filters + spare).to(dtype)[..., :filters]
        self.spare, self.filters, self.dtype, self.activation = spare, filters, dtype, activation
        self.tensors: dict[str, Any] = {
            "source": source,
            "weight": weight,
            "bias": random(filters),
            "out": out,
            "residual": added if residual else None,
        }
        self.problem = Problem.of(
            source,
            weight,
            out,
            stride=stride,
            padding=padding,
            activation=activation,
            residual=self.tensors["residual"],
        )

    def run(self, fused: FusedConvolution) -> Tensor:
        self.buffer.fill_(torch.nan)
        workspace = torch.full((fused.workspace_bytes,), 255, dtype=torch.uint8, device="cuda")
        fused.run(**self.tensors, workspace=workspace)
        torch.cuda.synchronize()
        return self.tensors["out"].clone()

    def check(self, found: Tensor) -> None:
        problem, tensors = self.problem, self.tensors
        x = F.conv2d(
            tensors["source"].double().permute(0, 3, 1, 2),
            tensors["weight"].double().permute(0, 3, 1, 2),
            tensors["bias"].double(),
            problem.stride,
            problem.padding,
        ).permute(0, 2, 3, 1)
        expected = activate_reference(x, self.activation)
        if tensors["residual"] is not None:
            expected = expected + tensors["residual"].double()
        allowed = EPS[self.dtype] * (expected.abs() + 0.1) + 1e-4
        assert bool(((found.double() - expected).abs() <= allowed).all())
        spare = self.spare
        assert bool(self.buffer[..., :spare].isnan().all()), "wrote before its slice"
        assert bool(self.buffer[..., spare + self.filters :].isnan().all()), "wrote behind it"


CASES = [
    {},
    {"size": 1, "residual": True},
    {"stride": 2, "height": 15, "activation": "leaky"},
    {"dtype": torch.bfloat16, "residual": True},
    {"channels": 64, "filters": 64, "batch": 1, "height": 52, "width": 52},
    {"channels": 512, "filters": 128, "batch": 1, "height": 13, "width": 13, "residual": True},
    {"batch": 33, "height": 5, "width": 3, "filters": 16},
    {"spare": 0, "channels": 256, "filters": 128, "height": 26, "width": 26, "residual": True},
    {"spare": 0, "channels": 64, "filters": 128, "height": 15, "stride": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_plan(case: dict[str, Any], cudnn: Cudnn) -> None:
    made = Case(**case)
    names = cudnn.plan_names(made.problem)
    assert names
    for name in names:
        fused = FusedConvolution(cudnn, made.problem, name)
        made.check(made.run(fused))


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_activations(activation: str, cudnn: Cudnn) -> None:
    case = Case(activation=activation, residual=True)
    for name in cudnn.plan_names(case.problem)[:2]:
        case.check(case.run(FusedConvolution(cudnn, case.problem, name)))


@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_extreme_values(activation: str, cudnn: Cudnn) -> None:
    """What the bias alone makes: no NaN, and infinity only where fp16 ends."""
    case = Case(activation=activation, filters=16, spare=0)
    values = [0.0, -0.0, 1e-8, -1e-8, 11.0, -11.0, 19.9, 20.1, 88.0, -88.0, 104.0, -104.0,
              65504.0, -65504.0, 1e30, -1e30]  # fmt: skip
    case.tensors["source"].zero_()
    case.tensors["bias"].copy_(torch.tensor(values))
    exact = activate_reference(torch.tensor(values, dtype=torch.float64), activation).cuda()
    for name in cudnn.plan_names(case.problem)[:2]:
        found = case.run(FusedConvolution(cudnn, case.problem, name))
        assert not bool(found.isnan().any())
        expected = exact.half().expand_as(found)
        torch.testing.assert_close(found, expected, rtol=2**-9, atol=1e-7)


def test_an_image(cudnn: Cudnn) -> None:
    """Three channels, of rows of six bytes."""
    case = Case(channels=3, filters=32, height=64, width=48, spare=0)
    for name in cudnn.plan_names(case.problem):
        case.check(case.run(FusedConvolution(cudnn, case.problem, name)))


def test_raw_maps(cudnn: Cudnn) -> None:
    """255 channels of rows of 256. The odd one belongs to nobody."""
    case = Case(
        channels=256, filters=256, size=1, activation="linear", height=13, width=13, spare=0
    )
    case.tensors["out"] = case.buffer[..., :255]
    case.tensors["weight"] = case.tensors["weight"][:255]
    case.tensors["bias"] = case.tensors["bias"][:255]
    case.filters = 255
    case.problem = Problem.of(
        *(case.tensors[name] for name in ("source", "weight", "out")),
        stride=1,
        padding=0,
        activation="linear",
    )
    for name in cudnn.plan_names(case.problem):
        found = case.run(FusedConvolution(cudnn, case.problem, name))
        case.buffer[..., 255:] = torch.nan
        case.check(found)


def test_the_same_again(cudnn: Cudnn) -> None:
    """Bit by bit, also where sums are made in parts."""
    case = Case(batch=1, height=13, width=13, channels=512, filters=128)
    names = cudnn.plan_names(case.problem)
    for name in names:
        fused = FusedConvolution(cudnn, case.problem, name)
        first = case.run(fused)
        assert all(torch.equal(first, case.run(fused)) for _ in range(5)), name


def test_captured(cudnn: Cudnn) -> None:
    """In a graph on a stream of its own, with new inputs at each replay."""
    case = Case(batch=1, height=13, width=13, channels=256, filters=256, residual=True)
    for name in cudnn.plan_names(case.problem):
        fused = FusedConvolution(cudnn, case.problem, name)
        workspace = torch.empty(fused.workspace_bytes, dtype=torch.uint8, device="cuda")
        fused.run(**case.tensors, workspace=workspace)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):  # one after another in one workspace
                fused.run(**case.tensors, workspace=workspace)
        for _ in range(2):
            case.tensors["source"].normal_()
            case.buffer.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            case.check(case.tensors["out"])


def test_plans_from_the_store(cudnn: Cudnn, tmp_path: Path) -> None:
    """Compiled in another process, from the description of this GPU."""
    case = Case(residual=True)
    store = PlanStore(tmp_path)
    names = cudnn.plan_names(case.problem)
    assert compile_plans([(case.problem, name) for name in names], cudnn, store) == len(names)
    for name in names:
        data = store.read(cudnn.versions, case.problem, name)
        assert data is not None and cudnn.load(data) is not None
        case.check(case.run(FusedConvolution(cudnn, case.problem, name, store)))


def test_a_damaged_store(cudnn: Cudnn, tmp_path: Path) -> None:
    case, store = Case(), PlanStore(tmp_path)
    name = cudnn.plan_names(case.problem)[0]
    store.write(cudnn.versions, case.problem, name, b"nothing that cuDNN wrote")
    case.check(case.run(FusedConvolution(cudnn, case.problem, name, store)))


def test_other_settings_of_the_engine_exist(cudnn: Cudnn) -> None:
    """Which number is which tiling was read off one version of cuDNN; here they must compile."""
    case = Case(batch=1, height=13, width=13, channels=512, filters=1024)
    plans = [PlanName.parse(name) for name in cudnn.plan_names(case.problem)]
    assert any(plan is not None and plan.parts > 1 for plan in plans)
