"""Darknet cfg text <-> `Network`, both ways: parse_cfg(write_cfg(network)) == network.

Meanings and defaults are those of AlexeyAB/darknet's parser. Sections: net, convolutional,
shortcut, route, maxpool, upsample, sam and yolo, which is all that the yolov3 and yolov4 families
run on. What is not understood is refused (CfgError names file, line, section, key and what would be
right); training keys of [net] and [yolo] are kept verbatim in `Network.training` and
`Head.training`; keys of other sections that cannot affect inference are dropped with one warning
that names them.

Two things are ours, so that checkpoints and engine files, which hold cfg text, can say them:
Darknet does not know the activations hard_swish and prelu, and its parser refuses a weighted
[shortcut] without weights_normalization, which its documentation allows.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from yolov4_fast.darknet.cfg_reader import CfgReader
from yolov4_fast.darknet.sections import CfgError, read_sections
from yolov4_fast.network.layers import (
    Conv,
    Head,
    Layer,
    MaxPool,
    Network,
    Route,
    Sam,
    Shortcut,
    Upsample,
)

__all__ = ["CfgError", "parse_cfg", "read_cfg", "write_cfg"]

ALIASES = {"network": "net", "conv": "convolutional", "max": "maxpool"}


def read_cfg(path: str | Path) -> Network:
    """The network that a cfg file describes.

    Raises CfgError, or OSError where the file cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Keys are ASCII; comments may be in any encoding, so undecodable bytes there do no harm.
    return parse_cfg(data.decode("utf-16" if utf16 else "utf-8", errors="replace"), str(path))


def parse_cfg(text: str, source: str = "cfg") -> Network:
    """The network that a cfg text describes; `source` names it in errors. Raises CfgError."""
    sections = read_sections(text, source)
    for section in sections:
        section.name = ALIASES.get(section.name, section.name)
    if not sections or sections[0].name != "net":
        first = f"is [{sections[0].name}] in line {sections[0].line}" if sections else "is missing"
        raise CfgError(f"{source}: the first section {first}; it must be [net]")
    return CfgReader(sections[0]).read(sections[1:])


def write_cfg(network: Network) -> str:
    """The network as cfg text, which parse_cfg reads back to an equal one.

    Raises CfgError where no cfg can say it: a layer that implicitly reads another than the one
    before it.
    """
    lines = ["[net]", f"width={network.width}", f"height={network.height}"]
    lines.append(f"channels={network.channels}")
    if network.letter_box:
        lines.append("letter_box=1")
    lines += [f"{key}={value}" for key, value in network.training]
    for index, layer in enumerate(network.layers):
        lines += ["", f"# layer {index}", f"[{layer.name}]"]
        lines += [f"{key}={value}" for key, value in _options(index, layer)]
    text = "\n".join(lines) + "\n"
    if parse_cfg(text) != network:
        raise CfgError("the network holds values that cfg text cannot express")
    return text


def _options(index: int, layer: Layer) -> Iterator[tuple[str, object]]:
    """Keys and values of a layer's section; those at Darknet's default mostly left out."""
    if not isinstance(layer, Route) and layer.inputs[0] != index - 1:
        raise CfgError(
            f"layer {index} ({layer.name}) reads layer {layer.inputs[0]} first; in a cfg that can "
            f"only be the one before, {index - 1}"
        )
    match layer:
        case Conv():
            if layer.batch_normalize:
                yield "batch_normalize", 1
            yield "filters", layer.filters
            if layer.groups != 1:
                yield "groups", layer.groups
            yield "size", layer.size
            yield "stride", layer.stride
            yield ("pad", 1) if layer.pad == layer.size // 2 else ("padding", layer.pad)
            yield "activation", layer.activation
        case Shortcut():
            yield "from", _relative(index, layer.inputs[1:])
            yield "activation", layer.activation
            if layer.weights != "none":
                yield "weights_type", layer.weights
                yield "weights_normalization", layer.normalization
        case Route():
            yield "layers", _relative(index, layer.inputs)
            if layer.groups != 1:
                yield "groups", layer.groups
                yield "group_id", layer.group
        case MaxPool():
            yield "size", layer.size
            yield "stride", layer.stride
            if layer.pad != layer.size - 1:
                yield "padding", layer.pad
        case Upsample():
            yield "stride", layer.stride
        case Sam():
            yield "from", _relative(index, layer.inputs[1:])
        case Head():
            yield from _head_options(layer)
        case _:
            raise CfgError(f"layer {index}: no cfg section exists for {type(layer).__name__}")


def _relative(index: int, sources: Sequence[int]) -> str:
    return ",".join(str(source - index) for source in sources)


def _head_options(head: Head) -> Iterator[tuple[str, object]]:
    yield "mask", ",".join(map(str, head.mask))
    yield "anchors", ", ".join(f"{_number(w)},{_number(h)}" for w, h in head.all_anchors)
    yield "num", len(head.all_anchors)
    yield "classes", head.num_classes
    named = ("inputs", "mask", "all_anchors", "num_classes", "stride", "training")
    for spec in fields(head):
        value = getattr(head, spec.name)
        if spec.name not in named and (spec.default is MISSING or value != spec.default):
            yield spec.name, value if isinstance(value, str) else _number(value)
    yield from head.training


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
