"""What TensorRT can be asked for, in Python and on the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast.commands.tensorrt_options import add_tensorrt, tensorrt_options
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.options import TensorRtOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_batch": 0}, "min_batch 0: it must be at least 1"),
        ({"opt_batch": 0}, "opt_batch 0: it must be at least 1"),
        ({"workspace_mb": -1}, "workspace_mb -1: it must be at least 1"),
        ({"min_batch": 4, "opt_batch": 2}, "opt_batch 2 is less than min_batch 4"),
        ({"dla": -1}, "dla -1: DLA cores are numbered from 0"),
        ({"hardware_compatible": "all"}, "'all' is not one of ampere-plus, same-sm"),
        ({"timing_cache": "times"}, "timing_cache 'times': a file is given as a pathlib.Path"),
        ({"min_size": (32, 32)}, "give all three or none"),
        (
            {"min_size": (64, 32), "opt_size": (32, 32), "max_size": (96, 32)},
            "widths 64, 32 and 96",
        ),
        (
            {"min_size": (32, 32), "opt_size": (32, 64), "max_size": (32, 32)},
            "heights 32, 64 and 32",
        ),
        (
            {"min_size": (0, 32), "opt_size": (32, 32), "max_size": (32, 32)},
            "each must be at least 1",
        ),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        TensorRtOptions(**options)


@pytest.mark.parametrize(
    ("options", "largest", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (1, 8, 8)),
        ({"opt_batch": 3}, 8, (1, 3, 8)),
        ({"min_batch": 8}, 8, (8, 8, 8)),
    ],
)
def test_batches(options: dict[str, Any], largest: int, expected: tuple[int, int, int]) -> None:
    assert TensorRtOptions(**options).batches(largest) == expected


def test_json_says_what_shapes_the_plan() -> None:
    options = TensorRtOptions(timing_cache=Path("/somewhere"), dla=1)
    told = json.loads(json.dumps(options.to_json()))
    assert told["dla"] == 1 and "timing_cache" not in told
    assert set(told) == set(vars(options)) - {"timing_cache"}


def parse(words: str, *, sizes: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_tensorrt(parser, sizes=sizes)
    return parser.parse_args(words.split())


def test_no_flags_are_the_defaults() -> None:
    assert tensorrt_options(parse("")) == TensorRtOptions()
    assert tensorrt_options(parse(""), "cuda") is None


def test_every_flag() -> None:
    words = (
        "--min-batch 2 --opt-batch 4 --min-size 320 --opt-size 416x320 --max-size 608 "
        "--workspace 1024 --timing-cache times --version-compatible "
        "--hardware-compatible same-sm --dla 0 --tf32"
    )
    assert tensorrt_options(parse(words, sizes=True)) == TensorRtOptions(
        min_batch=2, opt_batch=4, min_size=(320, 320), opt_size=(416, 320), max_size=(608, 608),
        workspace_mb=1024, timing_cache=Path("times"), version_compatible=True,
        hardware_compatible="same-sm", dla=0, tf32=True,
    )  # fmt: skip
    no_cache = tensorrt_options(parse("--timing-cache none"))
    assert no_cache is not None and no_cache.timing_cache is None


def test_flags_for_another_engine() -> None:
    with pytest.raises(ValueError, match=r"^--workspace, --dla: only for --engine tensorrt, and "):
        tensorrt_options(parse("--dla 0 --workspace 5"), "cuda")


@pytest.mark.parametrize(
    "words", ["--dla -1", "--dla x", "--hardware-compatible all", "--min-batch 0", "--opt-size a"]
)
def test_flags_that_cannot_be(words: str) -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse(words, sizes=True)


def test_sizes_only_where_they_can_be_open() -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("--opt-size 416")
