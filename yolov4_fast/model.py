"""What a user can name as a model -> its network, weights and class names.

A training checkpoint (.safetensors), a Darknet .cfg with .weights, the name of an official model,
or the name of an architecture with given or, only when asked for, random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast import zoo
from yolov4_fast.checkpoint import is_checkpoint, read_checkpoint
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.names import read_names
from yolov4_fast.darknet.weights import read_weights
from yolov4_fast.network.architectures import NAMES, by_name
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule


class ModelError(ValueError):
    """What the user named is not enough, or too much, to make a model of."""


@dataclass(frozen=True)
class Model:
    """A network, its state dict (float32, CPU, BN not folded) and its class names."""

    network: Network
    state: dict[str, Tensor]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what was assumed, for the user to read


def open_model(
    name: str,
    *,
    weights: str | Path | None = None,
    names: str | Path | None = None,
    size: tuple[int, int] | None = None,
    random: bool = False,
    seed: int = 0,
) -> Model:
    """Open what the user named.

    weights: a Darknet .weights or a checkpoint of the same network. names: a file with one class
    name a line. size: (width, height) px of the input. random: random weights, seeded. Raises
    ModelError, FileNotFoundError, and the errors of the readers.
    """
    if random and (weights or is_checkpoint(name)):
        raise ModelError("--random makes weights up: it does not go with a file of weights")
    if weights and is_checkpoint(name):
        raise ModelError(f"{name} brings its own weights: --weights does not go with it")
    checkpoint = read_checkpoint(name) if is_checkpoint(name) else None
    network = checkpoint.network if checkpoint else open_network(name)
    if not network.heads:
        raise ModelError(f"{name}: has no [yolo] head, so it cannot detect")
    notes: list[str] = []
    if names:
        class_names = read_names(names)
        if len(class_names) != network.num_classes:
            raise ModelError(
                f"{names}: {len(class_names)} names for a network of {network.num_classes} classes"
            )
    elif checkpoint:
        class_names = checkpoint.class_names
    else:
        class_names, note = _default_names(network.num_classes)
        notes.append(note)
    sized = network.resized(*size) if size else network
    if checkpoint:
        return Model(sized, checkpoint.state, class_names)
    if weights is None and not random and name in zoo.OFFICIAL:
        weights = zoo.fetch(name)
        notes.append(f"weights: the official ones, {weights}")
    state = _weights(name, network, weights, random, seed)
    return Model(sized, state, class_names, tuple(notes))


def open_network(name: str) -> Network:
    """The network of a .cfg, a checkpoint or an architecture's name, without weights."""
    if is_checkpoint(name):
        return read_checkpoint(name).network
    if Path(name).suffix == ".cfg":
        return read_cfg(name)
    if name in NAMES:
        return by_name(name)
    path = Path(name)
    if path.is_dir():
        raise ModelError(f"{name}: is a folder; name the .cfg or the .safetensors in it")
    if path.suffix == ".weights":
        raise ModelError(f"{name}: weights belong to a cfg: give MODEL.cfg --weights {name}")
    if path.suffix == ".engine" or is_zipfile(path):
        raise ModelError(f"{name}: is an engine file; name the model that it was built from")
    if path.suffix or path.exists():
        raise ModelError(f"{name}: a model is a .cfg, a .safetensors checkpoint or a name")
    raise ModelError(f"no model is called {name!r}; there are {', '.join(NAMES)}")


def _weights(
    name: str, network: Network, weights: str | Path | None, random: bool, seed: int
) -> dict[str, Tensor]:
    if random:
        return random_state(network, seed)
    if weights is None:
        raise ModelError(
            f"{name}: has no weights of its own: give --weights FILE, or --random for random ones"
        )
    if not is_checkpoint(weights):
        return read_weights(weights, network)
    checkpoint = read_checkpoint(weights)
    if checkpoint.network.layers != network.layers:
        raise ModelError(f"{weights}: was trained with another network than {name}")
    return checkpoint.state


def random_state(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Random weights whose activations are of a trained network's size, and that find nothing.

    The statistics of batch normalisation are those of pictures of coloured blocks: with the usual 0
    and 1, activations would grow from layer to layer until everything is an object.
    """
    side = 8 * network.max_stride
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = NetworkModule(network, bn_momentum=1.0).train()
        blocks = torch.rand(4, network.channels, 8, 8)
        noise = 0.1 * torch.rand(4, network.channels, side, side)
        module(0.9 * F.interpolate(blocks, size=(side, side)) + noise)
    return module.state_dict()


def _default_names(count: int) -> tuple[tuple[str, ...], str]:
    """Names for want of given ones, and what to tell of them."""
    if count == len(zoo.COCO_NAMES):
        return zoo.COCO_NAMES, "class names: the 80 of COCO (--names FILE for others)"
    numbered = tuple(f"class_{index}" for index in range(count))
    return numbered, f"class names: class_0 to class_{count - 1} (--names FILE for real ones)"
