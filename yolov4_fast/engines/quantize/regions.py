"""Which tensors of a network become INT8, given the convolutions that do.

A tensor is rounded where it is made, once for all that read it: what an INT8 convolution reads, and
what is only moved on the way there (concatenated, pooled, upsampled) from its first source on, so
that these ops run in INT8 too. A shortcut in such a region adds rounded tensors, both of them: the
runtimes then fuse it into the convolution before it. Tensors that are only moved into each other
share one scale, without which a concatenation would have to compute.

Left alone: shortcuts of more than two inputs, with weights, or with an activation, and Sam.
"""

from __future__ import annotations

from collections.abc import Collection

from yolov4_fast.network.layers import IMAGE, Conv, MaxPool, Network, Route, Shortcut, Upsample

MOVES = (Route, MaxPool, Upsample)  # layers that select and copy values


def head_convolutions(network: Network) -> frozenset[int]:
    """The convolutions that make the raw maps."""
    found = (source_of(network, head.inputs[0]) for head in network.heads)
    return frozenset(i for i in found if i != IMAGE and isinstance(network.layers[i], Conv))


def source_of(network: Network, index: int) -> int:
    """The layer whose tensor this one is: a route from one whole layer has none of its own."""
    while index != IMAGE:
        layer = network.layers[index]
        if not isinstance(layer, Route) or len(layer.inputs) > 1 or layer.groups > 1:
            break
        index = layer.inputs[0]
    return index


def common_scales(network: Network) -> dict[int, int]:
    """For every layer, and IMAGE, the first of those that share its scale."""
    first = {index: index for index in range(IMAGE, len(network.layers))}

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for index, layer in enumerate(network.layers):
        if isinstance(layer, MOVES):
            roots = sorted({root(index), *map(root, layer.inputs)})
            for other in roots[1:]:
                first[other] = roots[0]
    return {index: root(index) for index in first}


def is_plain_sum(network: Network, index: int) -> bool:
    """Whether a layer is one addition of two tensors."""
    layer = network.layers[index] if index != IMAGE else None
    return (
        isinstance(layer, Shortcut)
        and len(layer.inputs) == 2
        and layer.weights == "none"
        and layer.activation == "linear"
    )


def region(network: Network, convolutions: Collection[int]) -> frozenset[int]:
    """Layers (and IMAGE) whose output is rounded where these convolutions are in INT8."""
    found: set[int] = set()
    waiting = [network.layers[index].inputs[0] for index in convolutions]
    while waiting:
        index = source_of(network, waiting.pop())
        if index in found:
            continue
        found.add(index)
        if index == IMAGE:
            continue
        layer = network.layers[index]
        if isinstance(layer, MOVES) or is_plain_sum(network, index):
            waiting.extend(layer.inputs)
    return frozenset(found)
