"""Folds what inference has no use for, in float64: batch normalisation into the convolution before
it, the normalisation of a shortcut's weights into those weights.

w' = w * gamma / sqrt(var + eps), b' = beta - mean * gamma / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from yolov4_fast.network.layers import Conv, Layer, Network, Shortcut
from yolov4_fast.network.module import BN_EPS, coefficients


def fold(network: Network, state: Mapping[str, Tensor]) -> tuple[Network, dict[str, Tensor]]:
    """The same network without normalisation, and its state dict.

    state: of a NetworkModule(network), any floating dtype; the result is float32 on the CPU.
    Applied to an already folded network it changes nothing.
    """
    folded: dict[str, Tensor] = {}
    for index, (layer, shapes) in enumerate(
        zip(network.layers, network.input_shapes(), strict=True)
    ):
        stored = {
            name: state[f"layers.{index}.{name}"].detach().double().cpu()
            for name in layer.tensors(*shapes)
        }
        for name, values in _folded(layer, stored).items():
            folded[f"layers.{index}.{name}"] = values.float().contiguous()
    return without_normalisation(network), folded


def _folded(layer: Layer, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors, float64."""
    match layer:
        case Conv(batch_normalize=True):
            scale = stored["bn.weight"] / torch.sqrt(stored.pop("bn.running_var") + BN_EPS)
            bias = stored.pop("bn.bias") - stored.pop("bn.running_mean") * scale
            del stored["bn.weight"]
            weight = stored["conv.weight"] * scale[:, None, None, None]
            return stored | {"conv.weight": weight, "conv.bias": bias}
        case Shortcut() if "weights" in stored:
            return stored | {"weights": coefficients(stored["weights"], layer.normalization)}
    return stored


def without_normalisation(network: Network) -> Network:
    """The network that folded weights belong to: its convolutions have biases, and the weights of
    its shortcuts are taken as they are.
    """

    def plain(layer: Layer) -> Layer:
        match layer:
            case Conv():
                return replace(layer, batch_normalize=False)
            case Shortcut():
                return replace(layer, normalization="none")
        return layer

    return replace(network, layers=tuple(map(plain, network.layers)))
