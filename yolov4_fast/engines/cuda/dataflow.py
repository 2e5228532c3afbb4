"""What a network's layers read of each other, and what of that needs no step of its own.

Layers here are those that make something: a route of one layer is resolved into a part of another
layer's output.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from yolov4_fast.network.layers import IMAGE, Conv, MaxPool, Network, Route, Shape, Shortcut


class Part(NamedTuple):
    """`channels` channels of a layer's output from `offset` on."""

    layer: int
    offset: int
    channels: int

    def slice(self, groups: int, group: int) -> Part:
        channels = self.channels // groups
        return Part(self.layer, self.offset + group * channels, channels)


class Dataflow:
    """Decisions about a network, by layer number.

    shapes: of every layer's output, and of the image. parts: what every layer's output is.
    outputs: what the heads read, in their order; the last layer's output where there is no head.
    live: layers that an output depends on, in order. fused: shortcuts that a convolution takes
    over -> that convolution. pyramids: first pooling of each pyramid -> all of its poolings,
    smallest windows first. absorbed: layers that another's step makes. homes: layers whose output
    lies in a concatenation -> the concatenation, and the channel it begins at. copies:
    concatenation -> what must be copied, and the part of itself that it goes to.
    """

    def __init__(self, network: Network) -> None:
        self.layers = network.layers
        self.shapes: dict[int, Shape] = dict(enumerate(network.shapes()))
        self.shapes[IMAGE] = (network.channels, network.height, network.width)
        self.parts = self._resolve()
        heads = [layer.inputs[0] for layer in network.heads]
        self.outputs = [self.parts[source] for source in heads or [len(self.layers) - 1]]
        self.live = self._live()
        self.fused = self._fuse()
        self.pyramids = self._pyramids()
        self.absorbed = {
            *self.fused.values(),
            *(pool for first, pools in self.pyramids.items() for pool in pools if pool != first),
        }
        self.homes: dict[int, tuple[int, int]] = {}
        self.copies: dict[int, list[tuple[Part, Part]]] = {}
        for index in self.live:
            if isinstance(self.layers[index], Route):
                self._concatenate(index)

    def convolution(self, index: int) -> Conv:
        layer = self.layers[index]
        assert isinstance(layer, Conv)
        return layer

    def pool(self, index: int) -> MaxPool:
        layer = self.layers[index]
        assert isinstance(layer, MaxPool)
        return layer

    def _resolve(self) -> dict[int, Part]:
        """Every layer's output: its own, or for a route of one layer a part of that layer's."""
        parts = {IMAGE: Part(IMAGE, 0, self.shapes[IMAGE][0])}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Route) and len(layer.inputs) == 1:
                parts[index] = parts[layer.inputs[0]].slice(layer.groups, layer.group)
            else:
                parts[index] = Part(index, 0, self.shapes[index][0])
        return parts

    def reads(self, index: int) -> tuple[Part, ...]:
        """What a layer reads, in the order of its inputs."""
        if index == IMAGE:
            return ()
        layer = self.layers[index]
        parts = tuple(self.parts[source] for source in layer.inputs)
        if isinstance(layer, Route):
            parts = tuple(part.slice(layer.groups, layer.group) for part in parts)
        return parts

    def is_whole(self, part: Part) -> bool:
        return part.channels == self.shapes[part.layer][0]

    def _live(self) -> list[int]:
        """Layers whose output some map depends on, in order."""
        live: set[int] = set()
        pending = [part.layer for part in self.outputs]
        while pending:
            index = pending.pop()
            if index not in live:
                live.add(index)
                pending += [part.layer for part in self.reads(index)]
        return sorted(live - {IMAGE})

    def _fuse(self) -> dict[int, int]:
        readers = Counter(part.layer for index in self.live for part in self.reads(index))
        readers.update(part.layer for part in self.outputs)
        fused: dict[int, int] = {}
        for index in self.live:
            layer, reads = self.layers[index], self.reads(index)
            if (
                not isinstance(layer, Shortcut)
                or layer.activation != "linear"
                or layer.weights != "none"
                or len(reads) > 2
            ):
                continue
            candidates = [
                part.layer
                for part in reads
                if part.layer != IMAGE
                and isinstance(conv := self.layers[part.layer], Conv)
                and conv.activation != "prelu"
                and readers[part.layer] == 1
                and self.is_whole(part)
            ]
            if candidates:
                fused[index] = max(candidates)
        return fused

    def _pyramids(self) -> dict[int, tuple[int, ...]]:
        """Poolings that keep the size and pad alike on all sides, two or more of one source."""
        groups: dict[Part, list[int]] = {}
        for index in self.live:
            layer = self.layers[index]
            if (
                isinstance(layer, MaxPool)
                and layer.stride == 1
                and layer.size > 1
                and layer.size % 2 == 1
                and layer.pad == layer.size - 1
            ):
                groups.setdefault(self.reads(index)[0], []).append(index)
        return {
            group[0]: tuple(sorted(group, key=lambda index: self.pool(index).size))
            for group in groups.values()
            if len(group) > 1
        }

    def _concatenate(self, index: int) -> None:
        """Let the inputs of a concatenation lie in it where they can; copy the others."""
        roots = {IMAGE, *(part.layer for part in self.outputs)}
        offset = 0
        for part in self.reads(index):
            if self.is_whole(part) and part.layer not in roots and part.layer not in self.homes:
                self.homes[part.layer] = (index, offset)
            else:
                target = Part(index, offset, part.channels)
                self.copies.setdefault(index, []).append((part, target))
            offset += part.channels
