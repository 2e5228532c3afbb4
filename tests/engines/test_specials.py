"""The bag of specials on every engine: all of them give the module's maps in float32.

The CUDA engine's plan runs by its reference executor over a poisoned arena; its kernels have tests
of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from yolov4_fast.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from yolov4_fast.engines import build_engine, load_engine
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.reference import run_reference
from yolov4_fast.engines.onnx_export import export_onnx
from yolov4_fast.engines.openvino_engine import has_bf16
from yolov4_fast.network.architectures import by_name, yolov4
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import ACTIVATIONS, IMAGE, Conv, Head, Network, Shortcut
from yolov4_fast.network.module import NetworkModule

HEADS: dict[str, Any] = {"all_anchors": ((4.0, 6.0),), "mask": (0,), "num_classes": 2}
SWITCHES: dict[str, dict[str, Any]] = {
    "no pooling": {"spp": False},
    "top-down only": {"pan": False},
    "residual stages": {"csp": False},
    "attention": {"sam": True},
    "weighted, relu": {"weighted_shortcuts": "relu"},
    "weighted, softmax": {"weighted_shortcuts": "softmax", "csp": False},
    "prelu": {"activation": "prelu", "neck_activation": "prelu"},
    "all": {
        "activation": "hard_swish",
        "neck_activation": "selu",
        "spp": False,
        "pan": False,
        "sam": True,
        "weighted_shortcuts": "relu",
    },
}


def small(activation: str = "mish", weights: str = "none", normalization: str = "none") -> Network:
    """Convolutions, a sum and a head, at two sizes of the map."""

    def conv(source: int, filters: int = 12, **settings: Any) -> Conv:
        return Conv(inputs=(source,), filters=filters, activation=activation, **settings)

    return Network(
        (
            conv(IMAGE, size=3),
            conv(0),
            conv(1, size=3),
            Shortcut(
                inputs=(2, 0, 1),
                activation=activation,
                weights=weights,
                normalization=normalization,
            ),
            conv(3, 9, size=3, stride=2),
            Conv(inputs=(4,), filters=7, batch_normalize=False),
            Head(inputs=(5,), stride=2, **HEADS),
        ),
        width=32,
        height=24,
    )


def architecture(switches: dict[str, Any]) -> Network:
    return yolov4(
        num_classes=2, width=96, height=64, width_multiple=0.125, depth_multiple=0.3, **switches
    )


def trained_like(network: Network) -> NetworkModule:
    """Statistics of a batch, as training leaves them, and slopes and weights that all differ."""
    torch.manual_seed(0)
    module = NetworkModule(network, bn_momentum=1.0)
    for name, parameter in module.named_parameters():
        if name.endswith((".slope", ".weights")):
            torch.nn.init.uniform_(parameter, -0.2, 1.2)
        elif ".bn." in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        module.train()(torch.rand(4, 3, network.height, network.width))
    return module.eval()


def engines(network: Network, module: NetworkModule, images: Tensor) -> dict[str, Any]:
    state = module.state_dict()
    found: dict[str, Any] = {
        kind: build_engine(
            network, state, ("a", "b"), engine=kind, precision="f32", max_batch=4, device="cpu"
        ).run(images)
        for kind in ("torch", "openvino")
    }
    folded, folded_state = fold(network, state)
    found["cuda"] = run_reference(lower(folded), folded_state, images)
    session = onnxruntime.InferenceSession(
        export_onnx(network, state).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found["onnx"] = [torch.from_numpy(raw) for raw in session.run(None, {"images": images.numpy()})]
    return found


def assert_all_agree(network: Network) -> None:
    module = trained_like(network)
    images = torch.rand(3, 3, network.height, network.width)
    with torch.inference_mode():
        expected = module(images)
    for kind, maps in engines(network, module, images).items():
        assert len(maps) == len(expected)
        for ours, theirs in zip(maps, expected, strict=True):
            worst = float((ours - theirs).abs().max() / theirs.abs().max())
            assert worst < 2e-5, f"{kind} is off by {worst:.2g} of the largest value"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    assert_all_agree(small(activation))


@pytest.mark.parametrize("kind", ["torch", "openvino"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_bfloat16(activation: str, kind: str) -> None:
    """Near, and no nearer than 8 bits of mantissa allow: slopes and weights do not undo it."""
    if kind == "openvino" and not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    network = small(activation, "per_channel", "softmax")
    module = trained_like(network)
    engine = build_engine(
        network, module.state_dict(), ("a", "b"), engine=kind, precision="bf16", device="cpu"
    )
    images = torch.rand(1, 3, 24, 32)
    with torch.inference_mode():
        (expected,) = module(images)
    (raw,) = engine.run(images)
    assert 1e-4 < float((raw - expected).abs().max() / expected.abs().max()) < 5e-2


@pytest.mark.parametrize("normalization", ["none", "relu", "softmax"])
@pytest.mark.parametrize("weights", ["per_feature", "per_channel"])
def test_weighted_shortcuts(weights: str, normalization: str) -> None:
    assert_all_agree(small("mish", weights, normalization))


@pytest.mark.parametrize("case", SWITCHES)
def test_switched_architectures(case: str) -> None:
    assert_all_agree(architecture(SWITCHES[case]))


def test_weights_and_slopes_have_an_effect() -> None:
    """Without which the tests above would say little."""
    network = small("prelu", "per_channel", "softmax")
    module = trained_like(network)
    images = torch.rand(1, 3, 24, 32)
    with torch.inference_mode():
        (before,) = module(images)
        for name in ("layers.0.slope", "layers.3.weights", "layers.3.slope"):
            kept = module.get_parameter(name).clone()
            module.get_parameter(name).view(-1)[1] += 0.5
            assert not torch.allclose(module(images)[0], before, rtol=1e-3), name
            module.get_parameter(name).copy_(kept)


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_engine_files_hold_them(kind: str, tmp_path: Path) -> None:
    network = small("prelu", "per_channel", "softmax")
    module = trained_like(network)
    path = tmp_path / "x.engine"
    build_engine(
        network, module.state_dict(), ("a", "b"), path=path, engine=kind, precision="f32",
        device="cpu",
    )  # fmt: skip
    images = torch.rand(1, 3, 24, 32)
    with torch.inference_mode():
        (expected,) = module(images)
    (raw,) = load_engine(path, "cpu").run(images)
    np.testing.assert_allclose(raw, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoints_hold_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights of shortcuts and slopes as float32 always."""
    network = small("prelu", "per_channel", "softmax")
    state = trained_like(network).state_dict()
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, network, state, ("a", "b"), dtype=dtype)
    read = read_checkpoint(path)
    assert read.network == network and set(read.state) == set(network.tensors())
    for name in ("layers.0.slope", "layers.3.weights", "layers.3.slope"):
        assert torch.equal(read.state[name], state[name])
    for name, wrong in (("layers.3.weights", torch.ones(3)), ("layers.0.slope", None)):
        changed = {key: value for key, value in state.items() if key != name}
        write_checkpoint(
            path, network, changed | ({} if wrong is None else {name: wrong}), ("a", "b")
        )
        with pytest.raises(CheckpointError, match=f"{name} should be of shape .*, it is"):
            read_checkpoint(path)


def test_a_switched_network_is_built_from_its_name() -> None:
    network = by_name("yolov4-nano", num_classes=2, width=64, height=64, sam=True, spp=False)
    module = NetworkModule(network).eval()
    engine = build_engine(
        network, module.state_dict(), ("a", "b"), engine="torch", precision="f32", device="cpu"
    )
    assert engine.network == fold(network, module.state_dict())[0]
