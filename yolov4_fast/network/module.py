"""`NetworkModule`: executes a `Network` in torch, for training and as every engine's reference.

State-dict keys are `layers.{index}.conv.weight`,
`layers.{index}.bn.{weight,bias,running_mean,running_var}` or, for a convolution without
normalisation, `layers.{index}.conv.bias`, where index is the layer's number in the Network;
`layers.{index}.slope` [channels] of a PReLU; and `layers.{index}.weights` of a weighted shortcut,
[inputs] or [inputs, channels], before they are normalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov4_fast.network.layers import (
    IMAGE,
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    Route,
    Sam,
    Shape,
    Shortcut,
    Upsample,
)

BN_EPS = 1e-5  # Darknet's constants
SHORTCUT_EPS = 1e-4
PRELU_SLOPE = 0.25  # at first, as in the paper (arXiv 1502.01852)


def activate(x: Tensor, name: str, slope: Tensor | None = None) -> Tensor:
    """Apply an activation by name; leaky has slope 0.1.

    x: [B, C, ...]. slope: [C], of negative values, for prelu alone. SELU's two constants are those
    of its paper (arXiv 1706.02515), which Darknet cuts to five digits.
    """
    match name:
        case "linear":
            return x
        case "leaky":
            return F.leaky_relu(x, 0.1)
        case "mish":
            return F.mish(x)
        case "swish":
            return F.silu(x)
        case "logistic":
            return torch.sigmoid(x)
        case "relu":
            return F.relu(x)
        case "relu6":
            return F.relu6(x)
        case "selu":
            return F.selu(x)
        case "hard_swish":
            return F.hardswish(x)
        case "prelu":
            if slope is None:
                raise ValueError("prelu takes a slope for each channel")
            return F.prelu(x, slope.to(x.dtype))
    raise ValueError(f"unknown activation {name!r}")


def coefficients(weights: Tensor, normalization: str) -> Tensor:
    """What each input of a weighted shortcut is multiplied with, as Darknet normalises: for each
    channel over the inputs

        relu     relu(w) / (1e-4 + sum of relu(w))
        softmax  exp(w - max w) / (1e-4 + sum of exp(w - max w))
        none     w

    weights: [inputs] or [inputs, channels]; returns the same shape. So the coefficients sum up to a
    little less than 1. Darknet trains the weights as if the sum were constant; here autograd takes
    the whole derivative.
    """
    match normalization:
        case "relu":
            positive = F.relu(weights)
        case "softmax":
            positive = torch.exp(weights - weights.amax(0))
        case "none":
            return weights
        case _:
            raise ValueError(f"unknown normalization {normalization!r}")
    return positive / (SHORTCUT_EPS + positive.sum(0))


class ConvBlock(nn.Module):
    """Convolution, batch normalisation (unless folded or absent), activation."""

    slope: nn.Parameter | None

    def __init__(self, spec: Conv, channels: int, momentum: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels,
            spec.filters,
            spec.size,
            spec.stride,
            spec.pad,
            groups=spec.groups,
            bias=not spec.batch_normalize,
        )
        self.bn = (
            nn.BatchNorm2d(spec.filters, eps=BN_EPS, momentum=momentum)
            if spec.batch_normalize
            else None
        )
        self.activation = spec.activation
        self.register_parameter(
            "slope", _slopes(spec.filters) if spec.activation == "prelu" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return activate(x, self.activation, self.slope)


class ShortcutBlock(nn.Module):
    """A shortcut that has parameters: weights of its inputs, the slopes of its prelu, or both."""

    weights: nn.Parameter | None
    slope: nn.Parameter | None

    def __init__(self, spec: Shortcut, shapes: tuple[Shape, ...]) -> None:
        super().__init__()
        self.normalization = spec.normalization
        self.activation = spec.activation
        stored = spec.tensors(*shapes)
        weights = nn.Parameter(torch.ones(stored["weights"])) if "weights" in stored else None
        self.register_parameter("weights", weights)
        self.register_parameter("slope", _slopes(shapes[0][0]) if "slope" in stored else None)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        if self.weights is not None:
            # [inputs, 1 or channels, 1, 1], of the maps' type, which autocast leaves it in
            factors = coefficients(self.weights, self.normalization).to(inputs[0].dtype)
            factors = factors.view(len(inputs), -1, 1, 1)
            inputs = [x * factor for x, factor in zip(inputs, factors, strict=True)]
        return activate(_sum(inputs), self.activation, self.slope)


class NetworkModule(nn.Module):
    """Runs a Network: images [B, channels, H, W] -> raw maps [B, A * (5 + classes), h, w].

    H and W may differ from the Network's own size as long as both are multiples of its largest
    stride. A network without heads (a backbone) returns the output of its last layer alone.
    """

    def __init__(self, network: Network, bn_momentum: float = 0.03) -> None:
        super().__init__()
        self.network = network
        self.layers = nn.ModuleDict()
        for index, (spec, shapes) in enumerate(
            zip(network.layers, network.input_shapes(), strict=True)
        ):
            if isinstance(spec, Conv):
                self.layers[str(index)] = ConvBlock(spec, shapes[0][0], bn_momentum)
            elif isinstance(spec, Shortcut) and spec.tensors(*shapes):
                self.layers[str(index)] = ShortcutBlock(spec, shapes)
        self._last_use = _last_uses(network)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal weights (fan in), unit normalisation, heads that start by finding nothing.

        Heads: objectness 0.01, classes 1/num_classes, as in the RetinaNet paper's section 4.1.
        Weights of shortcuts are 1, as in Darknet.
        """
        for module in self.layers.values():
            assert isinstance(module, ConvBlock | ShortcutBlock)
            if module.slope is not None:
                nn.init.constant_(module.slope, PRELU_SLOPE)
            if isinstance(module, ShortcutBlock) and module.weights is not None:
                nn.init.ones_(module.weights)
        for index, _ in self.network.convolutions():
            block = self._block(index)
            nn.init.kaiming_normal_(block.conv.weight, mode="fan_in", nonlinearity="relu")
            if block.conv.bias is not None:
                nn.init.zeros_(block.conv.bias)
        for head in self.network.heads:
            source = self.network.layers[head.inputs[0]]
            if not isinstance(source, Conv) or source.batch_normalize or head.inputs[0] == IMAGE:
                continue
            conv = self._block(head.inputs[0]).conv
            assert conv.bias is not None
            nn.init.normal_(conv.weight, std=0.01)
            bias = conv.bias.data.view(len(head.mask), -1)
            bias[:, 4] = -4.595  # logit(0.01)
            bias[:, 5:] = -torch.log(torch.tensor(max(head.num_classes - 1.0, 0.5)))

    def _block(self, index: int) -> ConvBlock:
        block = self.layers[str(index)]
        assert isinstance(block, ConvBlock)
        return block

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: dict[int, Tensor] = {IMAGE: images}
        maps: list[Tensor] = []
        for index, layer in enumerate(self.network.layers):
            inputs = [outputs[source] for source in layer.inputs]
            if isinstance(layer, Head):
                maps.append(inputs[0])
            else:
                outputs[index] = self._run(index, layer, inputs)
            for source in self._last_use[index]:
                outputs.pop(source, None)
        return tuple(maps) if maps else (outputs[len(self.network.layers) - 1],)

    def _run(self, index: int, layer: Layer, inputs: list[Tensor]) -> Tensor:
        match layer:
            case Conv():
                return self.layers[str(index)](inputs[0])
            case Shortcut() if str(index) in self.layers:
                return self.layers[str(index)](inputs)
            case Shortcut():
                return activate(_sum(inputs), layer.activation)
            case Route():
                parts = [x.chunk(layer.groups, 1)[layer.group] for x in inputs]
                return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            case MaxPool():
                return max_pool(inputs[0], layer)
            case Upsample():
                return F.interpolate(inputs[0], scale_factor=layer.stride, mode="nearest")
            case Sam():
                return inputs[0] * inputs[1]
        raise TypeError(f"layer {index}: {type(layer).__name__} cannot be executed")


def _slopes(channels: int) -> nn.Parameter:
    return nn.Parameter(torch.full((channels,), PRELU_SLOPE))


def _sum(inputs: list[Tensor]) -> Tensor:
    total = inputs[0] + inputs[1]
    for other in inputs[2:]:
        total = total + other
    return total


def max_pool(x: Tensor, layer: MaxPool) -> Tensor:
    """Max-pooling with Darknet's padding, which may be one cell longer after than before."""
    _, height, width = layer.output_shape((x.shape[1], x.shape[2], x.shape[3]))
    top, bottom = layer.pads(x.shape[2], height)
    left, right = layer.pads(x.shape[3], width)
    if top == bottom == left == right:
        return F.max_pool2d(x, layer.size, layer.stride, top)
    x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
    return F.max_pool2d(x, layer.size, layer.stride)[:, :, :height, :width]


def _last_uses(network: Network) -> list[list[int]]:
    """For every layer the outputs that nothing needs after it, so that they can be freed."""
    last: dict[int, int] = {}
    for index, layer in enumerate(network.layers):
        for source in layer.inputs:
            last[source] = index
    freed: list[list[int]] = [[] for _ in network.layers]
    for source, index in last.items():
        freed[index].append(source)
    return freed
