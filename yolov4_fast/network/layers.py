"""A network as data: frozen layer specs, each naming its inputs, and the `Network` that holds them.

Layers are numbered from 0 in execution order, as in a Darknet cfg ([net] is not counted). An input
is the number of an earlier layer, or `IMAGE` for the picture itself. Everything that runs a
network (torch module, ONNX, CUDA plan) and everything that describes one (cfg text, `info`) reads
these specs, so anchors, strides, `scale_x_y` and NMS settings exist exactly once.

Padding, pooling and shape rules are those of AlexeyAB/darknet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

IMAGE = -1
ACTIVATIONS = (
    *("linear", "leaky", "mish", "swish", "logistic", "relu"),
    *("relu6", "selu", "hard_swish", "prelu"),
)
SHORTCUT_WEIGHTS = ("none", "per_feature", "per_channel")
SHORTCUT_NORMALIZATIONS = ("none", "relu", "softmax")
NMS_KINDS = ("default", "greedynms", "diounms")
GREEDY_NMS_BETA = 0.6  # the exponent that Darknet hard-codes for nms_kind=greedynms

Shape = tuple[int, int, int]  # channels, height, width
Tensors = dict[str, tuple[int, ...]]  # names and shapes


class NetworkError(ValueError):
    """A network whose layers do not fit together; the message names the layer."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What every spec has: the layers it reads, and how its output shape follows from theirs."""

    inputs: tuple[int, ...]
    name: ClassVar[str]

    def output_shape(self, *shapes: Shape) -> Shape:
        raise NotImplementedError

    def tensors(self, *shapes: Shape) -> Tensors:
        """What it stores: the end of each key of the state dict, after `layers.{number}.`, and its
        shape, in the order of a .weights file, which has no place for `slope`.
        """
        return {}

    def parameters(self, *shapes: Shape) -> int:
        """Number of trainable parameters."""
        return sum(
            prod(shape)
            for name, shape in self.tensors(*shapes).items()
            if not name.startswith("bn.running")
        )

    def operations(self, *shapes: Shape) -> int:
        """Operations for one image, by Darknet's count: 2 a multiply-add, 1 a comparison or sum."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Conv(Layer):
    """Convolution, then batch normalisation (or a bias), then an activation.

    Of the activations prelu alone has parameters: a slope for the negative values of each channel.
    """

    filters: int
    size: int = 1
    stride: int = 1
    padding: int | None = None  # None: size // 2, Darknet's pad=1
    groups: int = 1
    batch_normalize: bool = True
    activation: str = "linear"
    name: ClassVar[str] = "convolutional"

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        if min(self.filters, self.size, self.stride, self.groups) < 1:
            raise NetworkError("filters, size, stride and groups must be at least 1")
        if self.padding is None:
            object.__setattr__(self, "padding", self.size // 2)

    @property
    def pad(self) -> int:
        assert self.padding is not None
        return self.padding

    def output_shape(self, *shapes: Shape) -> Shape:
        ((channels, height, width),) = shapes
        if channels % self.groups or self.filters % self.groups:
            raise NetworkError(
                f"{channels} input channels and {self.filters} filters do not divide "
                f"into {self.groups} groups"
            )
        height = (height + 2 * self.pad - self.size) // self.stride + 1
        width = (width + 2 * self.pad - self.size) // self.stride + 1
        return self.filters, height, width

    def weight_shape(self, channels: int) -> tuple[int, int, int, int]:
        return self.filters, channels // self.groups, self.size, self.size

    def tensors(self, *shapes: Shape) -> Tensors:
        vectors = (
            ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var")
            if self.batch_normalize
            else ("conv.bias",)
        )
        found: Tensors = dict.fromkeys(vectors, (self.filters,))
        found["conv.weight"] = self.weight_shape(shapes[0][0])
        return found | ({"slope": (self.filters,)} if self.activation == "prelu" else {})

    def operations(self, *shapes: Shape) -> int:
        _, height, width = self.output_shape(*shapes)
        return 2 * self.filters * self.size**2 * (shapes[0][0] // self.groups) * height * width


@dataclass(frozen=True, kw_only=True)
class Shortcut(Layer):
    """Sum of its inputs (a residual connection), then an activation.

    weights: the sum is weighted, by one trained weight of each input (per_feature) or of each
    channel of each input (per_channel); the YOLOv4 paper's MiWRC. normalization: what becomes of
    the weights of all inputs first (`module.coefficients`).
    """

    activation: str = "linear"
    weights: str = "none"
    normalization: str = "none"
    name: ClassVar[str] = "shortcut"

    def __post_init__(self) -> None:
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("weights", self.weights, SHORTCUT_WEIGHTS)
        _one_of("normalization", self.normalization, SHORTCUT_NORMALIZATIONS)
        if self.weights == "none" and self.normalization != "none":
            raise NetworkError(
                f"normalization {self.normalization} has nothing to normalise without weights"
            )
        if len(self.inputs) < 2:
            raise NetworkError("a shortcut adds at least two inputs")

    def tensors(self, *shapes: Shape) -> Tensors:
        count, channels = len(shapes), shapes[0][0]
        found: Tensors = {}
        if self.weights == "per_feature":
            found["weights"] = (count,)
        elif self.weights == "per_channel":
            found["weights"] = (count, channels)
        return found | ({"slope": (channels,)} if self.activation == "prelu" else {})

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(set(shapes)) != 1:
            raise NetworkError(f"a shortcut adds equal shapes, not {shapes}")
        return shapes[0]

    def operations(self, *shapes: Shape) -> int:
        return prod(shapes[0]) * (len(shapes) - 1) * (1 if self.weights == "none" else 2)


@dataclass(frozen=True, kw_only=True)
class Route(Layer):
    """Concatenation of channels; with `groups`, of the `group`-th part of each input's channels."""

    groups: int = 1
    group: int = 0
    name: ClassVar[str] = "route"

    def __post_init__(self) -> None:
        if self.groups < 1 or not 0 <= self.group < self.groups:
            raise NetworkError(f"group_id {self.group} does not exist among {self.groups} groups")
        if not self.inputs:
            raise NetworkError("a route needs at least one layer")

    def output_shape(self, *shapes: Shape) -> Shape:
        if len({shape[1:] for shape in shapes}) != 1:
            raise NetworkError(f"a route joins maps of equal height and width, not {shapes}")
        if any(shape[0] % self.groups for shape in shapes):
            raise NetworkError(f"channels of {shapes} do not divide into {self.groups} groups")
        return sum(shape[0] // self.groups for shape in shapes), *shapes[0][1:]


@dataclass(frozen=True, kw_only=True)
class MaxPool(Layer):
    """Max-pooling. `padding` is Darknet's: that many cells in all, half (floored) before."""

    size: int
    stride: int = 1
    padding: int | None = None  # None: size - 1
    name: ClassVar[str] = "maxpool"

    def __post_init__(self) -> None:
        if min(self.size, self.stride) < 1:
            raise NetworkError("size and stride must be at least 1")
        if self.padding is None:
            object.__setattr__(self, "padding", self.size - 1)

    @property
    def pad(self) -> int:
        assert self.padding is not None
        return self.padding

    def output_shape(self, *shapes: Shape) -> Shape:
        ((channels, height, width),) = shapes
        height = (height + self.pad - self.size) // self.stride + 1
        width = (width + self.pad - self.size) // self.stride + 1
        return channels, height, width

    def operations(self, *shapes: Shape) -> int:
        return prod(self.output_shape(*shapes)) * self.size**2

    def pads(self, size_in: int, size_out: int) -> tuple[int, int]:
        """Cells of padding before and after one axis; after: just what the windows reach."""
        before = self.pad // 2
        return before, max(0, (size_out - 1) * self.stride + self.size - before - size_in)


@dataclass(frozen=True, kw_only=True)
class Upsample(Layer):
    """Nearest-neighbour upsampling by a whole factor."""

    stride: int = 2
    name: ClassVar[str] = "upsample"

    def output_shape(self, *shapes: Shape) -> Shape:
        ((channels, height, width),) = shapes
        return channels, height * self.stride, width * self.stride


@dataclass(frozen=True, kw_only=True)
class Sam(Layer):
    """Spatial attention: the product of two maps (the second is usually a logistic convolution)."""

    name: ClassVar[str] = "sam"

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise NetworkError(f"sam multiplies two equal shapes, not {shapes}")
        return shapes[0]


@dataclass(frozen=True, kw_only=True)
class Head(Layer):
    """A detection head ([yolo]): how the raw map it reads is decoded, and how it is trained.

    The map has `len(anchors) * (5 + num_classes)` channels: for each anchor tx, ty, tw, th,
    objectness, classes. `all_anchors` are those of every head in pixels of the network's input;
    `mask` picks this head's.
    """

    all_anchors: tuple[tuple[float, float], ...]
    mask: tuple[int, ...]
    num_classes: int
    stride: int
    scale_x_y: float = 1.0
    new_coords: bool = False
    nms_kind: str = "default"
    beta_nms: float = 0.6
    ignore_thresh: float = 0.5
    iou_thresh: float = (
        1.0  # anchors above this IoU with an object are positive too; 1: the best only
    )
    iou_loss: str = "mse"
    iou_normalizer: float = 0.75
    obj_normalizer: float = 1.0
    cls_normalizer: float = 1.0
    training: tuple[tuple[str, str], ...] = ()  # what else a cfg says here, verbatim
    name: ClassVar[str] = "yolo"

    def __post_init__(self) -> None:
        if self.nms_kind not in NMS_KINDS:
            raise NetworkError(f"nms_kind {self.nms_kind!r} is not one of {', '.join(NMS_KINDS)}")
        if not self.mask or any(not 0 <= i < len(self.all_anchors) for i in self.mask):
            raise NetworkError(
                f"mask {self.mask} does not pick among {len(self.all_anchors)} anchors"
            )
        if self.num_classes < 1:
            raise NetworkError(f"{self.num_classes} classes: at least one is needed")
        if any(width <= 0 or height <= 0 for width, height in self.all_anchors):
            raise NetworkError("anchors must have a positive width and height")

    @property
    def anchors(self) -> tuple[tuple[float, float], ...]:
        """This head's anchors (width, height) in pixels of the network's input."""
        return tuple(self.all_anchors[i] for i in self.mask)

    @property
    def channels(self) -> int:
        return len(self.mask) * (5 + self.num_classes)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if shape[0] != self.channels:
            raise NetworkError(
                f"a head of {len(self.mask)} anchors and {self.num_classes} classes reads "
                f"{self.channels} channels, not {shape[0]}"
            )
        return shape


@dataclass(frozen=True)
class Network:
    """A whole network: its layers, the input size it is meant for, and [net]'s training keys.

    Raises NetworkError when built from layers that do not fit together.
    """

    layers: tuple[Layer, ...]
    width: int = 416
    height: int = 416
    channels: int = 3
    letter_box: bool = False
    training: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        shapes = self.shapes()
        heads = self.heads
        if not heads:
            return  # a backbone
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Head):
                continue
            _, height, width = shapes[index]
            if (height * layer.stride, width * layer.stride) != (self.height, self.width):
                raise NetworkError(
                    f"layer {index} (yolo): a head of stride {layer.stride} reads a map of "
                    f"{width}x{height}, which an input of {self.width}x{self.height} does not give"
                )
        if len({head.num_classes for head in heads}) > 1:
            raise NetworkError(f"heads disagree on classes: {[head.num_classes for head in heads]}")

    @property
    def heads(self) -> tuple[Head, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, Head))

    @property
    def num_classes(self) -> int:
        return self.heads[0].num_classes if self.heads else 0

    @property
    def max_stride(self) -> int:
        return max((head.stride for head in self.heads), default=32)

    @property
    def nms_beta(self) -> float | None:
        """Exponent of DIoU-NMS as Darknet reads it off the last head, or None for plain IoU."""
        head = self.heads[-1]
        return {"default": None, "greedynms": GREEDY_NMS_BETA, "diounms": head.beta_nms}[
            head.nms_kind
        ]

    def convolutions(self) -> Iterator[tuple[int, Conv]]:
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Conv):
                yield index, layer

    def shapes(self) -> tuple[Shape, ...]:
        """Output shape (channels, height, width) of every layer for the network's own size."""
        shapes: list[Shape] = []
        for index, layer in enumerate(self.layers):
            try:
                inputs = [self._shape(shapes, source) for source in layer.inputs]
                shape = layer.output_shape(*inputs)
                if min(shape) < 1:
                    raise NetworkError(f"its output would be {shape}")
            except NetworkError as error:
                raise NetworkError(f"layer {index} ({layer.name}): {error}") from None
            shapes.append(shape)
        return tuple(shapes)

    def tensors(self) -> Tensors:
        """Keys and shapes of the state dict, layer by layer; see `Layer.tensors`."""
        return {
            f"layers.{index}.{name}": shape
            for index, (layer, inputs) in enumerate(
                zip(self.layers, self.input_shapes(), strict=True)
            )
            for name, shape in layer.tensors(*inputs).items()
        }

    def _shape(self, shapes: list[Shape], source: int) -> Shape:
        if source == IMAGE:
            return self.channels, self.height, self.width
        if not 0 <= source < len(shapes):
            raise NetworkError(f"it reads layer {source}, which is not before it")
        if isinstance(self.layers[source], Head):
            raise NetworkError(f"it reads layer {source}, a head, which is the end of a branch")
        return shapes[source]

    def input_shapes(self) -> tuple[tuple[Shape, ...], ...]:
        """Shapes that every layer reads, in the order of its `inputs`."""
        shapes = list(self.shapes())
        return tuple(
            tuple(self._shape(shapes, source) for source in layer.inputs) for layer in self.layers
        )

    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(
            layer.parameters(*shapes)
            for layer, shapes in zip(self.layers, self.input_shapes(), strict=True)
        )

    def operations(self) -> int:
        """Operations for one image of the network's size, as Darknet counts them."""
        return sum(
            layer.operations(*shapes)
            for layer, shapes in zip(self.layers, self.input_shapes(), strict=True)
        )

    def resized(self, width: int, height: int) -> Network:
        """The same network for another input size. Raises NetworkError where it does not fit."""
        step = self.max_stride
        if width < step or height < step or width % step or height % step:
            raise NetworkError(
                f"an input of {width}x{height} does not fit: both sides must be multiples of {step}"
            )
        return Network(self.layers, width, height, self.channels, self.letter_box, self.training)


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise NetworkError(f"{field} {value!r} is not one of {', '.join(known)}")
