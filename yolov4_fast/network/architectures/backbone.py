"""A detection network without its neck and heads: what is trained to tell classes apart first."""

from __future__ import annotations

from dataclasses import replace

from yolov4_fast.network.layers import Conv, Network, NetworkError, Shape, Shortcut


def backbone_of(network: Network) -> Network:
    """The layers up to the end of the coarsest stage, which the neck reads; numbers stay as they
    are, and so do the keys of the state dict and the order of the weights in a Darknet file.

    The stage ends, after its last residual connection if it has any, at the first layer that all
    later ones of this stride go through and whose successor is a 1x1 convolution to fewer channels,
    with which every neck of the YOLOv3 and YOLOv4 families begins. So the join of a cross-stage
    block belongs to the backbone: 105 layers of yolov4, 75 of yolov3 (darknet53.conv.74 and the
    sum after it), 27 of yolov4-tiny. A network without heads is returned as it is. Raises
    NetworkError where no such layer is found.
    """
    if not network.heads:
        return network
    shapes = network.shapes()
    coarsest = min(shape[1:] for shape in shapes)
    stage = [index for index, shape in enumerate(shapes) if shape[1:] == coarsest]
    first_neck = next(
        (i for i in stage if _begins_neck(network, shapes, i) and _closed(network, stage, i - 1)),
        None,
    )
    if first_neck is None:
        raise NetworkError(
            "where the backbone ends cannot be told: no 1x1 convolution to fewer channels follows "
            "the coarsest stage"
        )
    return replace(network, layers=network.layers[:first_neck])


def _begins_neck(network: Network, shapes: tuple[Shape, ...], index: int) -> bool:
    """Whether this layer is a 1x1 convolution to fewer channels with no residual connection of the
    same stride after it."""
    layer = network.layers[index]
    return (
        isinstance(layer, Conv)
        and layer.size == layer.stride == 1
        and layer.inputs == (index - 1,)
        and layer.filters < shapes[index - 1][0]
        and shapes[index - 1][1:] == shapes[index][1:]
        and not any(
            isinstance(later, Shortcut) and shapes[number][1:] == shapes[index][1:]
            for number, later in enumerate(network.layers)
            if number > index
        )
    )


def _closed(network: Network, stage: list[int], end: int) -> bool:
    """Whether nothing after `end` reads a layer of the stage before it."""
    open_layers = {index for index in stage if index < end}
    return not any(
        source in open_layers for layer in network.layers[end + 1 :] for source in layer.inputs
    )
