"""cuDNN compiles all of YOLOv4's fused convolutions for an H200, from a description of one: with no
GPU, so in processes of their own where a stand-in takes the driver's place.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from yolov4_fast.engines.cuda.cudnn_compile import compile_plans, from_json, to_json
from yolov4_fast.engines.cuda.cudnn_graphs import DescribedGpu, available
from yolov4_fast.engines.cuda.cudnn_plans import (
    ANY_TILES,
    DENSE_FP8_TILES,
    DENSE_TILES,
    HOPPER_TILES,
    NARROW_TILES,
    SHALLOW,
    UNALIGNED_TILES,
    PlanName,
    PlanStore,
)
from yolov4_fast.engines.cuda.cudnn_problem import FP8, Problem
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.plan import Convolution, Plan
from yolov4_fast.network.architectures import yolov4
from yolov4_fast.network.fold import without_normalisation
from yolov4_fast.ops.activation import ACTIVATION_CODES

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

GPU = {"name": "NVIDIA H200", "sm": 90, "processors": 132}

# What cuDNN looks for in the driver. It loads what it compiled, and never runs it here.
DONE = "cuLibraryLoadData cuLibraryGetKernel cuKernelGetFunction cuKernelGetAttribute"
FAILED = """
cuInit cuGetErrorName cuGetErrorString cuCtxGetCurrent cuCtxGetLimit cuCtxPopCurrent
cuCtxPushCurrent cuStreamGetCtx cuLinkCreate cuLinkAddData cuLinkComplete cuLinkDestroy
cuLaunchKernel cuLaunchCooperativeKernel cuLaunchKernelEx cuDeviceGetCount cuDeviceGet
cuLibraryLoadFromFile cuOccupancyMaxPotentialClusterSize
"""
DRIVER = "\n".join(
    [
        "int cuDriverGetVersion(int *out) { *out = 13000; return 0; }",
        "int cuLibraryUnload(void) { return 0; }",
        "int cuKernelSetAttribute(void) { return 0; }",
        *(f"int {name}(long *out) {{ *(int *)out = 1; return 0; }}" for name in DONE.split()),
        *(f"int {name}(void) {{ return 100; }}" for name in FAILED.split()),  # CUDA_ERROR_NO_DEVICE
    ]
)


@pytest.fixture(scope="module")
def gpu(shared: Path) -> DescribedGpu:
    path = shared / "reference" / "cudnn" / "h200-device-properties.json"
    return DescribedGpu(path.read_text(), **GPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterable[None]:
    """A stand-in for libcuda.so.1 in the environment of the processes, where there is no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("needs a C compiler, to make a stand-in for libcuda.so.1")
    else:
        yield
        return
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(DRIVER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"], cwd=folder, check=True
    )
    with pytest.MonkeyPatch.context() as patch:
        paths = (str(folder), os.environ.get("LD_LIBRARY_PATH", ""))
        patch.setenv("LD_LIBRARY_PATH", os.pathsep.join(filter(None, paths)))
        yield


def yolov4_plan() -> Plan:
    return lower(without_normalisation(yolov4(width=416, height=416)))


def problems(plan: Plan, batch: int, dtype: torch.dtype) -> list[Problem]:
    """Distinct ones of all convolutions. In FP8 the image and the maps stay fp16."""

    def dtype_of(buffer: int) -> torch.dtype:
        half = {plan.image.buffer, *(view.buffer for view in plan.maps)}
        return torch.float16 if dtype == FP8 and buffer in half else dtype

    found = {}
    for step in plan.steps:
        if isinstance(step, Convolution):
            source, out = (plan.buffers[view.buffer] for view in (step.source, step.out))
            residual = step.residual
            problem = Problem(
                batch=batch,
                height=source.height,
                width=source.width,
                channels=step.source.channels,
                filters=step.out.channels,
                size=step.size,
                stride=step.stride,
                padding=step.padding,
                activation=step.activation,
                dtype=dtype_of(step.source.buffer),
                out_dtype=dtype_of(step.out.buffer),
                source_row=source.channels,
                out_row=out.channels,
                residual_dtype=None if residual is None else dtype_of(residual.buffer),
                residual_row=None if residual is None else plan.buffers[residual.buffer].channels,
            )
            assert problem.out_shape == (batch, out.height, out.width, step.out.channels)
            found[problem] = None
    return list(found)


NAMES = """
import json, sys
from yolov4_fast.engines.cuda.cudnn_compile import from_json
from yolov4_fast.engines.cuda.cudnn_graphs import DescribedGpu
value = json.load(sys.stdin)
gpu = DescribedGpu(value["properties"], **value["gpu"])
print(json.dumps([gpu.plan_names(from_json(fields)) for fields in value["problems"]]))
"""


def names(gpu: DescribedGpu, asked: list[Problem]) -> list[list[str]]:
    """Of the plans for each problem, found out in a process of its own."""
    value = {
        "properties": gpu.properties,
        "gpu": GPU,
        "problems": [to_json(problem) for problem in asked],
    }
    done = subprocess.run(
        [sys.executable, "-c", NAMES], input=json.dumps(value), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[str]] = json.loads(done.stdout)
    for problem, plans in zip(asked, found, strict=True):
        assert plans, f"no plan for {problem}: {done.stderr[-2000:]}"
        assert len(set(plans)) == len(plans)
    return found


def kernel(data: bytes) -> str:
    """The name of the one kernel that a compiled plan holds."""
    found = set(re.findall(rb"\bcudnn_generated_\w+", data))
    assert len(found) == 1, found
    return found.pop().decode()


OPERATIONS = {  # with the bias
    "linear": 1, "leaky": 2, "mish": 8, "swish": 5, "logistic": 5, "relu": 2, "relu6": 3, "selu": 8,
    "hard_swish": 6,
}  # fmt: skip


def check(gpu: DescribedGpu, store: PlanStore, plans: list[tuple[Problem, str]]) -> None:
    """Each plan was compiled, to one kernel that does all the operations."""
    for problem, name in plans:
        data = store.read(gpu.versions, problem, name)
        assert data is not None, f"{problem}, {name} was not compiled"
        operations = OPERATIONS[problem.activation] + len(problem.scales())
        operations += problem.residual_row is not None
        assert kernel(data).count("_pointwise") == operations, f"{kernel(data)} for {problem}"


@pytest.mark.slow
def test_one_problem_in_all_its_plans(gpu: DescribedGpu, tmp_path: Path) -> None:
    """Small, deep and with a residual: also the ones that sum in parts."""
    problem = Problem(
        batch=1, height=13, width=13, channels=512, filters=512, size=3, stride=1, padding=1,
        activation="mish", dtype=torch.float16, out_dtype=torch.float16, source_row=512,
        out_row=1024, residual_dtype=torch.float16, residual_row=512,
    )  # fmt: skip
    store = PlanStore(tmp_path)
    plans = [(problem, name) for name in names(gpu, [problem])[0]]
    assert len(plans) > 2
    assert compile_plans([*plans, *plans[:1]], gpu, store, processes=2) == len(plans)
    check(gpu, store, plans)
    assert compile_plans(plans, gpu, store) == 0
    compiled = [store.read(gpu.versions, *plan) for plan in plans]
    assert len(set(compiled)) == len(plans), "plans of other names must be other plans"
    kernels = {kernel(data or b"") for data in compiled}
    configs = {name.split("_k24=")[1] for _, name in plans}
    assert len(kernels) >= len(configs) > 2, "other tilings must be other kernels"


@pytest.mark.slow
def test_every_activation(gpu: DescribedGpu, tmp_path: Path) -> None:
    problems = [
        Problem(
            batch=1, height=26, width=26, channels=64, filters=64, size=1, stride=1, padding=0,
            activation=activation, dtype=torch.float16, out_dtype=torch.float16, source_row=64,
            out_row=64, residual_dtype=torch.float16, residual_row=64,
        )
        for activation in ACTIVATION_CODES
    ]  # fmt: skip
    plans = [
        (problem, found[0]) for problem, found in zip(problems, names(gpu, problems), strict=True)
    ]
    store = PlanStore(tmp_path)
    assert compile_plans(plans, gpu, store, processes=2) == len(ACTIVATION_CODES)
    check(gpu, store, plans)


# What the kernels of an engine are called.
ENGINES = {2: "xmma_sm90", 4: "fort_native_sm90", 7: "fort_native_sm80"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, FP8], ids=str)
def test_numbers_of_tilings(dtype: torch.dtype, gpu: DescribedGpu, tmp_path: Path) -> None:
    """Each number of the tables is the tile that it is said to be, in the cuDNN that is here."""
    problem = Problem(
        batch=1, height=26, width=26, channels=64, filters=64, size=1, stride=1, padding=0,
        activation="leaky", dtype=dtype, out_dtype=dtype, source_row=64, out_row=64,
    )  # fmt: skip
    tables = {
        4: HOPPER_TILES,
        7: {**ANY_TILES, **NARROW_TILES},
        2: DENSE_FP8_TILES if dtype == FP8 else DENSE_TILES,
    }
    if not any(name.startswith("eng4_") for name in names(gpu, [problem])[0]):
        del tables[4]
    tiles = {
        (problem, str(PlanName(engine, config))): (engine, tile)
        for engine, table in tables.items()
        for tile, (config, _) in table.items()
    }
    for tile, (config, _) in ANY_TILES.items():
        tiles[problem, str(PlanName(7, config + SHALLOW))] = (7, tile)
    source_dtype = torch.float16 if dtype == FP8 else dtype
    image = dataclasses.replace(problem, channels=3, source_row=3, dtype=source_dtype)
    for tile, (config, _) in UNALIGNED_TILES.items():
        tiles[image, str(PlanName(7, config))] = (7, tile)
    store = PlanStore(tmp_path)
    assert compile_plans(tiles, gpu, store, processes=2) == len(tiles)
    for plan, (engine, (high, wide)) in tiles.items():
        name = kernel(store.read(gpu.versions, *plan) or b"")
        assert ENGINES[engine] in name and f"_{high}x{wide}x" in name, f"{plan[1]}: {name}"


def test_problems_cross_to_other_processes() -> None:
    for problem in problems(yolov4_plan(), 3, FP8):
        assert from_json(json.loads(json.dumps(to_json(problem)))) == problem


@pytest.mark.slow
def test_what_cannot_be_compiled_is_left_out(gpu: DescribedGpu, tmp_path: Path) -> None:
    problem = Problem(
        batch=1, height=8, width=8, channels=16, filters=16, size=1, stride=1, padding=0,
        activation="leaky", dtype=torch.float16, out_dtype=torch.float16, source_row=16, out_row=16,
    )  # fmt: skip
    right = names(gpu, [problem])[0][0]
    store = PlanStore(tmp_path)
    plans = [(problem, "eng4_k24=4000"), (problem, "nonsense"), (problem, right)]
    assert compile_plans(plans, gpu, store, processes=1) == 1
    check(gpu, store, [(problem, right)])


@pytest.mark.slow
def test_all_of_yolov4(gpu: DescribedGpu, tmp_path: Path) -> None:
    plan = yolov4_plan()
    halves = problems(plan, 1, torch.float16)
    shapes = {(p.channels, p.height, p.filters, p.size, p.stride) for p in halves}
    assert len(shapes) >= 37, "yolov4 416 has 37 distinct convolution shapes"
    quarters = problems(plan, 1, FP8)
    asked = [
        *halves,
        *problems(plan, 32, torch.float16)[::16],
        *problems(plan, 1, torch.bfloat16)[::16],
        *quarters[::8],
        *(p for p in quarters if p.dtype != p.out_dtype),  # at the image and at the maps
    ]
    plans = [(p, found[0]) for p, found in zip(asked, names(gpu, asked), strict=True)]
    store = PlanStore(tmp_path)
    compile_plans(plans, gpu, store, processes=2)
    check(gpu, store, plans)
