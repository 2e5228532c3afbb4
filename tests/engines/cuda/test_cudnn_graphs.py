"""cuDNN's plans without a GPU or cuDNN: their names, tilings, the store, running."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
    FP8,
    OUT,
    RESCALE,
    SOURCE,
    WEIGHT,
    Problem,
)

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
