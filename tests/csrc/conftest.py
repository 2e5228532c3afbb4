"""The CUDA kernels of csrc on the CPU, compiled with a small stand-in for CUDA, as fixtures."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from plugin_library import Library, compile_driver, compile_on_cpu

HERE = Path(__file__).parent


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Kernels:
    """The kernels with the calls of the operators."""

    def __init__(self, library: ctypes.CDLL, seed: int = 0, multiprocessors: int = 2) -> None:
        self.library, self.seed, self.multiprocessors = library, seed, multiprocessors

    def diou_nms(self, boxes, scores, class_ids, counts, threshold, beta, limit=0, numbers=None):
        batch, candidates = scores.shape
        guard = 64  # rows behind the result that nothing may write
        keep = torch.full((batch * (limit or candidates) + guard,), 77, dtype=torch.int64)
        kept = torch.full((batch + guard,), 77, dtype=torch.int32)
        error = self.library.diou_nms(
            *map(pointer, (boxes, scores, class_ids, counts, numbers, keep, kept)),
            *map(ctypes.c_int64, (batch, candidates, limit or candidates)),
            ctypes.c_double(threshold),
            ctypes.c_double(-1 if beta is None else beta),
            ctypes.c_int64(self.multiprocessors),
            ctypes.c_uint64(self.seed),
        )
        assert error is None, error.decode()
        assert (keep[-guard:] == 77).all() and (kept[-guard:] == 77).all()
        return keep[:-guard].reshape(batch, -1), kept[:-guard]

    def pack(self, boxes, scores, class_ids, counts, keep, kept):
        batch, detections = keep.shape
        packed = torch.full((batch, detections + 1, 6), torch.nan)
        error = self.library.pack(
            *map(pointer, (boxes, scores, class_ids, counts, keep, kept, packed)),
            *map(ctypes.c_int64, (batch, scores.shape[1], detections)),
            ctypes.c_uint64(self.seed),
        )
        assert error is None, error.decode()
        return packed


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """kernels.cpp, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    # _FORTIFY_SOURCE takes a jump between the stacks of two fibers for an attack.
    options = "-std=c++17 -O2 -U_FORTIFY_SOURCE -ffp-contract=off -fno-math-errno -shared -fPIC"
    subprocess.run([compiler, *options.split(), "-o", path, HERE / "kernels.cpp"], check=True)
    library = ctypes.CDLL(str(path))
    library.diou_nms.restype = library.pack.restype = ctypes.c_char_p
    library.workspace_bytes.restype = ctypes.c_int64
    return library


@pytest.fixture
def kernels(library):
    """kernels(seed, multiprocessors): the kernels, for tensors on the CPU. The seed chooses the
    order of threads and blocks: 0 forward, 1 backward, others random.
    """

    def make(seed: int = 0, multiprocessors: int = 2) -> Kernels:
        return Kernels(library, seed, multiprocessors)

    return make


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory):
    """The library of the TensorRT plugin with its kernels on the CPU."""
    return compile_on_cpu(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def plugin_driver(tmp_path_factory):
    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def plugins(plugin_driver, plugin_path):
    """That library, loaded; what it logged before is forgotten."""
    library = Library(plugin_driver, plugin_path)
    library.messages()
    return library
