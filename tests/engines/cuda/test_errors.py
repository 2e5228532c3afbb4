"""What the engine says where it cannot run: one clear message each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from yolov4_fast.engines import EngineError, EngineFileError, build_engine, load_engine
from yolov4_fast.engines.build import default_engine, engine_class
from yolov4_fast.engines.cuda import device as device_module
from yolov4_fast.engines.cuda.device import (
    Properties,
    check_precision,
    driver_version,
    is_usable,
    open_device,
)
from yolov4_fast.engines.engine import DeviceError

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes torch report GPUs: machine(("NVIDIA H200", (9, 0)), ...)."""

    def make(*gpus: tuple[str, tuple[int, int]]) -> None:
        def properties(device: object) -> SimpleNamespace:
            name, (major, minor) = gpus[torch.device(device).index]
            return SimpleNamespace(
                name=name, major=major, minor=minor, multi_processor_count=10, total_memory=10**9
            )

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpus[0][1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(device_module, "has_cuda", lambda: True)

    return make


def test_no_gpu(machine: Machine, mini) -> None:
    machine()
    for attempt in (
        lambda: build_engine(*mini, engine="cuda"),
        lambda: build_engine(*mini, engine="cuda", device="cuda:0"),
        lambda: engine_class("cuda").check_device(None),
    ):
        with pytest.raises(DeviceError, match="the cuda engine needs an NVIDIA GPU, and here"):
            attempt()


@pytest.mark.parametrize(
    ("cuda", "says"),
    [(None, "this torch was built without CUDA"), ("13.2", "no NVIDIA GPU with a working driver")],
)
def test_no_gpu_says_why(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, cuda: str | None, says: str
) -> None:
    machine()
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(DeviceError, match=says):
        open_device(None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda:2", r"no cuda:2 here, but cuda:0 \(NVIDIA H200\), cuda:1 \(NVIDIA L4\)"),
        ("cpu", r"runs on cuda:0 \(NVIDIA H200\), cuda:1 \(NVIDIA L4\), not on 'cpu'"),
        ("cuda:x", "not on 'cuda:x'"),
        ("warp", "not on 'warp'"),
        ("", "not on ''"),
    ],
)
def test_a_device_that_is_not_there(machine: Machine, name: str, says: str) -> None:
    machine(("NVIDIA H200", (9, 0)), ("NVIDIA L4", (8, 9)))
    with pytest.raises(DeviceError, match=says):
        open_device(name)


def test_devices_by_number(machine: Machine) -> None:
    machine(("NVIDIA H200", (9, 0)), ("NVIDIA L4", (8, 9)))
    for name, index in ((None, 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)):
        device = open_device(name)
        assert device.torch_device == torch.device("cuda", index)
        assert device.properties.name == ("NVIDIA H200", "NVIDIA L4")[index]
        assert device.properties.sm == (90, 89)[index]


@pytest.mark.parametrize(
    ("sm", "precision", "says"),
    [
        (70, "fp16", r"GPU X \(sm_70\) is too old.*from sm_75 \(Turing\)"),
        (75, "bf16", r"bf16 needs a GPU from sm_80 \(Ampere\).*fp16 or f32"),
        (89, "fp8", r"fp8 needs a GPU from sm_90 \(Hopper\).*fp16 or f32 or bf16"),
    ],
)
def test_too_old(sm: int, precision: str, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        check_precision(Properties("GPU X", sm, 10, 10**9, "570"), precision)


def test_new_enough() -> None:
    for sm, precision in ((75, "fp16"), (75, "f32"), (80, "bf16"), (90, "fp8"), (120, "bf16")):
        check_precision(Properties("GPU X", sm, 10, 10**9, "570"), precision)


def test_the_default_engine(machine: Machine) -> None:
    machine(("NVIDIA H200", (9, 0)))
    assert is_usable() and default_engine() == "cuda"
    machine(("NVIDIA V100", (7, 0)))  # too old
    assert not is_usable() and default_engine() != "cuda"
    machine()
    assert not is_usable() and default_engine() != "cuda"


def test_without_triton(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(device_module, "find_spec", lambda name: None)
    assert default_engine() != "cuda"
    monkeypatch.setattr("yolov4_fast.engines.build.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="needs Triton: pip install triton"):
        engine_class("cuda")


def test_without_our_kernels(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(device_module, "has_cuda", lambda: False)
    assert default_engine() != "cuda"
    assert "the GPU is not used: yolov4_fast was installed without its CUDA" in caplog.text
    with pytest.raises(DeviceError, match=r"cannot run here: .* where nvcc is, build them with"):
        engine_class("cuda").check_device(None)


def test_the_driver_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    monkeypatch.setattr(device_module, "_DRIVER", version)
    assert driver_version() == "570.124.06"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun\n")
    assert driver_version() == "535.54.03"


def test_an_unknown_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device_module, "_DRIVER", tmp_path / "missing")
    monkeypatch.setattr(device_module.ctypes, "CDLL", missing)
    assert driver_version() == "unknown"


def test_too_little_memory(mini, cpu_device, tuning_folder: Path) -> None:
    def build(memory: int, max_batch: int) -> None:
        device = cpu_device(memory=memory)
        build_engine(*mini, engine="cuda", precision="fp16", max_batch=max_batch, device=device)

    with pytest.raises(DeviceError) as caught:
        build(300 * 2**20, 1000)
    message = str(caught.value)
    assert (
        "at batch 1000" in message and "315 MB of 315 MB are free on cpu (NVIDIA H200)" in message
    )
    fits = int(message.split("a max_batch of ")[1].split()[0])
    assert 1 < fits < 1000
    build(300 * 2**20, fits)
    with pytest.raises(DeviceError, match=f"a max_batch of {fits} would fit"):
        build(300 * 2**20, fits + 1)
    with pytest.raises(DeviceError, match="not even a batch of 1 fits"):
        build(2**20, 4)
    # Beside the arena, two slots with a picture of full HD and NMS's workspace for each image.
    needed = int(message.split("needs ")[1].split(" MB")[0].replace(",", ""))
    assert needed * 1e6 > 1000 * 2 * (1920 * 1080 * 3 + 1.2e6)


def test_too_little_memory_for_every_kernel(
    mini, cpu_device, tuning_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 MiB")

    monkeypatch.setattr("yolov4_fast.engines.cuda.trial.StepTrial.make", fail)
    with pytest.raises(DeviceError, match=r"to choose kernels at batch 8: .*max_batch than 8 \(tr"):
        build_engine(*mini, engine="cuda", precision="f32", device=cpu_device())


@pytest.mark.parametrize("where", ["Filters.of", "tune"])
def test_memory_that_runs_out_all_the_same(
    mini, cpu_device, tuning_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 MiB")

    monkeypatch.setattr(f"yolov4_fast.engines.cuda.engine.{where}", fail)
    with pytest.raises(DeviceError, match=r"too little free memory to .*max_batch than 8 \(tried"):
        build_engine(*mini, engine="cuda", precision="f32", device=cpu_device())


def test_a_file_of_another_gpu(mini, cpu_device, tuning_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mini.engine"
    build_engine(*mini, engine="cuda", precision="f32", device=cpu_device(), path=path)
    for other in (cpu_device(name="NVIDIA L4", sm=89), cpu_device(sm=100)):
        with pytest.raises(EngineFileError) as caught:
            load_engine(path, device=other)
        for words in (str(path), "NVIDIA H200 (sm_90)", other.properties.name, "yolov4-fast build"):
            assert words in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "sm", "says"),
    [("fp16", 70, "too old"), ("bf16", 75, "bf16 needs a GPU from sm_80")],
)
def test_build_on_an_old_gpu(
    mini, cpu_device, tuning_folder: Path, precision: str, sm: int, says: str
) -> None:
    with pytest.raises(DeviceError, match=says):
        build_engine(*mini, engine="cuda", precision=precision, device=cpu_device(sm=sm))


def test_calibration_belongs_to_fp8_alone(mini, cpu_device, tuning_folder: Path) -> None:
    with pytest.raises(EngineError, match="fp8 is built from calibration images: give some"):
        build_engine(*mini, engine="cuda", precision="fp8", device=cpu_device())
    with pytest.raises(EngineError, match="fp16 needs no calibration images: only fp8 and int8 do"):
        build_engine(*mini, engine="cuda", precision="fp16", device=cpu_device(), calibration=[])
    with pytest.raises(EngineError, match="f32 needs no calibration images"):
        build_engine(*mini, engine="torch", precision="fp32", calibration=[])
