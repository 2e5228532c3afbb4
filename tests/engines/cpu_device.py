"""A stand-in for a GPU, so that engines run whole on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from yolov4_fast.engines.cuda.device import Device, Properties, Run


class CpuDevice(Device):
    """The CPU as a device of one stream: everything is done when the call returns. `captured`
    counts the graphs that were made.
    """

    def __init__(
        self,
        backends: Sequence[str] = ("torch",),
        *,
        name: str = "NVIDIA H200",
        sm: int = 90,
        memory: int = 2**40,
        compilers: int = 0,
        clock: Callable[[Run], float] | None = None,
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.properties = Properties(name, sm, processors=132, memory=memory, driver="570.1")
        self.backends = tuple(backends)
        self.compilers = compilers
        self.captured = 0
        self._clock = clock or self._time

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def free_memory(self) -> int:
        return self.properties.memory

    def seconds(self, run: Run) -> float:
        return self._clock(run)

    def _time(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def capture(self, run: Run) -> Run:
        run()  # as a GPU warms up, which overwrites the image
        self.captured += 1
        return run

    def synchronize(self) -> None:
        pass

    def mark(self) -> object:
        return object()

    def wait(self, mark: object) -> None:
        assert mark is not None
