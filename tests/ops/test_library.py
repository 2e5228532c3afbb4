"""The compiled operators are loaded, or their absence is one clear error."""

import pytest
import torch

from yolov4_fast.ops import library


def test_every_operator_is_registered_for_the_cpu():
    for name in ("resize", "decode", "diou_nms"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov4_fast::{name}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"yolov4_fast::{name}", "Meta")


def test_missing_library_names_the_build_command(tmp_path):
    with pytest.raises(ImportError, match=r"pip install --no-build-isolation -e \."):
        library.load(tmp_path)


def test_broken_library_names_the_build_command(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"do not load.*pip install --no-build-isolation -e \."):
        library.load(tmp_path)
