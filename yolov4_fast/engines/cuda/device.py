"""What the engine asks of a GPU: what it is, how much memory is free, how long a kernel takes, a
captured graph, an order between streams.

`Gpu` asks torch. The engine takes any `Device`, so that its tests run it whole without a GPU.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from yolov4_fast.engines.cuda.runtime import CAPTURING, CudaRuntime
from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.ops.library import BUILD_COMMAND, has_cuda

logger = logging.getLogger(__name__)

Run = Callable[[], None]  # enqueues work on the current stream and returns at once

MINIMUM_SM = {"fp16": 75, "f32": 75, "bf16": 80, "fp8": 90}  # compute capability x 10
GENERATIONS = {75: "Turing", 80: "Ampere", 90: "Hopper"}
LAUNCHES = 10  # of a kernel in one captured graph when it is timed
MOST_COMPILERS = 16
SAMPLES = 7  # timed replays of that graph; the median counts

NO_KERNELS = (
    "yolov4_fast was installed without its CUDA kernels; where nvcc is, build them with: "
    f"{BUILD_COMMAND}"
)

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Properties:
    """What a GPU is. sm: compute capability x 10. memory: bytes in all."""

    name: str
    sm: int
    processors: int
    memory: int
    driver: str


class Device(ABC):
    """A device that runs kernels in the order of a stream."""

    torch_device: torch.device
    properties: Properties
    backends: tuple[str, ...]  # of "cudnn", "triton", "torch": what may be tried here
    compilers: int  # processes to compile kernels with before they are tried; 0 for not before

    @abstractmethod
    def active(self) -> AbstractContextManager[object]:
        """Makes it the current device of this thread, as Triton and torch want it for a launch."""

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that can still be had."""

    @abstractmethod
    def seconds(self, run: Run) -> float:
        """Time of one run on the device, launch costs left out."""

    @abstractmethod
    def capture(self, run: Run) -> Run:
        """`run` as a graph: calling the result enqueues all of it at once."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all that was enqueued. Raises RuntimeError where some of it failed."""

    @abstractmethod
    def mark(self) -> object:
        """A point in the current stream that `wait` of another stream can wait for."""

    @abstractmethod
    def wait(self, mark: object) -> None:
        """What follows in the current stream begins after the mark; the host goes on at once."""


class Gpu(Device):
    """An NVIDIA GPU, through torch, for an engine of this kind. Raises DeviceError where there is
    none of this number.
    """

    def __init__(self, name: str | None = None, kind: str = "cuda") -> None:
        self.torch_device = torch.device("cuda", _index(name, kind))
        found = torch.cuda.get_device_properties(self.torch_device)
        self.properties = Properties(
            name=found.name,
            sm=found.major * 10 + found.minor,
            processors=found.multi_processor_count,
            memory=found.total_memory,
            driver=driver_version(),
        )
        self.backends = ("cudnn", "triton", "torch")
        self.compilers = min(os.cpu_count() or 1, MOST_COMPILERS)

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)

    def free_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device)  # torch hands this out again
        return free + kept - torch.cuda.memory_allocated(self.torch_device)

    def seconds(self, run: Run) -> float:
        def launches() -> None:
            for _ in range(LAUNCHES):
                run()

        with CAPTURING, self.active():  # held until the graph is freed
            replay = self.capture(launches)
            replay()
            times = []
            for _ in range(SAMPLES):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                replay()
                after.record()
                after.synchronize()
                times.append(before.elapsed_time(after))
            del replay
        return median(times) / LAUNCHES / 1e3

    def capture(self, run: Run) -> Run:
        """As `Device.capture`; `run` first runs outside of the graph, as what it compiles or loads
        cannot be captured.
        """
        with self.active():
            run()
            return CudaRuntime(self.torch_device).capture(run, torch.cuda.graph_pool_handle())

    def synchronize(self) -> None:
        with CAPTURING:
            torch.cuda.synchronize(self.torch_device)

    def mark(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def wait(self, mark: object) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self.torch_device).wait_event(mark)


def open_device(device: str | Device | None, kind: str = "cuda") -> Device:
    """The device of a name such as "cuda:1", the current one for None, for an engine of this kind.
    Raises DeviceError.
    """
    return device if isinstance(device, Device) else Gpu(device, kind)


def check_precision(properties: Properties, precision: str) -> None:
    """Raise DeviceError where a GPU is too old for a precision of the engine."""
    least = MINIMUM_SM[precision]
    if properties.sm < min(MINIMUM_SM.values()):
        raise DeviceError(
            f"{properties.name} (sm_{properties.sm}) is too old: the cuda engine runs on GPUs "
            f"from sm_{min(MINIMUM_SM.values())} ({GENERATIONS[min(MINIMUM_SM.values())]}) on; "
            "the torch engine may run on it"
        )
    if properties.sm < least:
        others = [name for name, sm in MINIMUM_SM.items() if sm <= properties.sm]
        raise DeviceError(
            f"precision {precision} needs a GPU from sm_{least} ({GENERATIONS[least]}) on, and "
            f"{properties.name} is sm_{properties.sm}: build for precision {' or '.join(others)}"
        )


def is_usable() -> bool:
    """Whether the cuda engine runs here: a GPU that is new enough, Triton, and our operators with
    their CUDA kernels; a warning says where only these are missing.
    """
    if not torch.cuda.is_available() or not find_spec("triton"):
        return False
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < min(MINIMUM_SM.values()):
        return False
    if not has_cuda():
        logger.warning("the GPU is not used: %s", NO_KERNELS)
    return has_cuda()


def driver_version() -> str:
    """Of the kernel module where it can be read ("570.124.06"), else of CUDA in the driver."""
    try:
        words = re.search(r"\b(\d{3,}(?:\.\d+)+)", _DRIVER.read_text())
        if words:
            return words[1]
    except OSError:
        pass  # not Linux, or hidden in a container
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return "unknown"
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def _index(name: str | None, kind: str) -> int:
    """Number of the GPU of a name. Raises DeviceError."""
    if not torch.cuda.is_available():
        reason = (
            "this torch was built without CUDA"
            if torch.version.cuda is None
            else "torch finds no NVIDIA GPU with a working driver"
        )
        raise DeviceError(f"the {kind} engine needs an NVIDIA GPU, and here {reason}")
    if not has_cuda():
        raise DeviceError(f"the {kind} engine cannot run here: {NO_KERNELS}")
    found = ", ".join(
        f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        for index in range(torch.cuda.device_count())
    )
    if name is None:
        return torch.cuda.current_device()
    words = re.fullmatch(r"cuda(?::(\d+))?", name)
    if words is None:
        raise DeviceError(f"the {kind} engine runs on {found}, not on {name!r}")
    index = torch.cuda.current_device() if words[1] is None else int(words[1])
    if index >= torch.cuda.device_count():
        raise DeviceError(f"there is no {name} here, but {found}")
    return index
