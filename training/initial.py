"""Weights that the training of a detector starts from, from whatever file holds them.

A checkpoint of a detector      what fits by name and shape, which must be half of it at least
A checkpoint of a classifier    all of its backbone (`training.pretrain`)
Darknet weights                 as many layers as the file holds: all of them, or the first ones
                                (yolov4.conv.137, csdarknet53-omega.conv.105, darknet53.conv.74)
... for other classes           all but the heads (yolov4.weights); the size tells how many classes
Darknet weights of a classifier all of its backbone (csdarknet53-omega_final.weights): after it the
                                file has one convolution without normalisation for the classes
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from torch import Tensor

from training.classify.classifier import LINEAR
from yolov4_fast.checkpoint import Checkpoint, is_checkpoint, read_checkpoint
from yolov4_fast.darknet.weights import (
    FLOAT,
    WeightsError,
    read_backbone,
    read_header,
    read_weights,
)
from yolov4_fast.network.architectures.backbone import backbone_of
from yolov4_fast.network.layers import Conv, Head, Network, NetworkError

State = dict[str, Tensor]


def initial_state(path: Path, network: Network, name: str) -> tuple[State, str]:
    """Tensors of a file that fit the network, and what they are. name: to call the network.

    Raises ValueError for a file of another network, OSError, and the errors of the readers.
    """
    if not is_checkpoint(path):
        return _of_darknet(path, network)
    checkpoint = read_checkpoint(path)
    if checkpoint.network.heads:
        return _of_detector(path, checkpoint, network, name)
    return _of_classifier(path, checkpoint, network, name)


def _of_detector(
    path: Path, checkpoint: Checkpoint, network: Network, name: str
) -> tuple[State, str]:
    shapes = network.tensors()
    fitting = {k: v for k, v in checkpoint.state.items() if shapes.get(k) == tuple(v.shape)}
    told = f"{len(fitting)} of {len(shapes)} tensors"
    if len(fitting) < len(shapes) / 2:  # what fits then, by layer number and shape, fits by chance
        raise ValueError(f"{path}: is of another network: only {told} fit {name}")
    return fitting, told


def _of_classifier(
    path: Path, checkpoint: Checkpoint, network: Network, name: str
) -> tuple[State, str]:
    shapes = network.tensors()
    state = {k: v for k, v in checkpoint.state.items() if not k.startswith(f"{LINEAR}.")}
    for key, value in state.items():
        if shapes.get(key) != tuple(value.shape):
            raise ValueError(
                f"{path}: is the backbone of another network: its {key} is of shape "
                f"{tuple(value.shape)}, that of {name} {shapes.get(key, 'is missing')}"
            )
    told = _told(checkpoint.network, state, network)
    return state, told + _other_activation(checkpoint.network, network, name)


def _other_activation(backbone: Network, network: Network, name: str) -> str:
    """A clause on the first convolution whose activation was another; weights do not show that."""
    for index, (was, now) in enumerate(zip(backbone.layers, network.layers, strict=False)):
        if isinstance(was, Conv) and isinstance(now, Conv) and was.activation != now.activation:
            return (
                f"; but layer {index} was trained with {was.activation}, and {name} has "
                f"{now.activation} there"
            )
    return ""


def _of_darknet(path: Path, network: Network) -> tuple[State, str]:
    shapes = network.tensors()
    try:
        state, convolutions = read_backbone(path, network)
        return state, f"{convolutions} convolutions, {len(state)} of {len(shapes)} tensors"
    except WeightsError:
        found = path.stat().st_size - read_header(path).size  # bytes
        whole = _for_other_classes(network, found)
        backbone = None if whole else _before_classes(network, found)
        if whole:
            state = read_weights(path, whole)
            state = {k: v for k, v in state.items() if shapes.get(k) == tuple(v.shape)}
            what = f"all but the heads, which are for {whole.num_classes} classes"
            return state, f"{what}: {len(state)} of {len(shapes)} tensors"
        if backbone:
            state, _ = read_backbone(path, backbone, len(backbone.layers))
            return state, _told(backbone, state, network)
        raise


def _for_other_classes(network: Network, size: int) -> Network | None:
    """The network with as many classes as weights of that size (bytes) are for, if it is whole."""
    if not network.heads:
        return None
    one, two = (_size(_with_classes(network, count)) for count in (1, 2))
    more, rest = divmod(size - one, two - one)
    return _with_classes(network, 1 + more) if more >= 0 and not rest else None


def _with_classes(network: Network, count: int) -> Network:
    layers = list(network.layers)
    for index, head in enumerate(layers):
        if isinstance(head, Head):
            layers[index] = head = replace(head, num_classes=count)
            conv = layers[head.inputs[0]]
            if isinstance(conv, Conv):
                layers[head.inputs[0]] = replace(conv, filters=head.channels)
    return replace(network, layers=tuple(layers))


def _before_classes(network: Network, size: int) -> Network | None:
    """The network's backbone, if what follows it in weights of that size (bytes) is a convolution
    of whole classes: for each a bias and a weight for every channel.
    """
    try:
        backbone = backbone_of(network)
    except NetworkError:
        return None
    left = size - _size(backbone)
    channels = backbone.shapes()[-1][0]
    return backbone if left > 0 and left % (FLOAT.itemsize * (channels + 1)) == 0 else None


def _size(network: Network) -> int:
    """Bytes of its Darknet weights, which have no slopes of prelu."""
    tensors = network.tensors().items()
    return FLOAT.itemsize * sum(prod(s) for name, s in tensors if not name.endswith(".slope"))


def _told(backbone: Network, state: State, network: Network) -> str:
    return (
        f"the backbone of a classifier, {len(backbone.layers)} layers, {len(state)} of "
        f"{len(network.tensors())} tensors"
    )
