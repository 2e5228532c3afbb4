"""Darknet .weights <-> the state dict of a `NetworkModule`.

The file is little-endian: int32 major, minor and revision; the number of images seen in training,
uint64 from version 0.2 on and uint32 before; then, for every convolution in order, float32 values:
beta, gamma, running mean, running variance and weights, or, without batch normalisation, bias and
weights. Weights are [filters, channels / groups, size, size]. A weighted shortcut has its weights
at its place among the convolutions, [inputs] or [inputs, channels], the layer before it first. The
slopes of a PReLU, which Darknet does not know, have no place: such a network is refused.

A state dict has the keys that `network.module` documents, without the counters that torch adds to
batch normalisation, which `load_state_dict` fills in. Tensors are float32, contiguous, on the CPU.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from yolov4_fast.files import replacing
from yolov4_fast.network.layers import Network

FLOAT = np.dtype("<f4")


class WeightsError(ValueError):
    """A weights file that does not fit the network, or is damaged; names file and layer."""


@dataclass(frozen=True)
class Header:
    """How a weights file begins: the version that wrote it, and the images seen in training."""

    major: int = 0
    minor: int = 2
    revision: int = 5
    seen: int = 0

    @property
    def layout(self) -> str:
        return "<iiiQ" if self.major * 10 + self.minor >= 2 else "<iiiI"

    @property
    def size(self) -> int:
        """Bytes."""
        return struct.calcsize(self.layout)

    def pack(self) -> bytes:
        return struct.pack(self.layout, self.major, self.minor, self.revision, self.seen)


@dataclass(frozen=True)
class _Part:
    """One tensor of one layer: where it goes and its shape."""

    layer: int
    key: str
    shape: tuple[int, ...]


def _parts(network: Network) -> Iterator[_Part]:
    """The tensors of a network in the order of the file, but for slopes."""
    for key, shape in network.tensors().items():
        _, layer, name = key.split(".", 2)
        if name != "slope":
            yield _Part(int(layer), key, shape)


def _check_slopes(path: str | Path, network: Network) -> None:
    for key in network.tensors():
        if key.endswith(".slope"):
            raise WeightsError(
                f"{path}: a Darknet weights file has no place for {key}, the slopes of a prelu; "
                "this network's weights are kept in checkpoints (.safetensors)"
            )


def read_header(path: str | Path) -> Header:
    """The header of a weights file. Raises WeightsError where there is none."""
    with open(path, "rb") as file:
        return _read_header(file, path)


def _read_header(file: BinaryIO, path: str | Path) -> Header:
    start = file.read(12)
    if len(start) == 12:
        header = Header(*struct.unpack("<iii", start))
        if not all(0 <= part < 1000 for part in (header.major, header.minor, header.revision)):
            raise WeightsError(
                f"{path}: does not begin like a Darknet weights file, whose version is 0.2.5 or "
                f"near (found {header.major}.{header.minor}.{header.revision})"
            )
        seen = file.read(header.size - 12)
        if len(seen) == header.size - 12:
            number = int.from_bytes(seen, "little")
            return Header(header.major, header.minor, header.revision, number)
    raise WeightsError(f"{path}: is too short to be a Darknet weights file")


def read_weights(path: str | Path, network: Network) -> dict[str, Tensor]:
    """All weights of a network, which must fill the file exactly.

    Raises WeightsError for a file that is too short (saying in which layer it ends) or too long,
    has no valid header, or holds a value that is not finite or a negative variance, and for a
    network with prelu.
    """
    _check_slopes(path, network)
    with open(path, "rb") as file:
        header = _read_header(file, path)
        found, odd = _floats_left(file, path, header)
        parts = list(_parts(network))
        expected = sum(prod(part.shape) for part in parts)
        if found != expected or odd:
            raise WeightsError(
                f"{path}: {expected:,} floats are expected after the header, but {found:,} "
                f"{f'and {odd} bytes ' if odd else ''}were found: {_misfit(parts, found, network)}"
            )
        return _read_parts(file, path, parts)


def _floats_left(file: BinaryIO, path: str | Path, header: Header) -> tuple[int, int]:
    """Whole floats after the header, and bytes beyond them."""
    return divmod(Path(path).stat().st_size - header.size, FLOAT.itemsize)


def _misfit(parts: list[_Part], found: int, network: Network) -> str:
    position = 0
    for part in parts:
        position += prod(part.shape)
        if found < position:
            return f"the file ends in layer {part.layer} of {len(network.layers)}; is it complete?"
    return "the file goes on after the last layer; is it of another network or number of classes?"


def _read_parts(file: BinaryIO, path: str | Path, parts: list[_Part]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for part in parts:
        values = np.fromfile(file, FLOAT, prod(part.shape)).astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise WeightsError(
                f"{path}: layer {part.layer} ({part.key}) holds NaN or infinity; did its training "
                "diverge?"
            )
        if part.key.endswith("running_var") and values.min() < 0:
            raise WeightsError(
                f"{path}: layer {part.layer} has a negative variance; is the file of another "
                "network of the same size?"
            )
        state[part.key] = torch.from_numpy(values.reshape(part.shape))
    return state


def read_backbone(
    path: str | Path, network: Network, layers: int | None = None
) -> tuple[dict[str, Tensor], int]:
    """The first layers of a network from a file such as yolov4.conv.137.

    layers: how many of the network's layers to take; by default as many as the file holds. Returns
    the state dict of those layers, without slopes of prelu, and how many convolutions that is.
    Raises WeightsError for a file that ends within a layer, or not where its name says (137 in the
    example).
    """
    path = Path(path)
    named = re.search(r"\.conv\.(\d+)$", path.name)
    cut = int(named[1]) if layers is None and named else layers
    taken: list[_Part] = []
    end = 0  # floats of those
    incomplete: int | None = None
    with open(path, "rb") as file:
        found, odd = _floats_left(file, path, _read_header(file, path))
        for layer, group in groupby(_parts(network), lambda part: part.layer):
            if cut is not None and layer >= cut:
                break
            parts = list(group)
            size = sum(prod(part.shape) for part in parts)
            if end + size > found:
                incomplete = layer
                break
            taken += parts
            end += size
        if incomplete is not None and (cut is not None or found > end or odd):
            meant = f", but {cut} layers are meant to be in it" if cut else ""
            raise WeightsError(
                f"{path}: holds {found:,} floats, which end before layer {incomplete} is complete"
                f"{meant}"
            )
        if layers is None and (found > end or odd):
            raise WeightsError(
                f"{path}: holds {found:,} floats, {found - end:,} more than the "
                f"{cut or len(network.layers)} layers of this network that it should begin with"
            )
        if not taken:
            raise WeightsError(f"{path}: holds no whole convolution of this network")
        convolutions = sum(part.key.endswith(".conv.weight") for part in taken)
        return _read_parts(file, path, taken), convolutions


def write_weights(
    path: str | Path,
    network: Network,
    state: Mapping[str, Tensor],
    seen: int = 0,
    header: Header | None = None,
) -> None:
    """Write a network's weights atomically, as Darknet does.

    seen: images seen in training. header: one that was read, to be kept, instead of 0.2.5 and seen.
    Raises WeightsError for a state dict that lacks a tensor, or has one of another shape or with
    values that are not finite, and for a network with prelu.
    """
    _check_slopes(path, network)
    for part in _parts(network):
        if part.key not in state:
            raise WeightsError(f"layer {part.layer}: the weights have no {part.key}")
        tensor = state[part.key]
        if tuple(tensor.shape) != part.shape:
            raise WeightsError(
                f"layer {part.layer}: {part.key} is {tuple(tensor.shape)}, not {part.shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"layer {part.layer}: {part.key} holds NaN or infinity")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write((header or Header(seen=seen)).pack())
        for part in _parts(network):
            values = state[part.key].detach().to("cpu", torch.float32).contiguous().numpy()
            values.astype(FLOAT, copy=False).tofile(file)
