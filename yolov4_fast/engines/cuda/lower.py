"""Lowering: a folded Network -> a Plan of fused steps over channels-last buffers.

What costs no step of its own:
- a concatenation: its inputs are written straight into their slices of its buffer, also where one
  lies within another. Only an input that cannot lie there (it lies in another one already, is a
  part of something, the image, or a map that a head reads) is copied: an Upsample of factor 1.
- a route of one layer, or of a group of its channels: the same memory, seen as another view.
- a linear shortcut of two inputs, one of them a convolution that nothing else reads: the sum is
  that convolution's residual, and it runs where the shortcut stood, so the other is there by then.
  (Not with weights of its own, nor of a convolution with prelu: these take a Combine.)
- a pyramid (SPP): all odd max-poolings of stride 1 of one source are one step.
- what no head needs: it is left out.

Every slice of a buffer is written by one step; `merge_siblings` then uses dead slices twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from yolov4_fast.engines.cuda.dataflow import Dataflow, Part
from yolov4_fast.engines.cuda.plan import (
    ALIGNMENT,
    MAX_SOURCES,
    Buffer,
    Combine,
    Convolution,
    Plan,
    Pool,
    PyramidPool,
    Step,
    Upsample,
    View,
)
from yolov4_fast.engines.cuda.siblings import merge_siblings as merge
from yolov4_fast.engines.engine import EngineError
from yolov4_fast.network import layers as specs
from yolov4_fast.network.layers import IMAGE, Network, Shape

KNOWN = (
    specs.Conv,
    specs.Shortcut,
    specs.Route,
    specs.MaxPool,
    specs.Upsample,
    specs.Sam,
    specs.Head,
)


def lower(network: Network, *, merge_siblings: bool = True) -> Plan:
    """The plan of a folded network for its own input size; maps in the order of its heads.

    A network without heads has one map, the output of its last layer. merge_siblings: let one
    convolution compute several 1x1 ones of the same source. Raises EngineError for a layer that
    still has its batch normalisation or that no step exists for.
    """
    for index, layer in enumerate(network.layers):
        if type(layer) not in KNOWN:
            raise EngineError(
                f"layer {index}: the cuda engine has no step for {type(layer).__name__}; it knows "
                + ", ".join(spec.__name__ for spec in KNOWN)
            )
        if isinstance(layer, specs.Conv) and layer.batch_normalize:
            raise EngineError(
                f"layer {index} (convolutional) has batch normalisation: fold the network first"
            )
        if isinstance(layer, specs.Shortcut) and layer.normalization != "none":
            raise EngineError(
                f"layer {index} (shortcut) normalises its weights: fold the network first"
            )
    plan = _Lowering(network).plan()
    return merge(plan) if merge_siblings else plan


class _Lowering:
    """Lays the outputs of layers out in buffers and writes the steps that make them."""

    def __init__(self, network: Network) -> None:
        self.flow = Dataflow(network)
        self.buffers: list[Buffer] = []
        self.roots: dict[int, int] = {}  # layer -> its buffer

    def buffer(self, shape: Shape, alignment: int = ALIGNMENT) -> int:
        channels, height, width = shape
        self.buffers.append(Buffer(height, width, -(-channels // alignment) * alignment))
        return len(self.buffers) - 1

    def out(self, index: int) -> View:
        """Where a layer's output goes."""
        return self.view(self.flow.parts[index])

    def view(self, part: Part) -> View:
        """Where a part of a layer's output lies."""
        root, offset = part.layer, part.offset
        while root in self.flow.homes:
            root, within = self.flow.homes[root]
            offset += within
        if root not in self.roots:
            self.roots[root] = self.buffer(
                self.flow.shapes[root], 1 if root == IMAGE else ALIGNMENT
            )
        return View(self.roots[root], offset, part.channels)

    def plan(self) -> Plan:
        image = self.out(IMAGE)
        absorbed = self.flow.absorbed
        steps = [s for i in self.flow.live if i not in absorbed for s in self.steps(i)]
        maps: list[View] = []
        for part in self.flow.outputs:
            view = self.view(part)
            if part.layer == IMAGE or not self.flow.is_whole(part):
                _, height, width = self.flow.shapes[part.layer]
                own = View(self.buffer((part.channels, height, width)), 0, part.channels)
                steps.append(Upsample(layers=(), source=view, out=own, factor=1))
                view = own
            maps.append(view)
        return Plan(tuple(self.buffers), tuple(steps), image, tuple(maps))

    def steps(self, index: int) -> Iterator[Step]:
        """The steps that make a layer's output."""
        layer, reads = self.flow.layers[index], self.flow.reads(index)
        match layer:
            case specs.Conv(activation="prelu"):
                scratch = self.scratch(index)
                yield self.convolution(index, (index,), scratch, None)
                yield self.sum(index, (scratch,), "prelu")
            case specs.Conv():
                yield self.convolution(index, (index,), self.out(index), None)
            case specs.Shortcut() if index in self.flow.fused:
                conv = self.flow.fused[index]
                (other,) = (part for part in reads if part.layer != conv)
                yield self.convolution(conv, (conv, index), self.out(index), self.view(other))
            case specs.Shortcut():
                yield from self.shortcut(index, layer, [self.view(part) for part in reads])
            case specs.Sam():
                yield Combine(
                    layers=(index,),
                    sources=tuple(map(self.view, reads)),
                    out=self.out(index),
                    product=True,
                    activation="linear",
                )
            case specs.MaxPool():
                yield self.pool(index, layer)
            case specs.Upsample():
                yield Upsample(
                    layers=(index,),
                    source=self.view(reads[0]),
                    out=self.out(index),
                    factor=layer.stride,
                )
            case specs.Route():
                for source, target in self.flow.copies.get(index, ()):
                    yield Upsample(
                        layers=(index,), source=self.view(source), out=self.view(target), factor=1
                    )

    def convolution(
        self, index: int, layers: tuple[int, ...], out: View, residual: View | None
    ) -> Convolution:
        layer = self.flow.convolution(index)
        return Convolution(
            layers=layers,
            weights=(index,),
            source=self.view(self.flow.reads(index)[0]),
            out=out,
            residual=residual,
            size=layer.size,
            stride=layer.stride,
            padding=layer.pad,
            groups=layer.groups,
            activation="linear" if layer.activation == "prelu" else layer.activation,
        )

    def shortcut(self, index: int, layer: specs.Shortcut, sources: list[View]) -> Iterator[Combine]:
        """One step, or where one does not take so many sources several, over scratch buffers."""
        first = None if layer.weights == "none" else 0
        if first is not None and len(sources) > MAX_SOURCES:
            partial = []
            for row in range(0, len(sources), MAX_SOURCES):
                partial.append(self.scratch(index))
                some = tuple(sources[row : row + MAX_SOURCES])
                yield self.sum(index, some, "linear", partial[-1], row)
            sources, first = partial, None
        while len(sources) > MAX_SOURCES:
            scratch = self.scratch(index)
            yield self.sum(index, tuple(sources[:MAX_SOURCES]), "linear", scratch)
            sources[:MAX_SOURCES] = [scratch]
        yield self.sum(index, tuple(sources), layer.activation, row=first)

    def sum(
        self,
        index: int,
        sources: tuple[View, ...],
        activation: str,
        out: View | None = None,
        row: int | None = None,
    ) -> Combine:
        """out: by default where the layer's output goes."""
        return Combine(
            layers=(index,),
            sources=sources,
            out=out or self.out(index),
            product=False,
            activation=activation,
            row=row,
        )

    def scratch(self, index: int) -> View:
        """A buffer like the layer's output."""
        shape = self.flow.shapes[index]
        return View(self.buffer(shape), 0, shape[0])

    def pool(self, index: int, layer: specs.MaxPool) -> Step:
        (source,) = self.flow.reads(index)
        if index in self.flow.pyramids:
            pools = self.flow.pyramids[index]
            return PyramidPool(
                layers=pools,
                source=self.view(source),
                outs=tuple(self.out(pool) for pool in pools),
                sizes=tuple(self.flow.pool(pool).size for pool in pools),
            )
        _, height, width = self.flow.shapes[source.layer]
        _, rows, columns = self.flow.shapes[index]
        return Pool(
            layers=(index,),
            source=self.view(source),
            out=self.out(index),
            size=layer.size,
            stride=layer.stride,
            pads=(*layer.pads(height, rows), *layer.pads(width, columns)),
        )
