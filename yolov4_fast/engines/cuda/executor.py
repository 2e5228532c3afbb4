"""A plan ready to run for one batch size: kernels bound to its memory, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from yolov4_fast.engines.cuda.device import Device, Run
from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.plan import Step, View


class Bound(NamedTuple):
    """A step and what runs it. kernel: its name, as `Kernels` tells it."""

    step: Step
    kernel: str
    run: Run


class Executor:
    """Runs the network on what `image` holds and leaves the raw maps in `maps`.

    The memory is the engine's and other executors use it too: whoever runs one holds
    `CudaEngine.exclusive` from writing the image to reading the maps.
    """

    def __init__(self, memory: Memory, steps: Sequence[Bound], device: Device) -> None:
        self.steps = tuple(steps)
        self._memory = memory
        self._device = device
        self._graph: Run | None = None

    @property
    def batch(self) -> int:
        return self._memory.batch

    @property
    def image(self) -> Tensor:
        """[B, height, width, 3] of the engine's type, to be written before a run: RGB in 0..1."""
        return self._memory.image

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """[B, h, w, A * (5 + classes)] of each head, channels-last, valid after a run."""
        return self._memory.maps

    def tensor(self, view: View) -> Tensor:
        """[B, height, width, channels] of any view of the plan."""
        return self._memory.tensor(view)

    def run(self) -> None:
        """Enqueue every step on the current stream. May be captured: it has run before."""
        with self._device.active():
            for _, _, run in self.steps:
                run()

    def captured(self) -> Run:
        """The same as a graph: one launch instead of a hundred. Captured at the first call, which
        runs the network and so overwrites the image.
        """
        if self._graph is None:
            self._graph = self._device.capture(self.run)
        return self._graph
