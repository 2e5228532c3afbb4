"""DropBlock: squares of feature maps are set to 0 while training (Ghiasi et al., arXiv 1810.12890).

Of a map h x w, blocks of size b (no larger than the map) and a probability p, every position that
a whole block fits around is the seed of a block with probability

    gamma = p / b^2 * (h * w) / ((h - b + 1) * (w - b + 1))                     (equation 1)

each channel for itself, and what is left is multiplied by (all values / values left), so that the
mean stays. Seeds lie where their block is within the map, as in the paper, so cells at the border
are dropped less often than those in the middle. Where blocks overlap less than p is dropped.

Places of a network (`places`): the end of each backbone stage at strides 16 and 32, as the paper
chooses the last two groups of a ResNet, and the map that each head's own convolution reads, with
which the neck's last block ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from yolov4_fast.network.layers import (
    Conv,
    Head,
    MaxPool,
    Network,
    Route,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import NetworkModule

STAGES = (16, 32)  # strides at whose end a backbone's maps are dropped from


def drop_block(x: Tensor, probability: float, size: int) -> Tensor:
    """x [B, C, h, w] with squares of `size` cells set to 0 and the rest scaled up.

    Draws from torch's own generator of x's device. A probability of 0 gives x itself.
    """
    if not probability:
        return x
    batch, channels, height, width = x.shape
    size = min(size, height, width)
    room = height - size + 1, width - size + 1
    gamma = probability / size**2 * (height * width) / (room[0] * room[1])
    # Channels last, as the maps are, so that every step works on long runs of bytes.
    seeds = torch.rand((batch, *room, channels), device=x.device) < gamma
    rows = seeds.new_zeros((batch, height, room[1], channels))
    dropped = seeds.new_zeros((batch, height, width, channels))
    for offset in range(size):  # a block's first corner is its seed
        rows[:, offset : offset + room[0]] |= seeds
    for offset in range(size):
        dropped[:, :, offset : offset + room[1]] |= rows
    kept = dropped.logical_not_().permute(0, 3, 1, 2)
    scale = kept.numel() / kept.count_nonzero().clamp(min=1)  # float32, on x's device
    return x * (kept * scale.to(x.dtype))


class DropBlocks:
    """DropBlock at some places of a module: in training mode, with the present `probability`.

    probability: 0 to begin with; the paper raises it linearly over the run. places: numbers of the
    layers whose outputs are dropped from.
    """

    def __init__(self, module: NetworkModule, size: int) -> None:
        if size < 1:
            raise ValueError(f"the size of a dropped block must be at least 1, not {size}")
        self.probability, self.size = 0.0, size
        self.places = places(module.network)
        if not self.places:
            raise ValueError("the network has no place for DropBlock: no stages and no heads")
        blocks = [module.layers[str(index)] for index in self.places]
        self._handles = [block.register_forward_hook(self._drop) for block in blocks]

    def _drop(self, block: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return drop_block(output, self.probability, self.size) if block.training else output

    def remove(self) -> None:
        """The module is again as it was."""
        for handle in self._handles:
            handle.remove()


def attach_dropblock(module: NetworkModule, size: int) -> DropBlocks:
    """DropBlock at the `places` of a module, whose state dict stays the same. Its blocks are hooked
    as they are: whoever replaces blocks does so first.
    """
    return DropBlocks(module, size)


def places(network: Network) -> tuple[int, ...]:
    """Layers (all of them convolutions) whose outputs DropBlock acts on, in ascending order.

    At strides 16 and 32 the last convolution of the backbone that reads a concatenation, with which
    a cross-stage stage ends; where there is none the last one that a residual sum adds. The
    backbone ends at the first pooling of stride 1, upsampling or head. And for each head the
    convolution, if it is one, that the head's own convolution reads.
    """
    stage_ends = {_stage_end(network, stride) for stride in STAGES}
    return tuple(sorted({*stage_ends, *(_before(network, head) for head in network.heads)} - {-1}))


def _stage_end(network: Network, stride: int) -> int:
    """The number of a layer, or -1."""
    joined = added = -1
    layers = network.layers
    for index, (layer, shape) in enumerate(zip(layers, network.shapes(), strict=True)):
        if isinstance(layer, Upsample | Head) or (isinstance(layer, MaxPool) and layer.stride == 1):
            break
        if shape[1] * stride != network.height:
            continue
        if isinstance(layer, Conv):
            source = layers[layer.inputs[0]] if layer.inputs[0] >= 0 else None
            joined = index if isinstance(source, Route) and len(source.inputs) > 1 else joined
        elif isinstance(layer, Shortcut):
            branches = [i for i in layer.inputs if i >= 0 and isinstance(layers[i], Conv)]
            added = max([added, *branches])
    return joined if joined >= 0 else added


def _before(network: Network, head: Head) -> int:
    """The convolution that feeds a head's own, or -1."""
    own = network.layers[head.inputs[0]]
    source = own.inputs[0] if isinstance(own, Conv) else -1
    return source if source >= 0 and isinstance(network.layers[source], Conv) else -1
