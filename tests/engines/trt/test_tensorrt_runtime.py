"""Streams and memory of pycuda's: what torch sees of them, and that every last one is freed, in the
right context, whichever thread drops it and whatever is raised.
"""

from __future__ import annotations

import ast
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pycuda_double import PycudaDouble, read_api
from pycuda_signatures import fits
from simulated import CPU, as_tensor

from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.engines.tensorrt import runtime as runtime_module
from yolov4_fast.engines.tensorrt.runtime import OwnLane, PlanRuntime, Primary, load_pycuda


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PycudaDouble]:
    double = PycudaDouble()
    for name, module in double.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(runtime_module, "as_tensor", as_tensor)
    monkeypatch.setattr(runtime_module, "as_stream", lambda stream, device: stream)
    yield double
    assert double.leaked == [] and double.stack == []


MAKERS: dict[str, Callable[[Primary], Any]] = {
    "Stream": Primary.stream,
    "DeviceAllocation": lambda primary: primary.memory(64),
    "PagelockedHostAllocation": lambda primary: primary.pinned(64),
}


def elsewhere(run: Callable[[], Any]) -> Any:
    """On a thread that ends."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("other_thread", [False, True], ids=["here", "elsewhere"])
def test_what_is_dropped_is_freed(pycuda: PycudaDouble, kind: str, other_thread: bool) -> None:
    primary = Primary(CPU)
    held = [MAKERS[kind](primary)]
    assert pycuda.of_kind(kind)
    elsewhere(held.clear) if other_thread else held.clear()
    assert pycuda.live == {}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_another_thread_made_is_freed(pycuda: PycudaDouble, kind: str) -> None:
    primary = Primary(CPU)
    made = elsewhere(lambda: MAKERS[kind](primary))
    assert len(pycuda.live) == 1
    del made
    assert pycuda.live == {}


@pytest.mark.parametrize("other_thread", [False, True], ids=["here", "elsewhere"])
def test_close_frees_all_and_releases_the_context_once(
    pycuda: PycudaDouble, other_thread: bool
) -> None:
    primary = Primary(CPU)
    made = [make(primary) for make in MAKERS.values() for _ in range(2)]
    assert len(pycuda.live) == 6 and pycuda.primary == 1
    close = primary.close
    elsewhere(close) if other_thread else close()
    assert pycuda.live == {} and pycuda.primary == 0
    primary.close()
    made.clear()
    del primary, close
    gc.collect()
    assert pycuda.primary == 0


def test_the_last_frees_before_the_context_is_released(pycuda: PycudaDouble) -> None:
    """A tensor may be dropped after the runtime that made it."""
    runtime = PlanRuntime(CPU)
    tensor = runtime.host(4, dtype=torch.float32)
    del runtime
    gc.collect()
    assert pycuda.primary == 1 and len(pycuda.live) == 1
    tensor.fill_(7)
    assert tensor.sum() == 28
    del tensor
    gc.collect()
    assert pycuda.primary == 0 and pycuda.live == {}


def test_the_context_is_popped_where_something_raises(pycuda: PycudaDouble) -> None:
    primary = Primary(CPU)
    with pytest.raises(KeyError), primary.active(), primary.active():
        assert len(pycuda.stack) == 2 and len(pycuda.driver_stack) == 1
        raise KeyError
    assert pycuda.stack == [] and pycuda.driver_stack == []
    pycuda.memory = 10
    for _ in range(3):
        with pytest.raises(DeviceError, match=r"too little free memory for 0\.1 MB of its memory"):
            primary.memory(100_000)
        with pytest.raises(DeviceError, match=r"too little free memory for 0\.1 MB of pinned"):
            primary.pinned(100_000)
        assert pycuda.stack == [] and pycuda.driver_stack == []
    assert pycuda.live == {}


def test_memory_that_torch_keeps_for_later_is_asked_for_again(
    pycuda: PycudaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty_cache() -> None:
        assert pycuda.stack == []
        pycuda.memory = 2**20

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    primary = Primary(CPU)
    for make in (primary.memory, primary.pinned):
        pycuda.memory = 10
        made = make(1000)
        assert len(pycuda.live) == 1
        del made
    assert pycuda.live == {}


def test_every_thread_has_the_context_for_as_long_as_it_needs_it(pycuda: PycudaDouble) -> None:
    primary = Primary(CPU)
    seen = []

    def work() -> None:
        for _ in range(50):
            primary.memory(16)
            with primary.active():
                seen.append(len(pycuda.stack))
        assert pycuda.stack == []  # else pycuda ends the process with the thread

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 200
    assert pycuda.live == {}


def test_the_double_leaks_as_pycuda_does(pycuda: PycudaDouble) -> None:
    """Without the context, on another thread: what the tests above would see."""
    context = pycuda.module.Device(0).retain_primary_context()
    context.push()
    held = [pycuda.module.mem_alloc(8), pycuda.module.Stream(1)]
    context.pop()
    with pytest.warns(UserWarning, match="out-of-thread"):
        elsewhere(held.clear)
    assert sorted(pycuda.leaked) == ["DeviceAllocation", "Stream"]
    elsewhere(context.detach)
    assert pycuda.leaked[-1] == "Context" and pycuda.primary == 1
    pycuda.leaked.clear()


def test_memory_is_what_torch_sees(pycuda: PycudaDouble) -> None:
    runtime = PlanRuntime(CPU)
    tensor = runtime.memory(2, 3, dtype=torch.float32, lane=runtime.lane())
    assert tensor.shape == (2, 3) and tensor.isnan().all()
    assert tensor.data_ptr() in pycuda.of_kind("DeviceAllocation")
    block = runtime.primary.memory(24)
    assert block.__cuda_array_interface__ == {
        "version": 3, "shape": (24,), "typestr": "|u1", "data": (block.address, False),
        "strides": None,
    }  # fmt: skip
    host = runtime.host(5, 1, dtype=torch.int16)
    assert host.shape == (5, 1) and host.is_contiguous()
    assert host.data_ptr() in pycuda.of_kind("PagelockedHostAllocation")
    view = tensor[1:]
    del tensor, block
    gc.collect()
    assert len(pycuda.of_kind("DeviceAllocation")) == 1
    view.zero_()
    del view
    gc.collect()
    assert pycuda.of_kind("DeviceAllocation") == []


def test_streams_wait_for_no_default_stream_and_are_distinct(pycuda: PycudaDouble) -> None:
    made: list[int] = []
    stream = pycuda.module.Stream
    pycuda.module.Stream = lambda flags: (made.append(flags), stream(flags))[1]
    primary = Primary(CPU)
    streams = [primary.stream() for _ in range(40)]
    assert len({each.handle for each in streams}) == 40
    assert set(made) == {1}


def test_a_lane_whose_stream_is_gone_has_nothing_to_wait_for(
    pycuda: PycudaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []

    def as_stream(stream: Any, device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: waits.append(stream.handle))

    monkeypatch.setattr(runtime_module, "as_stream", as_stream)
    runtime = PlanRuntime(CPU)
    lane = runtime.lane()
    assert isinstance(lane, OwnLane)
    lane.synchronize()
    assert len(waits) == 1
    runtime.close()
    lane.synchronize()
    assert len(waits) == 1


def test_no_gpu(pycuda: PycudaDouble) -> None:
    pycuda.devices = 0
    with pytest.raises(DeviceError, match=r"CUDA cannot be used on cpu: .*no CUDA-capable device"):
        Primary(CPU)
    pycuda.devices = 1
    with pytest.raises(DeviceError, match=r"on cuda:3: .*invalid device ordinal"):
        Primary(torch.device("cuda:3"))
    assert pycuda.primary == 0


def test_pycuda_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.delitem(sys.modules, "pycuda.driver", raising=False)
    with pytest.raises(DeviceError, match=r"needs pycuda: pip install pycuda.*CUDA_ROOT"):
        load_pycuda()


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("libcuda.so.1: cannot open shared object file", "NVIDIA's driver is missing"),
        ("libcudart.so.12: cannot open shared object file", "build it again with"),
        ("numpy.core.multiarray failed to import", "build it again with"),
    ],
)
def test_pycuda_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, text: str, remedy: str) -> None:
    def fail(name: str) -> Any:
        raise ImportError(text)

    monkeypatch.setattr(runtime_module, "import_module", fail)
    with pytest.raises(DeviceError, match=rf"cannot be loaded \({text}\): {remedy}"):
        load_pycuda()


# The double and pycuda itself.


def test_the_double_knows_what_the_runtime_uses() -> None:
    """Every attribute of the driver that the source names is pycuda's."""
    with open(runtime_module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "_driver"
    }
    api = read_api()
    assert {"init", "Device", "Stream", "mem_alloc", "pagelocked_empty", "MemoryError"} <= used
    assert used <= {*api["functions"], *api["classes"], *api["exceptions"]}


@pytest.mark.parametrize(
    ("text", "given", "named", "wanted"),
    [
        ("mem_alloc( (int)arg1) -> DeviceAllocation", (3,), {}, True),
        ("mem_alloc( (int)arg1) -> DeviceAllocation", (3.0,), {}, False),
        ("mem_alloc( (int)arg1) -> DeviceAllocation", (True,), {}, False),
        ("mem_alloc( (int)arg1) -> DeviceAllocation", (), {}, False),
        ("mem_alloc( (int)arg1) -> DeviceAllocation", (3, 4), {}, False),
        ("init([  (int)flags=0]) -> None", (), {}, True),
        ("init([  (int)flags=0]) -> None", (), {"flags": 1}, True),
        ("init([  (int)flags=0]) -> None", (), {"flag": 1}, False),
        ("f( (object)shape, (str)a [, (int)b=0 [, (int)c=0]]) -> object", ((1,), "x"), {}, True),
        ("f( (object)shape, (str)a [, (int)b=0 [, (int)c=0]]) -> object", ((1,),), {}, False),
        ("f( (object)shape, (str)a [, (int)b=0]) -> object", (1, "x"), {"a": "y"}, False),
    ],
)
def test_signatures(text: str, given: tuple[Any, ...], named: dict[str, Any], wanted: bool) -> None:
    assert fits(text, given, named, {}) is wanted
