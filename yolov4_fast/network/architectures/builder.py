"""`Builder` appends layers and hands back their numbers; blocks that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from yolov4_fast.network.layers import (
    SHORTCUT_NORMALIZATIONS,
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shortcut,
    Upsample,
)

Anchors = tuple[tuple[float, float], ...]
Training = tuple[tuple[str, str], ...]

STRIDE = 32  # the coarsest of every family here


@dataclass
class Builder:
    """Appends layers and hands back their numbers; widths and repeats are scaled on the way in.

    activation: of convolutions for which none is named. weighted_shortcuts: how the weights of
    residual connections, one an input, are normalised; "none": plain sums.
    """

    width_multiple: float = 1.0
    depth_multiple: float = 1.0
    activation: str = "mish"
    weighted_shortcuts: str = "none"
    layers: list[Layer] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("width_multiple", "depth_multiple"):
            if not 0 < getattr(self, name) < inf:
                raise NetworkError(f"a {name} of {getattr(self, name)} is not positive and finite")
        if self.weighted_shortcuts not in SHORTCUT_NORMALIZATIONS:
            raise NetworkError(
                f"weighted_shortcuts {self.weighted_shortcuts!r} is not one of "
                + ", ".join(SHORTCUT_NORMALIZATIONS)
            )

    def add(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    @property
    def last(self) -> int:
        return len(self.layers) - 1  # IMAGE while there is none

    def channels(self, filters: int) -> int:
        if self.width_multiple == 1.0:
            return filters
        return max(8, round(filters * self.width_multiple / 8) * 8)

    def repeats(self, count: int) -> int:
        return max(1, round(count * self.depth_multiple))

    def conv(
        self,
        filters: int,
        size: int = 1,
        stride: int = 1,
        activation: str | None = None,
        source: int | None = None,
    ) -> int:
        return self.add(
            Conv(
                inputs=(self.last if source is None else source,),
                filters=self.channels(filters),
                size=size,
                stride=stride,
                activation=activation or self.activation,
            )
        )

    def shortcut(self, first: int, second: int) -> int:
        return self.add(
            Shortcut(
                inputs=(first, second),
                weights="none" if self.weighted_shortcuts == "none" else "per_feature",
                normalization=self.weighted_shortcuts,
            )
        )

    def route(self, *sources: int) -> int:
        return self.add(Route(inputs=sources))

    def upsample(self) -> int:
        return self.add(Upsample(inputs=(self.last,)))

    def pool(self, size: int, stride: int = 1, source: int | None = None) -> int:
        return self.add(
            MaxPool(inputs=(self.last if source is None else source,), size=size, stride=stride)
        )

    def residual(self, hidden: int, filters: int, activation: str | None = None) -> int:
        """1x1 then 3x3 convolution, added to what they read."""
        source = self.last
        self.conv(hidden, 1, activation=activation)
        return self.shortcut(self.conv(filters, 3, activation=activation), source)

    def head(
        self,
        num_classes: int,
        anchors: Anchors,
        mask: tuple[int, ...],
        stride: int,
        activation: str = "linear",
        **settings: Any,
    ) -> int:
        """The 1x1 convolution without normalisation and the [yolo] layer that reads it.

        settings: further fields of `Head`.
        """
        conv = self.add(
            Conv(
                inputs=(self.last,),
                filters=len(mask) * (5 + num_classes),
                batch_normalize=False,
                activation=activation,
            )
        )
        return self.add(
            Head(
                inputs=(conv,),
                all_anchors=anchors,
                mask=mask,
                num_classes=num_classes,
                stride=stride,
                **settings,
            )
        )

    def build(
        self, width: int, height: int, training: Training, letter_box: bool = False
    ) -> Network:
        if min(width, height) < STRIDE or width % STRIDE or height % STRIDE:
            raise NetworkError(
                f"an input of {width}x{height} does not fit: both sides must be multiples of "
                f"{STRIDE}"
            )
        return Network(tuple(self.layers), width, height, letter_box=letter_box, training=training)


def choose_anchors(given: Anchors | None, standard: Anchors) -> Anchors:
    """The given anchors or the family's own, which say how many there must be."""
    if given is None:
        return standard
    if len(given) != len(standard):
        raise NetworkError(f"this network takes {len(standard)} anchors, not {len(given)}")
    return tuple((width, height) for width, height in given)


def spp(b: Builder, newest_first: bool = True) -> int:
    """Spatial pyramid pooling: the map beside its 5x5, 9x9 and 13x13 maxima."""
    source = b.last
    pool5 = b.pool(5)
    b.route(source)
    pool9 = b.pool(9)
    b.route(source)
    pool13 = b.pool(13)
    parts = (pool13, pool9, pool5, source)
    return b.route(*(parts if newest_first else reversed(parts)))


def attention(b: Builder, filters: int) -> int:
    """The YOLOv4 paper's spatial attention (SAM, its figure 5b): the last map, which has `filters`
    channels, times a logistic 1x1 convolution of itself.
    """
    source = b.last
    return b.add(Sam(inputs=(b.conv(filters, activation="logistic"), source)))


def alternate(b: Builder, filters: int, count: int, activation: str, sam: bool = False) -> int:
    """`count` convolutions, 1x1 of `filters` and 3x3 of twice as many in turn, 1x1 first.

    sam: with attention before the last of them, which must be a 1x1.
    """
    for i in range(count):
        if sam and i == count - 1:
            attention(b, 2 * filters)
        b.conv(filters * (1 + i % 2), 1 + 2 * (i % 2), activation=activation)
    return b.last


def darknet53(b: Builder, activation: str | None = None) -> tuple[int, int, int]:
    """Darknet-53 without its classifier. Returns the layers at strides 8, 16 and 32."""
    b.conv(32, 3, activation=activation)
    stages = []
    for filters, repeats in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        b.conv(filters, 3, stride=2, activation=activation)
        for _ in range(b.repeats(repeats)):
            b.residual(filters // 2, filters, activation)
        stages.append(b.last)
    return stages[2], stages[3], stages[4]


def csp_stage(b: Builder, filters: int, repeats: int, first: bool = False) -> int:
    """A cross-stage partial stage: halve the map, split it in two paths, residual blocks, join.

    The first stage of CSPDarknet53 keeps the full width in both paths.
    """
    inner = filters if first else filters // 2
    hidden = filters // 2
    downsampled = b.conv(filters, 3, stride=2)
    bypass = b.conv(inner)
    b.route(downsampled)
    b.conv(inner)
    for _ in range(b.repeats(repeats)):
        b.residual(hidden, inner)
    main = b.conv(inner)
    b.route(main, bypass)
    return b.conv(filters)


def pan(
    b: Builder,
    stride8: int,
    stride16: int,
    filters: tuple[int, int, int],
    activation: str,
    block: Callable[[int, bool], int],
    head: Callable[[int], int],
    newest_first: bool = True,
    bottom_up: bool = True,
) -> None:
    """Path aggregation: top-down from the last layer (stride 32), then bottom-up, a head at each.

    filters: at strides 8, 16 and 32. block(filters, ends) follows every concatenation, `ends` where
    a head reads it; head(scale) is called for scale 0 (stride 8) to 2. Official networks
    concatenate the newest layer first. bottom_up False: the heads at strides 16 and 32 read the
    top-down path, as in YOLOv3.
    """
    top = b.last

    def join(newest: int, other: int) -> int:
        return b.route(*((newest, other) if newest_first else (other, newest)))

    def lateral(source: int, width: int, ends: bool) -> int:
        b.conv(width, activation=activation)
        up = b.upsample()
        b.route(source)
        join(b.conv(width, activation=activation), up)
        return block(width, ends)

    middle = lateral(stride16, filters[1], not bottom_up)
    last = lateral(stride8, filters[0], True)
    head(0)
    for scale, other in ((1, middle), (2, top)):
        if bottom_up:
            b.route(last)
            down = b.conv(filters[scale], 3, stride=2, activation=activation)
            join(down, other)
            last = block(filters[scale], True)
        else:
            b.route(other)
        head(scale)
