"""The double of TensorRT, of both major versions, as the module `tensorrt`; that of pycuda; and a
machine that has both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycuda_double import PycudaDouble
from simulated import MAX_BATCH, Machine, Simulated, as_tensor
from trt_double import VERSIONS, Double

from yolov4_fast import build_engine
from yolov4_fast.engines.engine import Engine
from yolov4_fast.engines.tensorrt import engine as engine_module
from yolov4_fast.engines.tensorrt import runtime as runtime_module
from yolov4_fast.network.fold import fold
from yolov4_fast.network.module import NetworkModule
from yolov4_fast.sources import read_image


@pytest.fixture(params=list(VERSIONS))
def trt_double(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Double:
    double = Double(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", double.module)
    return double


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> PycudaDouble:
    double = PycudaDouble()
    for name, module in double.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(runtime_module, "as_tensor", as_tensor)
    monkeypatch.setattr(engine_module, "PlanRuntime", Simulated)
    return double


@pytest.fixture(scope="module")
def module(mini: Any) -> NetworkModule:
    """The folded network that stands in for the plan."""
    network, state = fold(mini.network, mini.state)
    made = NetworkModule(network)
    made.load_state_dict(state)
    return made.eval()


@pytest.fixture
def machine(
    trt_double: Double, pycuda: PycudaDouble, module: NetworkModule, mini: Any
) -> Iterator[Machine]:
    yield Machine(trt_double, pycuda, module, mini)
    assert pycuda.leaked == [] and pycuda.stack == []


@pytest.fixture(scope="module")
def torch_engine(mini: Any) -> Engine:
    return build_engine(*mini, engine="torch", max_batch=MAX_BATCH)


@pytest.fixture(scope="module")
def pictures(darknet_reference: Path) -> list[np.ndarray]:
    return [read_image(darknet_reference / f"{n}.png") for n in ("square", "tall", "wide")]
