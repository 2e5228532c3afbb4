"""The TensorRT engine on a real GPU, with a real TensorRT and pycuda: what it finds is what the
torch engine finds, and it gives back what it took.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolov4_fast import Detector, build_engine, load_engine
from yolov4_fast.engines.engine import DeviceError, Engine
from yolov4_fast.engines.tensorrt.engine import TensorRtEngine
from yolov4_fast.engines.tensorrt.inspector import read_layers
from yolov4_fast.engines.tensorrt.options import TensorRtOptions
from yolov4_fast.sources import read_image

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]

MAX_BATCH = 4
TOLERANCES = {"f32": 2e-3, "fp16": 0.1, "bf16": 0.6}  # of raw maps, whose values are up to 10


@pytest.fixture(scope="module", autouse=True)
def _machine() -> None:
    try:
        TensorRtEngine.check_device(None)
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def files(mini: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engine files by precision."""
    folder = tmp_path_factory.mktemp("plans")
    made = {}
    for precision in TOLERANCES:
        if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
            continue
        made[precision] = folder / f"{precision}.engine"
        build_engine(
            *mini, engine="tensorrt", precision=precision, max_batch=MAX_BATCH,
            tensorrt=TensorRtOptions(timing_cache=folder / "timing"), path=made[precision],
        ).close()  # fmt: skip
    return made


@pytest.fixture(scope="module")
def reference(mini: Any) -> Engine:
    return build_engine(*mini, engine="torch", max_batch=MAX_BATCH, device="cuda")


@pytest.fixture(scope="module")
def pictures(darknet_reference: Path) -> list[np.ndarray]:
    return [read_image(darknet_reference / f"{n}.png") for n in ("square", "tall", "wide")]


def images_of(batch: int, engine: Engine) -> torch.Tensor:
    return torch.rand(batch, 3, engine.height, engine.width, device=engine.device)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
def test_maps(files: dict[str, Path], reference: Engine, precision: str, batch: int) -> None:
    if precision not in files:
        pytest.skip(f"this GPU has no {precision}")
    with load_engine(files[precision]) as engine:
        for _ in range(3):  # captured at the first, replayed after
            images = images_of(batch, engine)
            for ours, theirs in zip(engine.run(images), reference.run(images), strict=True):
                assert ours.device == engine.device and ours.dtype == torch.float32
                assert (ours - theirs).abs().max() < TOLERANCES[precision]


def test_detections(files: dict[str, Path], reference: Engine, pictures: list[np.ndarray]) -> None:
    with load_engine(files["f32"]) as engine:
        for settings in ({"confidence": 0.1}, {"resize": "letterbox"}):
            detector = Detector(engine, **settings)
            wanted = Detector(reference, **settings).detect(pictures * 3)
            for ours, theirs in zip(detector.detect(pictures * 3), wanted, strict=True):
                np.testing.assert_array_equal(ours.class_ids, theirs.class_ids)
                np.testing.assert_allclose(ours.scores, theirs.scores, atol=2e-3)
                np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.5)


def test_threads(files: dict[str, Path], reference: Engine) -> None:
    with load_engine(files["f32"]) as engine:
        images = [images_of(1 + n % MAX_BATCH, engine) for n in range(24)]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(engine.run, images))
        torch.cuda.synchronize()
        for image, maps in zip(images, found, strict=True):
            for ours, theirs in zip(maps, reference.run(image), strict=True):
                assert (ours - theirs).abs().max() < TOLERANCES["f32"]


def test_memory_comes_back(files: dict[str, Path], pictures: list[np.ndarray]) -> None:
    """Of several engines, the last leaves no less than the first; torch's own cache aside."""
    free = []
    for _ in range(4):
        with load_engine(files["fp16"]) as engine:
            Detector(engine).detect(pictures)
            engine.run(images_of(2, engine))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[1] - 2**20


def test_layers(files: dict[str, Path]) -> None:
    with load_engine(files["fp16"]) as engine:
        layers = read_layers(engine.learnt()["layers.json"])
    assert len(layers) > 10
    assert any(layer.kind for layer in layers)
