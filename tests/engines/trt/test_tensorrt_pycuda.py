"""pycuda itself, over a stand-in for NVIDIA's driver: contexts, threads and freeing are as its
double has them. Needs pycuda and a C compiler, but neither a driver nor a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pycuda_double import read_api
from read_pycuda_api import api

pytestmark = pytest.mark.skipif(not find_spec("pycuda"), reason="pycuda is not installed")

HERE = Path(__file__).parent

PROGRAM = """
import ctypes, gc, os, sys, warnings
from concurrent.futures import ThreadPoolExecutor

sys.setdlopenflags(os.RTLD_LAZY)  # the stand-in lacks what is not called
driver = ctypes.CDLL("libcuda.so.1")
depth, primary, live = driver.stand_in_depth, driver.stand_in_primary, driver.stand_in_live

import torch
from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.engines.tensorrt.runtime import Primary

warnings.simplefilter("error")  # what pycuda cannot free

def elsewhere(run):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(lambda: (run(), depth())).result()

makers = (Primary.stream, lambda p: p.memory(64), lambda p: p.pinned(64))
for make in makers:  # freed here, elsewhere, and where another thread made it
    context = Primary(torch.device("cuda:0"))
    assert primary() == 1
    before = depth()  # each detach leaves one
    held = [make(context)]
    assert (live(), depth()) == (1, before)
    held.clear()
    assert (live(), depth()) == (0, before)
    held.append(make(context))
    assert elsewhere(held.clear)[1] == 0
    assert live() == 0
    elsewhere(lambda: held.append(make(context)))
    assert live() == 1
    held.clear()
    assert (live(), depth()) == (0, before)
    del context
    gc.collect()
    assert primary() == 0

for close_elsewhere in (False, True):
    context = Primary(torch.device("cuda:0"))
    held = [make(context) for make in makers for _ in range(3)]
    assert live() == 9
    elsewhere(context.close) if close_elsewhere else context.close()
    assert (live(), primary()) == (0, 0)
    held.clear()
    context.close()

context = Primary(torch.device("cuda:0"))
before = depth()
for make in (Primary.memory, Primary.pinned):
    try:
        make(context, 2**21)
    except DeviceError as error:
        assert "too little free memory" in str(error) and "out of memory" in str(error)
    else:
        raise AssertionError("it was to fail")
    assert depth() == before
array = context.pinned(16)
array[:] = range(16)
assert int(array.sum()) == 120
block = context.memory(16)
print("fine", live())  # all that is left is freed at exit
"""


def test_contexts_threads_and_freeing(tmp_path: Path) -> None:
    subprocess.run(
        ["cc", "-shared", "-fPIC", str(HERE / "cuda_stand_in.c"),
         "-o", str(tmp_path / "libcuda.so.1")],
        check=True,
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "fine 2\n", "")


def test_the_api_that_the_double_is_made_from() -> None:
    found, known = api(), read_api()
    for name in ("init", "mem_alloc", "pagelocked_empty"):
        assert found["functions"][name] == known["functions"][name]
    for name in ("Device", "Context", "Stream", "DeviceAllocation", "PagelockedHostAllocation"):
        assert found["classes"][name] == known["classes"][name]
    assert found["exceptions"] == known["exceptions"]
