"""Folds batch normalisation into the convolution before it, in float64, for inference.

w' = w * gamma / sqrt(var + eps), b' = beta - mean * gamma / sqrt(var + eps)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from yolov4_fast.network.layers import Conv, Network
from yolov4_fast.network.module import BN_EPS


def fold(network: Network, state: Mapping[str, Tensor]) -> tuple[Network, dict[str, Tensor]]:
    """The same network without batch normalisation, and its state dict.

    state: of a NetworkModule(network), any floating dtype; the result is float32 on the CPU.
    Applied to an already folded network it changes nothing.
    """
    folded: dict[str, Tensor] = {}
    for index, layer in network.convolutions():
        weight = state[f"layers.{index}.conv.weight"].detach().double().cpu()
        if layer.batch_normalize:
            gamma, beta, mean, var = (
                state[f"layers.{index}.bn.{part}"].detach().double().cpu()
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + BN_EPS)
            weight = weight * scale[:, None, None, None]
            bias = beta - mean * scale
        else:
            bias = state[f"layers.{index}.conv.bias"].detach().double().cpu()
        folded[f"layers.{index}.conv.weight"] = weight.float().contiguous()
        folded[f"layers.{index}.conv.bias"] = bias.float().contiguous()
    return without_normalisation(network), folded


def without_normalisation(network: Network) -> Network:
    """The network that folded weights belong to: its convolutions have biases."""
    layers = (
        replace(layer, batch_normalize=False) if isinstance(layer, Conv) else layer
        for layer in network.layers
    )
    return replace(network, layers=tuple(layers))
