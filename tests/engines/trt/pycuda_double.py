"""A stand-in for `pycuda.driver`, over the CPU's memory, made from the API of a real pycuda
(pycuda-*.json).

What is not in that API is not here, and every call is held against the signatures that
Boost.Python writes. Contexts, threads and freeing are as in pycuda's source (2026.1,
src/cpp/cuda.hpp): a stack per thread beside the driver's own, a Context object that belongs to the
thread that made it, and clean-ups that leak where they cannot make it current.
"""

from __future__ import annotations

import ctypes
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pycuda_signatures import fits

HERE = Path(__file__).parent
VERSION = "2026.1"
FREED = 0xFF  # in every byte of memory that was just made or freed: NaN, as float32


@cache
def read_api() -> dict[str, Any]:
    """As `read_pycuda_api` wrote it."""
    return json.loads((HERE / f"pycuda-{VERSION}.json").read_text())


class PycudaDouble:
    """devices: how many GPUs there are. memory: bytes of each. live: what was made and not freed,
    by address or handle. leaked: what pycuda could not free. primary: how often the primary context
    is retained.
    """

    def __init__(self, devices: int = 1, memory: int = 2**32) -> None:
        self.devices = devices
        self.memory = memory
        self.live: dict[int, str] = {}
        self.leaked: list[str] = []
        self.primary = 0
        self.calls: list[str] = []
        self.local = threading.local()
        self._buffers: list[Any] = []  # also of what was freed: a late read must not crash
        self._used = 0
        self._handles = iter(range(0x1000, 0x10000))
        self.module = ModuleType("pycuda.driver")
        self._fill()

    def modules(self) -> dict[str, ModuleType]:
        """For `sys.modules`."""
        package = ModuleType("pycuda")
        for module in (package, self.module):
            module.__spec__ = ModuleSpec(module.__name__, None)
        return {"pycuda": package, "pycuda.driver": self.module}

    @property
    def stack(self) -> list[Any]:
        """Of this thread, in pycuda."""
        return self.local.__dict__.setdefault("stack", [])

    @property
    def driver_stack(self) -> list[int]:
        """Of this thread, in CUDA's driver."""
        return self.local.__dict__.setdefault("driver", [])

    def current(self, other_than: Any = None) -> Any:
        while self.stack:
            top = self.stack[-1]
            if top is not other_than and top._valid:
                return top
            self.stack.pop()
        return None

    def of_kind(self, kind: str) -> list[int]:
        return [key for key, name in self.live.items() if name == kind]

    def make(self, kind: str, key: int) -> Any:
        """Register what is made; it needs a current context, which is returned."""
        context = self.current()
        if context is None:
            raise self.error("LogicError", "explicit_context_dependent failed: invalid device "
                             "context - no currently active context?")  # fmt: skip
        self.live[key] = kind
        return context

    def free(self, context: Any, key: int) -> None:
        kind = self.live.pop(key)
        with self._activated(context, kind) as possible:
            if not possible:
                self.leaked.append(kind)

    def buffer(self, size: int) -> Any:
        """Memory of the double; raises as pycuda where there is none."""
        if self._used + size > self.memory:
            raise self.error("MemoryError", "cuMemAlloc failed: out of memory")
        self._used += size
        made = (ctypes.c_uint8 * size)()
        ctypes.memset(made, FREED, size)
        self._buffers.append(made)
        return made

    def release(self, buffer: Any) -> None:
        self._used -= len(buffer)
        ctypes.memset(buffer, FREED, len(buffer))

    def handle(self) -> int:
        return next(self._handles)

    def error(self, name: str, text: str) -> Exception:
        return getattr(self.module, name)(text)

    @contextmanager
    def _activated(self, context: Any, kind: str) -> Iterator[bool]:
        """scoped_context_activation."""
        if not context._valid:
            yield False
        elif self.current() is context:
            yield True
        elif threading.get_ident() != context._thread:
            warnings.warn(f"{kind} in out-of-thread context could not be cleaned up", stacklevel=1)
            yield False
        else:
            context.push()
            yield True
            self.pop()

    def pop(self) -> None:
        if self.stack:
            self.driver_stack.pop()
        if not self.stack:
            raise self.error("LogicError", "context::pop failed: invalid device context - cannot "
                             "pop non-current context")  # fmt: skip
        self.stack.pop()
        if below := self.current():
            self.driver_stack.append(below.handle)

    def _fill(self) -> None:
        api, classes = read_api(), _classes(self)
        for name, bases in api["exceptions"].items():
            parents = tuple(
                Exception if base == "Exception" else getattr(self.module, base) for base in bases
            )
            setattr(self.module, name, type(name, parents, {}))
        for name, cls in classes.items():
            known = api["classes"][name]
            public = {key for key in vars(cls) if not key.startswith("_")}
            known_names = {
                *known.get("methods", ()), *known.get("static", ()), *known.get("properties", ())
            }  # fmt: skip
            assert public <= known_names, f"pycuda's {name} has no {public}"
            for key, texts in {**known.get("methods", {}), **known.get("static", {})}.items():
                function = vars(cls).get(key)
                static = key in known.get("static", ())
                if function is not None:
                    function = getattr(function, "__func__", function)
                    checked = self._checked(f"{name}.{key}", texts, function, classes)
                    setattr(cls, key, staticmethod(checked) if static else checked)
            setattr(self.module, name, cls)
        for name, function in _functions(self, classes).items():
            checked = self._checked(name, api["functions"][name], function, classes)
            setattr(self.module, name, checked)

    def _checked(
        self, name: str, texts: list[str], function: Callable[..., Any], classes: dict[str, type]
    ) -> Callable[..., Any]:
        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if not any(fits(text, given, named, classes) for text in texts):
                raise TypeError(f"Python argument types in {name}{given, named} did not match "
                                f"C++ signature: {texts}")  # fmt: skip
            self.calls.append(name)
            return function(*given, **named)

        return call


def _functions(double: PycudaDouble, classes: dict[str, type]) -> dict[str, Callable[..., Any]]:
    def init(flags: int = 0) -> None:
        if not double.devices:
            text = "cuInit failed: no CUDA-capable device is detected"
            raise double.error("RuntimeError", text)

    def mem_alloc(size: int) -> Any:
        if size < 1:
            raise double.error("LogicError", "cuMemAlloc failed: invalid argument")
        return classes["DeviceAllocation"](size)

    def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return np.asarray(classes["PagelockedHostAllocation"](shape, np.dtype(dtype)))

    return {"init": init, "mem_alloc": mem_alloc, "pagelocked_empty": pagelocked_empty}


def _classes(double: PycudaDouble) -> dict[str, type]:
    class Device:
        def __init__(self, number: int) -> None:
            if not 0 <= number < double.devices:
                raise double.error("LogicError", "cuDeviceGet failed: invalid device ordinal")
            self._number = number

        def retain_primary_context(self) -> Any:
            double.primary += 1
            return Context(1 + self._number)

    class Context:
        def __init__(self, handle: int) -> None:
            self.handle = handle
            self._valid = True
            self._thread = threading.get_ident()

        def push(self) -> None:
            if double.stack:
                double.driver_stack.pop()
            double.driver_stack.append(self.handle)
            double.stack.append(self)

        @staticmethod
        def pop() -> None:
            double.pop()

        def detach(self) -> None:
            if not self._valid:
                raise double.error("LogicError", "cannot detach from invalid context")
            active = double.current() is self
            if active:
                double.primary -= 1
            elif threading.get_ident() == self._thread:
                double.driver_stack.append(self.handle)
                double.primary -= 1
            else:
                double.leaked.append("Context")
            self._valid = False
            if active and (below := double.current(other_than=self)):
                double.driver_stack.append(below.handle)

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            self.handle = double.handle()
            self._context = double.make("Stream", self.handle)

        def __del__(self) -> None:
            if hasattr(self, "_context"):
                double.free(self._context, self.handle)

    class Allocation:
        def __init__(self, size: int) -> None:
            self._buffer = double.buffer(size)
            self._address = ctypes.addressof(self._buffer)
            self._context = double.make(type(self).__name__, self._address)
            self._valid = True

        def free(self) -> None:
            if not self._valid:
                text = "device_allocation::free failed: invalid resource handle"
                raise double.error("LogicError", text)
            double.free(self._context, self._address)
            double.release(self._buffer)
            self._valid = False

        def __del__(self) -> None:
            if getattr(self, "_valid", False):
                Allocation.free(self)

    class DeviceAllocation(Allocation):
        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            super().free()

    class PagelockedHostAllocation(Allocation):
        def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
            super().__init__(int(np.prod(shape)) * dtype.itemsize)
            self.__array_interface__ = {
                "version": 3, "shape": shape, "typestr": dtype.str, "data": (self._address, False)
            }  # fmt: skip

        def free(self) -> None:
            super().free()

    made = (Device, Context, Stream, DeviceAllocation, PagelockedHostAllocation)
    return {cls.__name__: cls for cls in made}
