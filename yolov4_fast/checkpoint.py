"""A training checkpoint: a safetensors file of weights, the network as cfg text in its header.

Tensors are those of `NetworkModule.state_dict()` without the counters of batch normalisation,
float32 or float16. Tensors named `resume.*` belong to the trainer (optimiser, raw weights) and are
passed over by `read_checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from yolov4_fast.darknet.cfg import parse_cfg, write_cfg
from yolov4_fast.files import replacing
from yolov4_fast.network.layers import Network

FORMAT = "yolov4_fast.checkpoint"
VERSION = 1
RESUME = "resume."

_Kind = TypeVar("_Kind")


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or a damaged one."""


@dataclass(frozen=True)
class Checkpoint:
    """A network, its weights (float32, on the CPU), class names, and the trainer's notes."""

    network: Network
    state: dict[str, Tensor]
    class_names: tuple[str, ...]
    metadata: dict[str, Any]


def write_checkpoint(
    path: str | Path,
    network: Network,
    state: Mapping[str, Tensor],
    class_names: tuple[str, ...],
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    resume: Mapping[str, Tensor] | None = None,
) -> None:
    """Write atomically. metadata: what JSON holds. resume: the trainer's tensors, as they are.

    dtype: of the convolutions' weights; vectors stay float32, as float16 loses small variances.
    """
    tensors = {
        name: value.detach()
        .to("cpu", dtype if name.endswith(".conv.weight") else torch.float32)
        .contiguous()
        for name, value in state.items()
        if value.dtype.is_floating_point
    }
    for name, value in (resume or {}).items():
        tensors[RESUME + name] = value.detach().cpu().contiguous()
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "network": write_cfg(network),
        "class_names": json.dumps(class_names),
        "metadata": json.dumps(dict(metadata or {})),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except SafetensorError as error:  # its form of a full disk
            raise OSError(f"{path}: cannot be written ({error})") from None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint. Raises FileNotFoundError or CheckpointError, each naming the file."""
    with _open(path) as (file, header):
        network = parse_cfg(header.get("network", ""), source=f"{path}: network")
        state = {
            name: file.get_tensor(name).float() for name in file.keys() if not _is_resume(name)
        }
    class_names = tuple(_field(path, header, "class_names", list))
    metadata = _field(path, header, "metadata", dict)
    _check(path, network, state, class_names)
    return Checkpoint(network, state, class_names, metadata)


def read_resume(path: str | Path) -> dict[str, Tensor]:
    """The trainer's own tensors of a checkpoint, without their prefix."""
    with _open(path) as (file, _):
        return {
            name.removeprefix(RESUME): file.get_tensor(name)
            for name in file.keys()
            if _is_resume(name)
        }


def is_checkpoint(path: str | Path) -> bool:
    """Whether the name is one of a checkpoint."""
    return Path(path).suffix == ".safetensors"


def _is_resume(name: str) -> bool:
    return name.startswith(RESUME)


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: is a safetensors file, but not a checkpoint of yolov4_fast training"
                )
            if _field(path, header, "version", int) > VERSION:
                raise CheckpointError(
                    f"{path}: is of checkpoint version {header['version']}, this program reads up "
                    f"to {VERSION}; update yolov4_fast"
                )
            yield file, header
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: is damaged or not a safetensors file ({error}); take an intact copy"
        ) from None


def _field(path: str | Path, header: Mapping[str, str], name: str, kind: type[_Kind]) -> _Kind:
    """A field of the header, which holds JSON of a known kind."""
    try:
        value = json.loads(header.get(name, ""))
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: its header has no sound {name}; take an intact copy")
    return value


def _check(
    path: str | Path, network: Network, state: Mapping[str, Tensor], class_names: tuple[str, ...]
) -> None:
    for name, values in state.items():
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; did its training diverge?"
            )
    if network.heads and len(class_names) != network.num_classes:
        raise CheckpointError(
            f"{path}: names {len(class_names)} classes, its network has {network.num_classes}"
        )
    for name, shape in network.tensors().items():
        tensor = state.get(name)
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise CheckpointError(
                f"{path}: {name} should be of shape {shape}, it is {found or 'missing'}"
            )
