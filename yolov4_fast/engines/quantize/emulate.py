"""INT8 arithmetic in torch float32: a folded network whose convolutions read rounded values.

The emulation rounds what a convolution reads, its filters, and what is added in a shortcut. It
tells what rounding costs without any runtime for INT8, one convolution at a time or all together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.network.layers import IMAGE, Conv, Head, Network, Shortcut
from yolov4_fast.network.module import ConvBlock, NetworkModule, activate

LEVELS = 127  # of int8 that lie symmetrically around 0
# Least scales: the least normal number of float16, so that both typings hold them to 11 bits; of
# filters, which folding may make small, the number 2^-20 that float16 still holds to 5 bits.
SMALLEST, SMALLEST_FILTER = 2.0**-14, 2.0**-20

Outputs = dict[int, Tensor]  # by layer, IMAGE for the picture
Scales = Mapping[int, float]  # likewise: what a stored 1 is worth


def scale_of(threshold: float) -> float:
    """What a stored 1 is worth where `threshold` is the largest value kept; exact in float16."""
    return float(torch.tensor(max(threshold / LEVELS, SMALLEST)).half())


def round_tensor(x: Tensor, scale: float) -> Tensor:
    """x as int8 holds it: nearest multiple of the scale, ties to even, from -128 to 127 of it."""
    return (x / scale).round().clamp(-LEVELS - 1, LEVELS) * scale


def filter_scales(weight: Tensor) -> Tensor:
    """Of filters [O, I, k, k], a scale for each output channel, made of its largest -> [O]."""
    return (weight.abs().amax((1, 2, 3)) / LEVELS).clamp_min(SMALLEST_FILTER).half().float()


def round_filters(weight: Tensor) -> Tensor:
    """Filters [O, I, k, k] as int8 holds them."""
    scale = filter_scales(weight).view(-1, 1, 1, 1)
    return (weight / scale).round().clamp(-LEVELS - 1, LEVELS) * scale


class Emulation:
    """A folded network and its weights, on the CPU, run layer by layer."""

    def __init__(self, network: Network, state: Mapping[str, Tensor]) -> None:
        self.network = network
        module = NetworkModule(network)
        module.load_state_dict(dict(state))
        self.module = module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def outputs(
        self,
        images: Tensor,
        scales: Scales | None = None,
        rounded: Collection[int] = (),
    ) -> Outputs:
        """What every layer gives for images [B, 3, H, W], with the convolutions of `rounded` in
        INT8: what they read, and what is added, is rounded by the scale of its layer in `scales`.
        """
        found: Outputs = {IMAGE: images.contiguous(memory_format=torch.channels_last)}
        for index, layer in enumerate(self.network.layers):
            if not isinstance(layer, Head):
                found[index] = self._layer(index, found, scales or {}, rounded)
        return found

    @torch.inference_mode()
    def changed(self, exact: Outputs, scales: Scales, convolution: int) -> Outputs:
        """`outputs` with this one convolution in INT8: only what depends on it is computed."""
        found = dict(exact)
        found[convolution] = self._layer(convolution, found, scales, (convolution,))
        moved = {convolution}
        for index, layer in enumerate(self.network.layers[convolution + 1 :], convolution + 1):
            if not isinstance(layer, Head) and moved.intersection(layer.inputs):
                found[index] = self._layer(index, found, {}, ())
                moved.add(index)
        return found

    def maps(self, outputs: Outputs) -> list[Tensor]:
        """The raw maps of the heads."""
        return [outputs[head.inputs[0]] for head in self.network.heads]

    def _layer(
        self, index: int, found: Outputs, scales: Scales, rounded: Collection[int]
    ) -> Tensor:
        layer = self.network.layers[index]
        inputs = [found[source] for source in layer.inputs]
        if isinstance(layer, Conv) and index in rounded:
            block = self.module.layers[str(index)]
            assert isinstance(block, ConvBlock)
            return activate(
                F.conv2d(
                    round_tensor(inputs[0], scales[layer.inputs[0]]),
                    round_filters(block.conv.weight),
                    block.conv.bias,
                    layer.stride,
                    layer.pad,
                    groups=layer.groups,
                ),
                layer.activation,
                block.slope,
            )
        if isinstance(layer, Shortcut) and layer.weights == "none":
            inputs = [
                round_tensor(x, scales[source]) if source in scales else x
                for source, x in zip(layer.inputs, inputs, strict=True)
            ]
        return self.module._run(index, layer, inputs)
