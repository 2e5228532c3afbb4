"""What the tests of quantisation share: a network with all that matters to it, small, with signed
values of many sizes; and pictures.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import (
    IMAGE,
    Conv,
    Head,
    MaxPool,
    Network,
    Route,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import NetworkModule

CLASSES = ("a", "b", "c")
ANCHORS = ((10.0, 14.0), (23.0, 27.0))
HEAD_CONVOLUTION = 15


def conv(source: int, filters: int, size: int = 1, **settings: object) -> Conv:
    kind = {"activation": "mish"} | settings
    return Conv(inputs=(source,), filters=filters, size=size, **kind)  # type: ignore[arg-type]


def small_network() -> Network:
    """64x48; a residual, a join of two branches, pooling, an upsampled branch, a group of channels.

    The joined branches are leaky and linear, so that both are signed.
    """
    return Network(
        layers=(
            conv(IMAGE, 8, 3),
            conv(0, 16, 3, stride=2),
            conv(1, 16, activation="leaky"),
            conv(2, 16, 3),
            Shortcut(inputs=(3, 2)),
            Route(inputs=(1,)),
            conv(5, 16, activation="linear"),
            Route(inputs=(6, 4)),
            conv(7, 16, activation="leaky"),
            MaxPool(inputs=(8,), size=2, stride=2),
            conv(9, 16, 3, activation="leaky"),
            Upsample(inputs=(10,), stride=2),
            Route(inputs=(8,), groups=2, group=1),
            Route(inputs=(12, 11)),
            conv(13, 16, 3, stride=2),
            conv(14, 2 * (5 + len(CLASSES)), batch_normalize=False, activation="linear"),
            Head(inputs=(15,), all_anchors=ANCHORS, mask=(0, 1), num_classes=3, stride=4),
        ),
        width=64,
        height=48,
    )


def small_state(network: Network, scale: float = 1.0) -> dict[str, Tensor]:
    """Weights of which many boxes come; scale: of what is joined."""
    torch.manual_seed(1)
    module = NetworkModule(network)
    state = module.state_dict()
    for index in (3, 6):
        state[f"layers.{index}.bn.weight"] *= scale
    torch.nn.init.normal_(state["layers.15.conv.weight"], std=0.5)
    torch.nn.init.normal_(state["layers.15.conv.bias"], std=0.5)
    return state


def pictures(count: int, height: int = 48, width: int = 64) -> list[Tensor]:
    """Each [1, 3, height, width] float32 in 0..1: smooth, with something bright in it."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    return list(torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").split(1))


def folded(scale: float = 1.0) -> tuple[Network, dict[str, Tensor]]:
    network = small_network()
    return fold(network, small_state(network, scale))


def in_onnxruntime(model: onnx.ModelProto, images: Tensor) -> list[np.ndarray]:
    """The maps, nothing fused: ONNX Runtime 1.31 fuses Q/DQ around float16 into what it cannot
    load (QLinearConcat).
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"images": images.numpy()})


def relative(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """Root of the mean square of the difference, as a share of what was expected."""
    first, second = np.asarray(found), np.asarray(expected)
    return float(np.sqrt(((first - second) ** 2).mean() / (second**2).mean()))
