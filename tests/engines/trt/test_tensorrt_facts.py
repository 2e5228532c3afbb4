"""Where a plan can run, from what its engine file says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from yolov4_fast.engines.cuda.device import Properties
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.facts import Facts
from yolov4_fast.engines.tensorrt.options import TensorRtOptions


def facts(version: str = "10.13.2.6", **options: Any) -> Facts:
    """Of a plan built on an A100."""
    known = {
        "tensorrt": version, "gpu": "NVIDIA A100", "sm": 80, "maps": ["map_8", "map_16"],
        "options": TensorRtOptions(**options).to_json(),
    }  # fmt: skip
    return Facts.of(json.dumps(known).encode())


def gpu(name: str = "NVIDIA A100", sm: int = 80) -> Properties:
    return Properties(name, sm, processors=108, memory=2**36, driver="570.1")


@pytest.mark.parametrize(
    ("compatible", "here", "runs"),
    [
        (False, "10.13.2.6", True),
        (False, "10.13.2.7", False),
        (False, "11.4.0.106", False),
        (True, "10.13.2.6", True),
        (True, "10.13.10.1", True),
        (True, "10.9.0.34", False),  # older, though a larger word
        (True, "11.4.0.106", False),
    ],
)
def test_versions(compatible: bool, here: str, runs: bool) -> None:
    made = facts(version_compatible=compatible)
    if runs:
        made.check(here, gpu())
        return
    text = rf"built by TensorRT 10\.13\.2\.6, and this is {here}: .*that built them"
    with pytest.raises(EngineError, match=text + (" or a later one" if compatible else "$")):
        made.check(here, gpu())


@pytest.mark.parametrize(
    ("compatible", "found", "runs"),
    [
        (None, gpu(), True),
        (None, gpu("NVIDIA A30", 80), False),
        (None, gpu("NVIDIA H200", 90), False),
        ("same-sm", gpu("NVIDIA A30", 80), True),
        ("same-sm", gpu("NVIDIA A10", 86), False),
        ("ampere-plus", gpu("NVIDIA H200", 90), True),
        ("ampere-plus", gpu("Tesla T4", 75), False),
    ],
)
def test_gpus(compatible: Any, found: Properties, runs: bool) -> None:
    made = facts(hardware_compatible=compatible)
    if runs:
        made.check("10.13.2.6", found)
        return
    with pytest.raises(EngineError, match=rf"A100 \(sm_80\), and this is {found.name} \(sm_"):
        made.check("10.13.2.6", found)


def test_maps() -> None:
    assert facts().maps == ("map_8", "map_16")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"tensorrt": "10", "gpu": "x", "sm": "y"}'])
def test_damaged(text: bytes) -> None:
    with pytest.raises(EngineError, match=r"plan\.json is damaged"):
        Facts.of(text)
