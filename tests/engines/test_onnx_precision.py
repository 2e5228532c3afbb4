"""Typed ONNX: every architecture in float32, float16 and bfloat16, for any batch and size.

ONNX Runtime runs the first two, OpenVINO the third: ONNX Runtime has no bfloat16 convolution here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typed_onnx import DTYPES, assert_typed, runner

from benchmarks.agreement import agreement
from training.scene import scene
from yolov4_fast import Detector, build_engine
from yolov4_fast.checkpoint import Checkpoint, read_checkpoint
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.reference import run_reference
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.onnx_export import PRECISIONS, export_onnx
from yolov4_fast.engines.openvino_engine import has_bf16
from yolov4_fast.network.architectures import NAMES, by_name, settings_of
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import ACTIVATIONS, IMAGE, Conv, Network, Shortcut
from yolov4_fast.network.module import NetworkModule

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "shapes-nano.safetensors"
HALF = ("fp16", "bf16")


def small(name: str) -> tuple[Network, NetworkModule]:
    """An architecture with few channels and fewer layers where its stages repeat the same, and
    with statistics of a batch as training leaves them.
    """
    less = {"width_multiple": 0.125, "depth_multiple": 0.3}
    settings = {key: value for key, value in less.items() if key in settings_of(name)}
    network = by_name(name, num_classes=2, width=96, height=64, **settings)
    return network, trained_like(network)


def trained_like(network: Network) -> NetworkModule:
    torch.manual_seed(0)
    module = NetworkModule(network, bn_momentum=1.0)
    with torch.no_grad():
        module.train()(torch.rand(4, network.channels, network.height, network.width))
    return module.eval()


def assert_near(
    maps: list[np.ndarray], module: NetworkModule, images: Tensor, precision: str
) -> None:
    """To the module in float32. Through random weights rounding grows from layer to layer, so the
    measure of half precision is what one rounding a step makes, in the CUDA engine's reference
    executor; as in tests/gpu/test_gpu_engine.py. And not as near as float32 is: it was half.
    """
    with torch.inference_mode():
        expected = module(images)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.dtype == np.float32 and ours.shape == tuple(theirs.shape)
        assert np.isfinite(ours).all()
    worst = farthest([torch.from_numpy(ours) for ours in maps], expected)
    if precision == "f32":
        assert worst < 1e-4
        return
    folded, weights = fold(module.network, module.state_dict())
    rounded = run_reference(lower(folded), weights, images, DTYPES[precision])
    assert 1e-5 < worst < max(1e-4, 3 * farthest(rounded, expected)), precision


def farthest(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value of each map."""
    return max(
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(maps, expected, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    network, module = small(name)
    other = NetworkModule(network.resized(32, 96)).eval()
    other.load_state_dict(module.state_dict())
    names: dict[str, set[str]] = {}
    for precision in PRECISIONS:
        model = export_onnx(network, module.state_dict(), precision=precision, dynamic_size=True)
        assert_typed(model, precision)
        kinds = [node.op_type for node in model.graph.node]
        assert "BatchNormalization" not in kinds and "Identity" not in kinds
        assert kinds.count("Conv") == len(list(network.convolutions()))
        assert kinds.count("Cast") == (0 if precision == "f32" else 1 + len(network.heads))
        names[precision] = {node.name for node in model.graph.node if node.op_type != "Cast"}
        names[precision] |= {value.name for value in model.graph.initializer}
        if precision == "bf16" and not has_bf16():
            continue
        run = runner(model, precision)
        for batch, which in ((2, module), (1, other)):
            images = torch.rand(batch, 3, which.network.height, which.network.width)
            assert_near(run(images.numpy()), which, images, precision)
    assert names["f32"] == names["fp16"] == names["bf16"]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, precision: str) -> None:
    network = Network(
        (
            Conv(inputs=(IMAGE,), filters=6, size=3, activation=activation),
            Conv(inputs=(0,), filters=6, activation="linear"),
            Shortcut(inputs=(0, 1), activation=activation, weights="per_channel"),
        ),
        width=16,
        height=8,
    )
    module = trained_like(network)
    model = export_onnx(network, module.state_dict(), precision=precision)
    assert_typed(model, precision)
    assert model.graph.output[0].name == "features"
    if precision == "bf16" and not has_bf16():
        return
    images = torch.rand(2, 3, 8, 16)
    assert_near(runner(model, precision)(images.numpy()), module, images, precision)


def test_what_float16_cannot_hold_is_named(mini) -> None:
    state = dict(mini.state)
    state["layers.4.bn.bias"] = torch.full_like(state["layers.4.bn.bias"], 1e5)
    with pytest.raises(EngineError, match=r"layer_4\.bias reaches 1e\+05, which fp16 cannot hold"):
        export_onnx(mini.network, state, precision="fp16")
    export_onnx(mini.network, state, precision="bf16")


def test_an_unknown_precision_is_refused(mini) -> None:
    with pytest.raises(EngineError, match="no ONNX precision 'fp8'; there are f32, fp16, bf16"):
        export_onnx(mini.network, mini.state, precision="fp8")


@pytest.fixture(scope="module")
def reference() -> Iterator[tuple[Checkpoint, Detector, list[Tensor]]]:
    """The sample model, and its detector in float32; and scenes that it finds things in."""
    checkpoint = read_checkpoint(SAMPLE)
    with build_engine(
        checkpoint.network, checkpoint.state, checkpoint.class_names, engine="torch",
        precision="f32", confidence=0.2,
    ) as engine:  # fmt: skip
        pictures = [scene(320, 320, np.random.default_rng((5, number))) for number in range(5)]
        yield (
            checkpoint,
            Detector(engine),
            [torch.from_numpy(picture.image) for picture in pictures],
        )


# As benchmarks/gpu_agreement.py asks of the CUDA engine.
@pytest.mark.parametrize(("precision", "score"), [("f32", 0.001), ("fp16", 0.01), ("bf16", 0.03)])
def test_detections_agree(
    reference: tuple[Checkpoint, Detector, list[Tensor]], precision: str, score: float
) -> None:
    if precision == "bf16" and not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    checkpoint, detector, pictures = reference
    model = export_onnx(checkpoint.network, checkpoint.state, precision=precision)
    batch = detector.preprocess(pictures)
    maps = runner(model, precision)(batch.images.numpy())
    candidates = detector.decode(tuple(map(torch.from_numpy, maps)), batch.placement)
    found = detector.collect(candidates, *detector.suppress(candidates), batch.sizes)
    result = agreement(detector.detect([picture.permute(2, 0, 1) for picture in pictures]), found)
    # In 8 bits of mantissa two neighbouring anchors that see the same thing may change places in
    # NMS; of PyTorch's own bfloat16 3 of 326 boxes do, of OpenVINO's 6 (40 scenes of 416x416).
    lost = 1 if precision == "bf16" else 0
    assert result.boxes > 10 and result.worst_score <= score, str(result)
    assert result.boxes - result.matched <= lost, str(result)
