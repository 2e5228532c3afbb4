"""Kernels compiled ahead are what a launch looks for. In processes without Triton's interpreter."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yolov4_fast.ops.activation import activation_code
from yolov4_fast.ops.convolution import ConvConfig
from yolov4_fast.ops.kernels.ahead import ROOT, Binary, argument, compile_ahead
from yolov4_fast.ops.kernels.convolution import binary

CONFIG = ConvConfig(64, 64, 32, 4, 2)

# What a launch does, on a driver that names a GPU which is not there.
LAUNCH = """
import torch
from triton.runtime.driver import driver
from yolov4_fast.ops.convolution import ConvConfig
from yolov4_fast.ops.kernels import ahead
from yolov4_fast.ops.kernels.convolution import call
from yolov4_fast.ops.kernels.convolution_kernel import convolution_kernel

driver.set_active(ahead._Target(90))
source, out = torch.empty(2, 8, 8, 64).half(), torch.empty(2, 8, 8, 48).half()
weight, bias = torch.empty(48, 3, 3, 64).half(), torch.empty(48)
grid, arguments, options = call(
    source, weight, bias, None, out, 1, 1, 2, ConvConfig(64, 64, 32, 4, 2), None
)
convolution_kernel.run(*arguments, grid=grid, warmup=True, **options)
"""


def a_binary(dtype=torch.float16, cells: int = 4, config: ConvConfig = CONFIG, **changes) -> Binary:
    """Of a 3x3 convolution with Mish from 64 to 48 channels."""
    source, out = (torch.empty(2, cells, cells, n, dtype=dtype) for n in (64, 48))
    arguments = {
        "source": source,
        "weight": torch.empty(48, 3, 3, 64, dtype=dtype),
        "bias": torch.empty(48),
        "residual": None,
        "out": out,
        "stride": 1,
        "padding": 1,
        "activation": activation_code("mish"),
        "config": config,
    }
    return binary(**(arguments | changes))


def compiled(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.cubin")}


def test_layers_of_other_sizes_share_a_binary():
    assert a_binary(cells=4) == a_binary(cells=9)
    split = ConvConfig(64, 64, 32, 4, 2, 4)
    assert a_binary(config=split) == a_binary(config=split, activation=0)
    different = {
        a_binary(),
        a_binary(torch.bfloat16),
        a_binary(activation=0),
        a_binary(residual=torch.empty(2, 4, 4, 48).half()),
        a_binary(config=split),
    }
    assert len(different) == 5


def test_narrow_loads_where_a_tensor_does_not_begin_aligned():
    wide = dict(a_binary().options)
    narrow = dict(a_binary(source=torch.empty(2, 4, 4, 72).half()[..., 1:65]).options)
    assert (wide["UNIT_IN"], wide["BLOCK_N"]) == (8, 64)
    assert (narrow["UNIT_IN"], narrow["BLOCK_N"]) == (1, 32)


def test_arguments_as_they_are_described():
    assert [argument(value) for value in (torch.empty(1).bfloat16(), 3, None)] == [
        "bfloat16",
        3,
        None,
    ]


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_ahead([a_binary(), a_binary(cells=5), a_binary(torch.float32)], 90, processes=2)
    found = compiled(tmp_path)
    assert len(found) == 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", LAUNCH], env=environment, check=True)
    assert compiled(tmp_path) == found


@pytest.mark.slow
def test_what_does_not_compile_is_told_and_the_rest_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    good = a_binary()
    bad = Binary(good.module, good.function, good.arguments, (*good.options, ("UNKNOWN", 1)))
    with caplog.at_level(logging.WARNING):
        compile_ahead([bad, good], 90, processes=1)
    assert len(compiled(tmp_path)) == 1
    assert "convolution_kernel" in caplog.text and "UNKNOWN" in caplog.text


def test_nothing_to_compile_starts_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    compile_ahead([], 90)


def test_a_process_that_cannot_start_is_told(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with caplog.at_level(logging.WARNING):
        compile_ahead([a_binary()], 90)
    assert "not compiled ahead" in caplog.text and "/nowhere/python" in caplog.text
