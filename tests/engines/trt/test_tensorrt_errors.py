"""What can go wrong with a TensorRT engine: one message each, and nothing is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_device import CpuDevice
from simulated import Machine, images_of
from trt_double import Double

from yolov4_fast import load_engine
from yolov4_fast.engines import EngineFileError
from yolov4_fast.engines.bundle import read_bundle, write_bundle
from yolov4_fast.engines.engine import DeviceError, EngineError
from yolov4_fast.engines.tensorrt.options import TensorRtOptions


def test_memory_that_does_not_suffice(machine: Machine) -> None:
    machine.pycuda.memory = 10_000
    with pytest.raises(DeviceError, match=r"too little free memory for .* MB .*smaller max_batch"):
        machine.build()
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0


def test_a_gpu_that_cuda_cannot_use(machine: Machine) -> None:
    machine.pycuda.devices = 0
    with pytest.raises(DeviceError, match="no CUDA-capable device is detected"):
        machine.build()


def test_a_plan_that_tensorrt_does_not_read(machine: Machine) -> None:
    def refuse(double: Double, runtime: Any, **_: Any) -> None:
        double.log(runtime.state["logger"], "ERROR", "Serialization assertion failed")

    machine.trt.script["Runtime.deserialize_cuda_engine"] = refuse
    with pytest.raises(EngineError, match=r"cannot use its plan .Serialization assertion failed"):
        machine.build()
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0


def test_a_plan_that_memory_does_not_suffice_for(machine: Machine, path: Path) -> None:
    """Which is no fault of the file, so it need not be built again."""

    def refuse(double: Double, runtime: Any, **_: Any) -> None:
        double.log(runtime.state["logger"], "ERROR", "Cuda Runtime (out of memory)")

    machine.trt.script["Runtime.deserialize_cuda_engine"] = refuse
    with pytest.raises(DeviceError, match=r"did not suffice to load a plan of .* MB .*close what"):
        load_engine(path, CpuDevice())
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0


def test_torch_gives_back_what_it_keeps_before_tensorrt_allocates(
    machine: Machine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: names.append(machine.trt.names()))
    machine.trt.calls.clear()
    load_engine(path, CpuDevice()).close()
    assert names and "Runtime.deserialize_cuda_engine" not in names[0]
    assert "Runtime.deserialize_cuda_engine" in machine.trt.names()


@pytest.mark.parametrize(
    ("method", "answer", "error", "text"),
    [
        ("ICudaEngine.create_execution_context", None, DeviceError, "smaller max_batch"),
        ("IExecutionContext.set_input_shape", False, EngineError, "refuses a batch of 5"),
        ("IExecutionContext.set_tensor_address", False, EngineError, "refuses the memory for"),
        ("IExecutionContext.infer_shapes", ["images"], EngineError, "not ours: images"),
    ],
)
def test_a_context_that_is_refused(
    machine: Machine, tmp_path: Path, method: str, answer: Any, error: type[Exception], text: str
) -> None:
    machine.trt.script[method] = answer
    with pytest.raises(error, match=text):
        machine.build(path=tmp_path / "trt.engine")
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails(machine: Machine) -> None:
    engine = machine.build()

    def fail(double: Double, context: Any, stream_handle: int) -> bool:
        logger = context.state["engine"].state["logger"]
        double.log(logger, "ERROR", "an illegal memory access was encountered")
        return False

    machine.trt.script["IExecutionContext.execute_async_v3"] = fail
    with pytest.raises(EngineError, match=r"could not run its plan .an illegal memory access"):
        machine.run(engine, images_of(1, engine))
    with pytest.raises(EngineError, match="could not run"):  # what is still queued
        engine.close()
    assert machine.pycuda.live == {} and machine.pycuda.primary == 0


@pytest.mark.parametrize(
    ("precision", "sm", "text"), [("bf16", 75, "bf16 needs a GPU from sm_80.*fp16")]
)
def test_a_gpu_that_is_too_old(machine: Machine, precision: str, sm: int, text: str) -> None:
    with pytest.raises(DeviceError, match=text):
        machine.build(precision=precision, device=CpuDevice(name="Tesla T4", sm=sm))


def test_sizes_that_are_open_are_not_for_an_engine(machine: Machine) -> None:
    sizes = TensorRtOptions(min_size=(32, 32), opt_size=(64, 64), max_size=(96, 96))
    with pytest.raises(EngineError, match="one input size"):
        machine.build(tensorrt=sizes)


@pytest.fixture
def path(machine: Machine, tmp_path: Path) -> Path:
    machine.build(path=tmp_path / "trt.engine").close()
    return tmp_path / "trt.engine"


def with_facts(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter what the file says of its plan."""
    bundle = read_bundle(path)
    facts = json.loads(bundle.payload["plan.json"])
    change(facts)
    payload = {**bundle.payload, "plan.json": json.dumps(facts).encode()}
    write_bundle(path, bundle.manifest, payload)


def test_a_plan_of_another_version(machine: Machine, path: Path) -> None:
    with_facts(path, lambda facts: facts.update(tensorrt="10.13.0.35"))
    with pytest.raises(
        EngineFileError, match=r"built by TensorRT 10\.13\.0\.35, and this is 1.*build it again"
    ):
        load_engine(path, CpuDevice())
    assert machine.pycuda.live == {}


def test_a_plan_of_another_gpu(machine: Machine, path: Path) -> None:
    with pytest.raises(
        EngineFileError,
        match=r"built on NVIDIA H200 \(sm_90\), and this is NVIDIA L4 \(sm_89\); build it again",
    ):
        load_engine(path, CpuDevice(name="NVIDIA L4", sm=89))


@pytest.mark.parametrize("change", [lambda facts: facts.clear(), lambda facts: facts.pop("sm")])
def test_facts_that_are_damaged(
    machine: Machine, path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    with_facts(path, change)
    with pytest.raises(EngineFileError, match=r"plan\.json is damaged"):
        load_engine(path, CpuDevice())


def test_a_plan_of_another_input_size(machine: Machine, path: Path) -> None:
    with pytest.raises(EngineFileError, match=r"images of its plan is \[-1, 3, 128, 160\]"):
        load_engine(path, CpuDevice(), size=(96, 64))
    assert machine.pycuda.live == {}


def test_a_plan_with_other_outputs(machine: Machine, path: Path) -> None:
    with_facts(path, lambda facts: facts.update(maps=["map_8", "map_32"]))
    with pytest.raises(
        EngineFileError, match=r"inputs and outputs images, map_16, map_8; .*: map_8, map_32;"
    ):
        load_engine(path, CpuDevice())
    assert machine.pycuda.live == {}


def test_a_plan_in_another_layout(machine: Machine, path: Path) -> None:
    formats = machine.trt.module.TensorFormat
    machine.trt.script["ICudaEngine.get_tensor_format"] = formats.LINEAR
    with pytest.raises(EngineFileError, match=r"LINEAR, and the network needs .* FLOAT HWC"):
        load_engine(path, CpuDevice())


@pytest.mark.parametrize("name", ["tensorrt", "pycuda.driver"])
def test_a_package_that_is_absent(
    machine: Machine, path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an engine file asks for it: which is no fault of the file."""
    monkeypatch.setitem(sys.modules, name, None)
    package = name.partition(".")[0]
    other = path.with_name("other.engine")
    for use in (lambda: machine.build(path=other), lambda: load_engine(path, CpuDevice())):
        with pytest.raises(DeviceError, match=f"(?i)needs {package}.*pip install {package}"):
            use()
    assert list(path.parent.iterdir()) == [path]


def test_a_machine_without_a_gpu(machine: Machine, path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="the tensorrt engine needs an NVIDIA GPU"):
        load_engine(path)
    with pytest.raises(DeviceError, match="the tensorrt engine needs an NVIDIA GPU"):
        machine.build(device=None)


@pytest.mark.parametrize(("compatible", "allowed"), [(True, [True]), (False, [])])
def test_a_plan_may_bring_code_only_where_it_was_built_to(
    machine: Machine, compatible: bool, allowed: list[bool]
) -> None:
    options = TensorRtOptions(version_compatible=compatible, timing_cache=None)
    machine.build(tensorrt=options).close()
    calls = machine.trt.arguments("Runtime.engine_host_code_allowed=")
    assert [call["value"] for call in calls] == allowed
