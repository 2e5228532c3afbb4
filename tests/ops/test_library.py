"""The compiled operators are loaded, or their absence is one clear error."""

import pytest
import torch

from yolov4_fast.ops import library


def test_every_operator_is_registered_for_the_cpu():
    for name in ("resize", "decode", "diou_nms", "pack"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov4_fast::{name}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov4_fast::{name}", "Meta")


def test_missing_library_names_the_build_command(tmp_path):
    with pytest.raises(ImportError, match=r"pip install --no-build-isolation -e \."):
        library.load(tmp_path)


def test_broken_library_names_the_build_command(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"do not load.*pip install --no-build-isolation -e \."):
        library.load(tmp_path)


def test_library_with_cuda_beside_a_torch_without_it(tmp_path, monkeypatch):
    def load_library(path):
        raise OSError("libtorch_cuda.so: cannot open shared object file")

    (tmp_path / "_C.abi3.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ImportError, match=r"built for a torch with CUDA.*without it; build them"):
        library.load(tmp_path)


class OnGpu:
    is_cuda = True


def test_operators_without_cuda_refuse_a_cuda_tensor(monkeypatch):
    monkeypatch.setattr(library, "has_cuda", lambda: False)
    library.check_device(torch.zeros(1), "pack")
    with pytest.raises(RuntimeError, match=r"no CUDA kernel of pack: .*without nvcc"):
        library.check_device(OnGpu(), "pack")


def test_cuda_kernels_are_all_there_or_none():
    for name in ("diou_nms", "pack"):
        key = torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov4_fast::{name}", "CUDA")
        assert key == library.has_cuda()
