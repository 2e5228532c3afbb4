"""A plan: what the CUDA engine runs, as data. Fused steps over channels-last buffers.

Activations live in buffers [B, height, width, channels] (NHWC). A step reads and writes *views*:
slices of a buffer's channels. A convolution writes straight into its slice of the buffer that a
concatenation reads, so concatenation costs nothing; an activation and a residual sum happen in the
convolution that makes them; batch normalisation is folded before.

`lower` makes a plan of a Network, `place` gives its buffers offsets in one arena.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 8  # channels that a buffer's rows are rounded up to: 16 bytes in half precision
MAX_SOURCES = 4  # of one Combine


@dataclass(frozen=True)
class Buffer:
    """An activation of one image: [height, width, channels], channels-last.

    channels: of a row in memory, a multiple of ALIGNMENT except in the image; the views of it
    together may be a few channels narrower. Nothing reads what lies beyond them.
    """

    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class View:
    """`channels` channels of a buffer from `offset` on."""

    buffer: int
    offset: int
    channels: int

    @property
    def end(self) -> int:
        return self.offset + self.channels

    def overlaps(self, other: View) -> bool:
        return self.buffer == other.buffer and self.offset < other.end and other.offset < self.end


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kernel (or a few) that reads some views and writes others; `layers` names its origin."""

    layers: tuple[int, ...]

    @property
    def reads(self) -> tuple[View, ...]:
        raise NotImplementedError

    @property
    def writes(self) -> tuple[View, ...]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Convolution(Step):
    """out = activation(convolution(source) + bias) (+ residual).

    weights: layers whose filters it computes, side by side in this order (several where sibling
    convolutions of one source were merged). activation: any but prelu.
    """

    weights: tuple[int, ...]
    source: View
    out: View
    residual: View | None
    size: int
    stride: int
    padding: int
    groups: int
    activation: str

    @property
    def key(self) -> int:
        """Of its filters and biases among all weights of the plan."""
        return self.weights[0]

    @property
    def reads(self) -> tuple[View, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def writes(self) -> tuple[View, ...]:
        return (self.out,)


@dataclass(frozen=True, kw_only=True)
class Pool(Step):
    """Max-pooling; pads: cells before and after, (top, bottom, left, right)."""

    source: View
    out: View
    size: int
    stride: int
    pads: tuple[int, int, int, int]

    @property
    def reads(self) -> tuple[View, ...]:
        return (self.source,)

    @property
    def writes(self) -> tuple[View, ...]:
        return (self.out,)


@dataclass(frozen=True, kw_only=True)
class PyramidPool(Step):
    """SPP: max-poolings of stride 1 and odd sizes of one source, each of the source's size."""

    source: View
    outs: tuple[View, ...]
    sizes: tuple[int, ...]

    @property
    def reads(self) -> tuple[View, ...]:
        return (self.source,)

    @property
    def writes(self) -> tuple[View, ...]:
        return self.outs


@dataclass(frozen=True, kw_only=True)
class Upsample(Step):
    """Nearest-neighbour by a whole factor; factor 1 is a copy into another buffer."""

    source: View
    out: View
    factor: int

    @property
    def reads(self) -> tuple[View, ...]:
        return (self.source,)

    @property
    def writes(self) -> tuple[View, ...]:
        return (self.out,)


@dataclass(frozen=True, kw_only=True)
class Combine(Step):
    """out = activation(sum, weighted or not, or product of the sources): what no convolution could
    take over. With the activation prelu it may have one source.

    row: of a weighted sum, the first source's among the weights of its layer; the others follow.
    """

    sources: tuple[View, ...]
    out: View
    product: bool
    activation: str
    row: int | None = None

    @property
    def key(self) -> int | None:
        """Of its weights and slopes among all weights of the plan; None where it has neither. Not
        the layer's number, which is a convolution's where the step is its prelu.
        """
        return None if self.row is None and self.activation != "prelu" else ~self.layers[0]

    @property
    def reads(self) -> tuple[View, ...]:
        return self.sources

    @property
    def writes(self) -> tuple[View, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Plan:
    """Steps in order. `image` is written before the first; `maps`, the raw maps of the heads in the
    network's order, are read after the last.
    """

    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    image: View
    maps: tuple[View, ...]

    def __post_init__(self) -> None:
        for view in (
            self.image,
            *self.maps,
            *(v for s in self.steps for v in (*s.reads, *s.writes)),
        ):
            if (
                not 0
                <= view.offset
                < view.offset + view.channels
                <= self.buffers[view.buffer].channels
            ):
                raise ValueError(f"{view} does not lie in {self.buffers[view.buffer]}")
