"""CUDA for the TensorRT engine: pycuda owns streams, device memory and pinned memory, and torch and
TensorRT use all of it in place. Graphs are captured by torch, as pycuda has none.

The context is the GPU's primary one, which torch works in too, so an address or a stream of one is
good for the other. What pycuda does about contexts (2026.1, read in its source) decides the rest:

- Each thread has a stack of them in pycuda, and a thread that ends while something is on it ends
  the process. So a context is on it only within `Primary.active`.
- What was allocated is freed in the Context object it came from, where that is current, or made by
  the same thread; else pycuda warns and leaks it. So one object serves all threads, and everything
  is freed within `Primary.active`, whichever thread drops it.
- Detaching from another thread than the one that made the object does nothing, unless it is
  current. It then leaves the stack of pycuda, so nothing is popped; on the driver's own stack it
  stays, as it does after any call of torch's. An object that is dropped and was not detached ends
  as if its context were no primary one, which CUDA refuses.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov4_fast.engines.cuda.runtime import CAPTURING, CudaLane, CudaRuntime, Lane
from yolov4_fast.engines.engine import DeviceError

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream, nor that for it
INSTALL = (
    "pip install pycuda, which compiles it and needs a C++ compiler and CUDA's headers "
    "(CUDA_ROOT names their folder where nvcc is not on the PATH)"
)


def load_pycuda() -> Any:
    """The module `pycuda.driver`. Raises DeviceError where it is absent or cannot be loaded."""
    try:
        return import_module("pycuda.driver")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pycuda":
            raise
        raise DeviceError(f"the tensorrt engine needs pycuda: {INSTALL}") from None
    except ImportError as error:
        reason = " ".join(str(error).split())
        remedy = (
            "NVIDIA's driver is missing"
            if "libcuda.so" in reason
            else f"build it again with: {INSTALL}"
        )
        raise DeviceError(
            f"pycuda is installed but cannot be loaded ({reason}): {remedy}"
        ) from None


class Stream:
    """A stream of pycuda's. handle: as CUDA knows it."""

    freed: Callable[[], bool]

    def __init__(self, handle: int) -> None:
        self.handle = handle


class Block:
    """Device memory of pycuda's; torch and others see it through `__cuda_array_interface__`."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size  # bytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
        }


class Primary:
    """The primary context of a GPU, retained, and what was made in it.

    Everything lives until nothing refers to it or until `close`. Any thread may do any of this.
    Raises DeviceError, also where memory does not suffice.
    """

    def __init__(self, device: torch.device) -> None:
        self._driver = load_pycuda()
        self._device = device
        try:
            self._driver.init()
            context = self._driver.Device(device.index or 0).retain_primary_context()
        except self._driver.Error as error:
            raise DeviceError(f"CUDA cannot be used on {device}: {error}") from None
        self._context = context
        self._guard = threading.Lock()
        self._owned: list[weakref.finalize] = []
        self._detach = weakref.finalize(self, _detach, context)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The context current in this thread."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def stream(self) -> Stream:
        made = self._make(lambda: self._driver.Stream(NON_BLOCKING), "a stream")
        stream = Stream(made.handle)
        only = [made]
        del made  # its destructor frees it
        finalizer = self._own(stream, only.clear)
        stream.freed = lambda: not finalizer.alive
        return stream

    def memory(self, size: int) -> Block:
        made = self._make(lambda: self._driver.mem_alloc(size), f"{_mb(size)} of its memory")
        block = Block(int(made), size)
        self._own(block, made.free)
        return block

    def pinned(self, size: int) -> np.ndarray:  # [size] uint8
        made = self._make(
            lambda: self._driver.pagelocked_empty(size, np.uint8), f"{_mb(size)} of pinned memory"
        )
        view = made.view()  # `made` would free its memory itself, in whatever context
        self._own(view, made.base.free)
        return view

    def close(self) -> None:
        """Free everything that was made here, in whatever use, and release the context."""
        with self._guard:
            owned, self._owned = self._owned, []
        for free in reversed(owned):
            free()
        self._detach()

    def _make(self, make: Callable[[], Any], what: str) -> Any:
        with CAPTURING:  # allocating may wait for the device
            try:
                try:
                    with self.active():
                        return make()
                except self._driver.MemoryError:
                    torch.cuda.empty_cache()  # what torch has freed, but keeps for itself
                    with self.active():
                        return make()
            except self._driver.MemoryError as error:
                raise DeviceError(
                    f"{self._device} has too little free memory for {what}: build the engine with "
                    f"a smaller max_batch, or close what else is using it ({error})"
                ) from None
            except self._driver.Error as error:
                raise DeviceError(f"{self._device} did not give {what}: {error}") from None

    def _own(self, holder: object, free: Callable[[], None]) -> weakref.finalize:
        finalizer = weakref.finalize(holder, self._free, free)
        with self._guard:
            self._owned = [other for other in self._owned if other.alive]
            self._owned.append(finalizer)
        return finalizer

    def _free(self, free: Callable[[], None]) -> None:
        with CAPTURING, self.active():  # freeing may wait for the device
            free()


class OwnLane(CudaLane):
    """A lane on a stream of its own: torch's are 32, handed out in turn."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        super().__init__(as_stream(stream, device))
        self._owned = stream

    def synchronize(self) -> None:
        if not self._owned.freed():  # else its work was waited for before
            super().synchronize()


class PlanRuntime(CudaRuntime):
    """As `CudaRuntime`, with streams and memory of pycuda's. Needs Triton and pycuda.

    Raises DeviceError.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.primary = Primary(device)

    def lane(self) -> OwnLane:
        return OwnLane(self.primary.stream(), self._device)

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        block = torch.from_numpy(self.primary.pinned(math.prod(shape) * dtype.itemsize))
        return block.view(dtype).view(shape)

    def memory(self, *shape: int, dtype: torch.dtype, lane: Lane) -> Tensor:
        """As `Runtime.memory`; where it comes from, no lane has to wait for another."""
        block = self.primary.memory(math.prod(shape) * dtype.itemsize)
        return as_tensor(block, self._device).view(dtype).view(shape)

    def handle(self) -> int:
        """Of this thread's current stream, as TensorRT takes it."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def close(self) -> None:
        """Free all streams and all memory; none may be in use."""
        self.primary.close()


def as_tensor(block: Block, device: torch.device) -> Tensor:
    """The memory itself, [size] uint8; the tensor keeps it alive."""
    return torch.as_tensor(block, device=device)


def as_stream(stream: Stream, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(stream.handle, device)


def _detach(context: Any) -> None:
    context.push()
    context.detach()


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
