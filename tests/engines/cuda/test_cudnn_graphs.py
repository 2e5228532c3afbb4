"""cuDNN's graphs without a GPU or cuDNN: what they compute, by a stand-in that computes them with
torch; problems, names of plans, tilings, the store, running.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.engines.cuda import cudnn_graphs
from yolov4_fast.engines.cuda.cudnn_graphs import (
    CANDIDATES,
    DescribedGpu,
    FusedConvolution,
    available,
)
from yolov4_fast.engines.cuda.cudnn_plans import LEAST_DEPTH, PlanName, PlanStore, tilings
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


# ---------------------------------------------------------------- what a graph computes


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
    torch.testing.assert_close(value.flatten(), exact, rtol=1e-5, atol=1e-35)


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


# ---------------------------------------------------------------- names, tilings, the store


@pytest.mark.parametrize("name", ["eng4_k24=3", "eng4_k17=16_k24=55", "eng7_k24=0"])
def test_names_of_plans(name: str) -> None:
    plan = PlanName.parse(name)
    assert plan is not None and str(plan) == name


@pytest.mark.parametrize("name", ["eng51_k2=8_k13=0", "eng4", "eng4_k24=3_k38=1", ""])
def test_names_with_other_settings(name: str) -> None:
    assert PlanName.parse(name) is None


H200: dict[str, int] = {"sm": 90, "processors": 132}
NEW = [PlanName(4, 3), PlanName(4, 4)]  # what cuDNN 9.26 suggests
OLD = [PlanName(7, 21), PlanName(7, 22), PlanName(7, 29)]  # and 9.19


def square(side: int, channels: int, filters: int, **change: Any) -> Problem:
    """Dense, unless changed."""
    shape = {
        "height": side, "width": side, "channels": channels, "filters": filters, "batch": 1,
        "source_row": channels, "out_row": filters,
    }  # fmt: skip
    return dataclasses.replace(PROBLEM, **(shape | change))


DEEP = square(13, 512, 1024)


def test_small_maps_are_summed_in_parts() -> None:
    found = tilings(NEW, DEEP, **H200)
    assert 0 < len(found) <= 4 and NEW[0] not in found
    assert {plan.engine for plan in found} == {4}
    assert any(plan.parts > 1 for plan in found)
    for plan in found:
        assert 9 * 512 / plan.parts >= LEAST_DEPTH


def test_large_maps_are_not() -> None:
    for suggested in (NEW, OLD):
        found = tilings(suggested, dataclasses.replace(DEEP, batch=32), **H200)
        assert found and all(plan.parts == 1 for plan in found)


def test_few_filters_get_narrow_tiles() -> None:
    narrow = tilings(NEW, square(416, 32, 32, batch=32), **H200)
    assert narrow[0].config == 14  # 256 x 32
    assert narrow != tilings(NEW, square(416, 32, 512, batch=32), **H200)


def test_other_gpus_keep_the_suggested_tiling() -> None:
    found = tilings(OLD, DEEP, sm=80, processors=108)
    assert found == [PlanName(7, 21, 4)]
    assert tilings(OLD, square(1000, 512, 1024), sm=80, processors=108) == []


@pytest.mark.parametrize(
    ("change", "configs"),
    [
        ({}, {2, 6, 10, 14, 16}),
        ({"dtype": torch.bfloat16, "out_dtype": torch.bfloat16}, {2, 6, 10, 14, 16}),
        ({"residual_dtype": torch.float16, "residual_row": 1024}, {2, 6, 10, 14, 16}),
        ({"dtype": FP8, "out_dtype": FP8}, {17, 20, 23, 26}),
        ({"source_row": 1024}, set()),
        ({"out_row": 2048}, set()),
        ({"residual_dtype": torch.float16, "residual_row": 2048}, set()),
        ({"filters": 255, "out_row": 255}, set()),
    ],
    ids=str,
)
def test_dense_tensors_without_engine_4(change: dict[str, Any], configs: set[int]) -> None:
    """Engine 2 for them and some of engine 7, which alone is offered for slices."""
    for batch in (1, 8):
        problem = dataclasses.replace(DEEP, batch=batch, **change)
        found = tilings(OLD, problem, **H200)
        assert len(set(found)) == len(found) == 4
        dense = [plan for plan in found if plan.engine == 2]
        assert len(dense) == (3 if configs else 0)
        assert {plan.config for plan in dense} <= configs
        assert all(plan.parts == 1 for plan in dense)
        assert {plan.engine for plan in found} <= {2, 7}
        assert found[0].engine == (2 if configs else 7)
        assert {plan.engine for plan in tilings(NEW, problem, **H200)} == {4}


def test_engine_7_by_depth() -> None:
    """A cell of few channels would leave half of a deep tile empty."""
    deep = tilings(OLD, square(208, 64, 64, out_row=128), **H200)
    shallow = tilings(OLD, square(208, 32, 64, out_row=128), **H200)
    assert all(plan.config <= 11 or plan.config == 25 for plan in deep)
    assert all(plan.config >= 13 for plan in shallow)
    quarters = {"dtype": FP8, "out_dtype": FP8, "out_row": 128}
    assert tilings(OLD, square(208, 64, 64, **quarters), **H200)[0].config >= 13


def test_an_image_has_tiles_of_its_own() -> None:
    image = square(416, 3, 32)
    assert not image.aligned and not image.dense
    suggested = [PlanName(7, 26), PlanName(7, 29)]
    assert tilings(suggested, image, **H200) == [PlanName(7, 27)]


@pytest.mark.parametrize(
    ("suggested", "start"),
    [
        (["eng4_k24=3", "eng4_k24=1", "eng4_k24=2", "eng4_k24=4"], ["eng4_k24=3", "eng4_"]),
        (["eng7_k24=21", "eng7_k24=22", "eng7_k24=29"], ["eng7_k24=21", "eng2_"]),
        (["eng2_k24=17", "eng2_k17=8_k24=17", "eng7_k24=0"], ["eng2_k24=17", "eng2_"]),
        (["eng51_k2=8_k13=0", "eng7_k24=21"], ["eng51_k2=8_k13=0", "eng7_k24=21"]),
    ],
    ids=lambda value: value[0],
)
def test_names_of_candidates(
    suggested: list[str], start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's first comes first, then what suits the size; few in all, none of them twice."""
    gpu = object.__new__(DescribedGpu)
    gpu.sm, gpu.processors = 90, 132
    graph = SimpleNamespace(
        get_execution_plan_count=lambda: len(suggested),
        get_plan_name_at_index=suggested.__getitem__,
    )
    monkeypatch.setattr(DescribedGpu, "graph", lambda self, problem: graph)
    found = gpu.plan_names(DEEP)
    assert found[0] == start[0] and found[1].startswith(start[1])
    assert len(set(found)) == len(found) <= CANDIDATES


def test_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PlanStore(tmp_path / "new" / "folder")
    assert store.read("H200", PROBLEM, "eng4_k24=3") is None
    store.write("H200", PROBLEM, "eng4_k24=3", b"plan")
    assert store.read("H200", PROBLEM, "eng4_k24=3") == b"plan"
    for other in (
        ("B200", PROBLEM, "eng4_k24=3"),
        ("H200", dataclasses.replace(PROBLEM, batch=3), "eng4_k24=3"),
        ("H200", PROBLEM, "eng4_k24=1"),
    ):
        assert store.read(*other) is None
    (tmp_path / "file").write_text("")
    with caplog.at_level("INFO"):
        PlanStore(tmp_path / "file").write("H200", PROBLEM, "eng4_k24=3", b"plan")
    assert "cannot keep" in caplog.text


def test_the_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_graphs, "find_spec", lambda name: None)
    reason = available()
    assert reason is not None and "pip install" in reason
    with pytest.raises(RuntimeError, match="pip install"):
        DescribedGpu("{}", name="none", sm=90, processors=1)


def test_an_old_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_graphs, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 90100))
    reason = available()
    assert reason is not None and "9.11" in reason


# ---------------------------------------------------------------- running


class Backend:
    """In place of `DescribedGpu`: notes what is run."""

    versions = "none"

    def __init__(self, workspace: int = 0) -> None:
        self.workspace = workspace
        self.loaded: list[bytes] = []
        self.built: list[int] = []
        self.ran: list[tuple[dict[int, int], tuple[int, ...], int]] = []

    def graph(self, problem: Problem) -> Any:
        return SimpleNamespace(
            get_execution_plan_count=lambda: 2,
            get_plan_name_at_index=lambda index: f"eng4_k24={index}",
            build_plan_at_index=self.built.append,
            get_workspace_size=lambda: self.workspace,
            serialize=lambda: list(b"compiled"),
        )

    def load(self, data: bytes) -> Any:
        self.loaded.append(data)
        return self.graph(PROBLEM)

    def execute(
        self, graph: Any, pointers: dict[int, int], constants: tuple[int, ...], workspace: int
    ) -> None:
        self.ran.append((pointers, tuple(constants), workspace))


def arguments(**change: Any) -> dict[str, Any]:
    return {
        "source": torch.zeros(2, 7, 9, 16).half(),
        "weight": torch.zeros(24, 3, 3, 16).half(),
        "bias": torch.zeros(24),
        "out": torch.zeros(2, 7, 9, 24).half(),
    } | change


@pytest.fixture
def cudnn() -> Any:
    return pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")


@pytest.mark.usefixtures("cudnn")
def test_running_hands_over_the_pointers() -> None:
    backend = Backend(workspace=64)
    fused = FusedConvolution(backend, PROBLEM, "eng4_k24=1")  # type: ignore[arg-type]
    assert backend.built == [1] and fused.workspace_bytes == 64
    given = arguments()
    workspace = torch.zeros(64, dtype=torch.uint8)
    fused.run(**given, workspace=workspace)
    pointers, constants, address = backend.ran[0]
    assert pointers == {
        SOURCE: given["source"].data_ptr(),
        WEIGHT: given["weight"].data_ptr(),
        BIAS: given["bias"].data_ptr(),
        OUT: given["out"].data_ptr(),
    }
    assert constants == PROBLEM.constants() and address == workspace.data_ptr()


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 7, 9, 24).half()}, "takes the tensors"),
        ({"scales": {RESCALE: torch.ones(24)}}, "takes the tensors"),
        ({"source": torch.zeros(2, 7, 9, 24).half()[..., 4:20]}, "multiple of 16 bytes, not 8"),
        ({"workspace": None}, "needs 64 bytes of workspace, not 0"),
        ({"workspace": torch.zeros(32, dtype=torch.uint8)}, "not 32"),
    ],
    ids=["residual", "scales", "alignment", "no workspace", "small workspace"],
)
def test_running_with_wrong_tensors(change: dict[str, Any], message: str) -> None:
    fused = FusedConvolution(Backend(workspace=64), PROBLEM, "eng4_k24=0")  # type: ignore[arg-type]
    workspace = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        fused.run(**arguments(**({"workspace": workspace} | change)))


@pytest.mark.usefixtures("cudnn")
def test_a_plan_is_compiled_once(tmp_path: Path) -> None:
    store, backend = PlanStore(tmp_path), Backend()
    FusedConvolution(backend, PROBLEM, "eng4_k24=1", store)  # type: ignore[arg-type]
    assert backend.built == [1] and not backend.loaded
    FusedConvolution(backend, PROBLEM, "eng4_k24=1", store)  # type: ignore[arg-type]
    assert backend.built == [1] and backend.loaded == [b"compiled"]


@pytest.mark.usefixtures("cudnn")
def test_a_plan_of_no_name() -> None:
    with pytest.raises(ValueError, match="eng4_k24=0, eng4_k24=1"):
        FusedConvolution(Backend(), PROBLEM, "eng51_k2=8_k13=0")  # type: ignore[arg-type]
