"""Builds by a real TensorRT on a real GPU, where there are both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trt_models import pixels_onnx, small_onnx

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.builder import Built, Gpu, TensorRtOptions, build_plan
from yolov4_fast.engines.tensorrt.package import load_tensorrt

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def gpu() -> Gpu:
    """The current one, its context made current by torch."""
    try:
        load_tensorrt()
    except EngineError as error:
        pytest.skip(f"needs the libraries of TensorRT: {error}")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    torch.zeros(1, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), major * 10 + minor)


def build(model: bytes, gpu: Gpu, cache: Path | None = None, **options: object) -> Built:
    asked = TensorRtOptions(timing_cache=cache, **options)  # type: ignore[arg-type]
    return build_plan(model, asked, max_batch=4, gpu=gpu)


def test_a_plan_is_built_and_can_be_read(gpu: Gpu, tmp_path: Path) -> None:
    trt = load_tensorrt()
    built = build(small_onnx(), gpu, tmp_path / "times")
    assert built.facts["types"]["HALF"] == 2
    assert (tmp_path / "times").stat().st_size > 0
    runtime = trt.Runtime(trt.Logger())
    engine = runtime.deserialize_cuda_engine(built.plan)
    least, usual, largest = engine.get_tensor_profile_shape("images", 0)
    assert (tuple(least), tuple(usual)) == ((1, 3, 8, 8), (4, 3, 8, 8)) and usual == largest
    assert build(small_onnx(), gpu, tmp_path / "times").plan


@pytest.mark.parametrize(
    "options",
    [
        {"version_compatible": True},
        {"hardware_compatible": "ampere-plus"},
        {"hardware_compatible": "same-sm"},
        {"workspace_mb": 64, "tf32": True, "detailed": False},
    ],
)
def test_options(gpu: Gpu, options: dict[str, object]) -> None:
    assert build(small_onnx(), gpu, **options).plan


def test_pixels(gpu: Gpu) -> None:
    assert build(pixels_onnx(), gpu).plan


def test_what_the_parser_refuses(gpu: Gpu) -> None:
    model = small_onnx().replace(b"layer_0.conv", b"layer_0.cnov").replace(b"Conv", b"Cnov")
    with pytest.raises(EngineError, match=r"layer_0\.cnov"):
        build(model, gpu)
    with pytest.raises(EngineError, match="cannot read the ONNX"):
        build(b"noise", gpu)
