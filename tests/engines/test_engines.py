"""Engines: the same maps from each, batches of any size, threads, and what they refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from yolov4_fast.engines import Engine, EngineError, build_engine, load_engine
from yolov4_fast.engines.cuda.device import is_usable
from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.openvino_engine import has_bf16
from yolov4_fast.engines.pipeline import Settings
from yolov4_fast.network.layers import IMAGE, Conv, Network
from yolov4_fast.network.module import NetworkModule

KINDS = ("torch", "openvino")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 128, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(mini, images: Tensor) -> tuple[Tensor, ...]:
    """Of the module itself, normalisation not folded."""
    module = NetworkModule(mini.network).eval()
    module.load_state_dict(mini.state, strict=False)
    with torch.inference_mode():
        return module(images)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, mini) -> Engine:
    return build_engine(*mini, engine=request.param, precision="f32", max_batch=4)


def worst(maps: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference relative to the largest value of each map."""
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for ours, theirs in zip(maps, expected, strict=True)
    )


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 1])
def test_agrees_with_the_module(
    engine: Engine, images: Tensor, expected: tuple[Tensor, ...], batch: int
) -> None:
    maps = engine.run(images[:batch])
    assert [raw.shape for raw in maps] == [raw[:batch].shape for raw in expected]
    assert all(raw.dtype == torch.float32 for raw in maps)
    assert worst(maps, tuple(raw[:batch] for raw in expected)) < 1e-5


def test_agrees_with_onnxruntime(mini, engine: Engine, images: Tensor) -> None:
    session = onnxruntime.InferenceSession(
        export_onnx(mini.network, mini.state).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    theirs = tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))
    assert worst(engine.run(images), theirs) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near(mini, kind: str, images: Tensor, expected: tuple[Tensor, ...]) -> None:
    if kind == "openvino" and not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    maps = build_engine(*mini, engine=kind, precision="bf16").run(images)
    # 8 bits of mantissa through 20 layers; and more than float32 could be off: it did run in
    # bfloat16.
    assert 1e-4 < worst(maps, expected) < 5e-2


def test_maps_survive_later_runs(engine: Engine, images: Tensor) -> None:
    first = engine.run(images[:1])
    before = [raw.clone() for raw in first]
    engine.run(images[1:2])
    assert all(torch.equal(raw, old) for raw, old in zip(first, before, strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_input_may_have_any_strides(engine: Engine, images: Tensor, layout: str) -> None:
    if layout == "channels_last":
        given = images[:1].to(memory_format=torch.channels_last)
    else:
        given = torch.stack((images[:1], images[:1]), -1)[..., 0]
    assert worst(engine.run(given), engine.run(images[:1])) < 1e-6


def test_threads_share_an_engine(engine: Engine, images: Tensor) -> None:
    expected = [engine.run(images[index : index + 1]) for index in range(4)]
    pair = engine.run(images[:2])

    def run(number: int) -> float:
        if number % 5 == 4:
            return worst(engine.run(images[:2]), pair)
        index = number % 4
        return worst(engine.run(images[index : index + 1]), expected[index])

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(40))) < 1e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((1, 3, 160, 128), torch.float32, r"runs \[B, 3, 128, 160\] torch.float32, not \[1, 3"),
        ((3, 128, 160), torch.float32, r"not \[3, 128, 160\]"),
        ((1, 3, 128, 160), torch.uint8, "torch.uint8"),
        ((0, 3, 128, 160), torch.float32, "batch of 0 images: this engine runs 1 to 4"),
        ((5, 3, 128, 160), torch.float32, "batch of 5 images: this engine runs 1 to 4"),
    ],
)
def test_refuses_what_it_cannot_run(
    engine: Engine, shape: tuple[int, ...], dtype: torch.dtype, says: str
) -> None:
    with pytest.raises(EngineError, match=says):
        engine.run(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_engine_says_so(mini, kind: str, images: Tensor) -> None:
    with build_engine(*mini, engine=kind) as engine:
        engine.run(images[:1])
    with pytest.raises(EngineError, match="closed"):
        engine.run(images[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_another_name_of_f32(mini, kind: str, images: Tensor) -> None:
    engine = build_engine(*mini, engine=kind, precision="fp32")
    assert engine.precision == engine.manifest.precision == "f32"
    plain = build_engine(*mini, engine=kind, precision="f32")
    assert worst(engine.run(images), plain.run(images)) == 0


def test_an_engine_without_a_pipeline_of_its_own(engine: Engine) -> None:
    settings = Settings(confidence=0.25, iou=0.45, beta=None, max_detections=0, resize="stretch")
    assert engine.pipeline(settings) is None
    assert engine.learnt() == {}


@pytest.mark.skipif(is_usable(), reason="with a GPU the cuda engine is the default")
def test_the_default_is_openvino_at_its_best_precision(mini) -> None:
    engine = build_engine(*mini)
    assert engine.kind == "openvino"
    assert engine.precision == ("bf16" if has_bf16() else "f32")
    assert (engine.height, engine.width, engine.max_batch) == (128, 160, 8)
    assert engine.resize == "stretch"
    assert engine.class_names == mini.class_names


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "warp"}, "no engine is called 'warp'; there are openvino, torch, cuda"),
        ({"precision": "f8"}, "openvino engine has no precision 'f8'; it has f32, bf16"),
        ({"engine": "torch", "precision": "f16"}, "torch engine has no precision 'f16'"),
        ({"precision": "fp8"}, "openvino engine has no precision 'fp8'; it has f32, bf16"),
        ({"calibration": []}, "needs no calibration images: only fp8 and int8 do"),
        ({"max_batch": 0}, "max_batch 0: it must be at least 1"),
        ({"resize": "crop"}, "resize 'crop' is not one of stretch, letterbox"),
        ({"size": 100}, "100x100 does not fit: both sides must be multiples of 16"),
        ({"confidence": 1.5}, "confidence 1.5: it must lie in 0..1"),
        ({"device": "cuda:77"}, "runs on the cpu, not on 'cuda:77'"),
        ({"engine": "torch", "device": "teapot"}, "torch has no device 'teapot' here"),
    ],
)
def test_build_refuses(mini, settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_engine(*mini, **settings)


def test_build_refuses_too_few_names(mini) -> None:
    with pytest.raises(EngineError, match="2 class names for a network of 3 classes"):
        build_engine(mini.network, mini.state, mini.class_names[:2])


def test_build_refuses_a_backbone() -> None:
    network = Network((Conv(inputs=(IMAGE,), filters=2),), width=8, height=8)
    with pytest.raises(EngineError, match="no detection head"):
        build_engine(network, NetworkModule(network).state_dict(), ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["layers.4.conv.weight", "layers.1.bn.running_mean"])
def test_build_names_the_layer_of_nan(mini, key: str, value: float) -> None:
    state = {name: values.clone() for name, values in mini.state.items()}
    state[key].view(-1)[7] = value
    with pytest.raises(EngineError, match=f"NaN or infinity: {key}, 1 of"):
        build_engine(mini.network, state, mini.class_names)


def test_build_refuses_a_variance_that_folds_to_nan(mini) -> None:
    state = {name: values.clone() for name, values in mini.state.items()}
    state["layers.1.bn.running_var"][0] = -1.0
    with pytest.raises(EngineError, match=r"NaN or infinity: layers\.1\.conv"):
        build_engine(mini.network, state, mini.class_names)


def test_build_refuses_weights_of_another_network(mini) -> None:
    state = dict(mini.state)
    del state["layers.4.bn.bias"]
    with pytest.raises(EngineError, match=r"lack layers\.4\.bn\.bias"):
        build_engine(mini.network, state, mini.class_names)
    state = mini.state | {"layers.4.bn.bias": torch.zeros(5)}
    with pytest.raises(EngineError, match=r"layers\.4\.bn\.bias has shape \[5\].*needs \[16\]"):
        build_engine(mini.network, state, mini.class_names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_engine(mini, kind: str, tmp_path: Path, images: Tensor) -> None:
    path = tmp_path / "mini.engine"
    built = build_engine(
        *mini, engine=kind, precision="f32", size=(96, 64), resize="letterbox",
        max_batch=3, confidence=0.4, iou=0.5, path=path,
    )  # fmt: skip
    loaded = load_engine(path, device="cpu")
    assert loaded.manifest == built.manifest
    assert (loaded.width, loaded.height, loaded.resize) == (96, 64, "letterbox")
    small = images[:3, :, :64, :96].contiguous()
    for ours, theirs in zip(built.run(small), loaded.run(small), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, (96, 160)])
def test_a_file_loads_for_another_size(
    mini, kind: str, size: int | tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "mini.engine"
    build_engine(*mini, engine=kind, precision="f32", path=path)
    loaded = load_engine(path, size=size)
    assert (loaded.width, loaded.height) == (size if isinstance(size, tuple) else (size, size))
    images = torch.rand(2, 3, loaded.height, loaded.width)
    built = build_engine(*mini, engine="torch", precision="f32", size=size)
    assert worst(loaded.run(images), built.run(images)) < 1e-5
    with pytest.raises(ValueError, match="100x100 does not fit"):
        load_engine(path, size=100)


def test_a_missing_device_is_not_blamed_on_the_file(mini, tmp_path: Path) -> None:
    build_engine(*mini, engine="torch", path=tmp_path / "mini.engine")
    with pytest.raises(DeviceError, match="torch has no device 'teapot'"):
        load_engine(tmp_path / "mini.engine", device="teapot")
