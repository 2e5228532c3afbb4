"""The network that a run trains, and the weights that it starts from."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from training.anchors import read_anchors
from training.config import ArchitectureConfig, TrainConfig
from training.initial import initial_state
from training.trainer import Trainer
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Network

AS_NAMED = ArchitectureConfig()
OF_HEADS = ("iou_thresh", "ignore_thresh")  # settings of [yolo] that any network takes


def make_network(config: TrainConfig, num_classes: int) -> Network:
    """An architecture by name with the configuration's changes, or a .cfg that must fit the data's
    classes. Raises ValueError for a change that the architecture does not take.
    """
    changes = changed(config.architecture)
    if "anchors" in changes:
        changes["anchors"] = read_anchors(changes["anchors"], (config.width, config.height))
    heads = {name: changes.pop(name) for name in OF_HEADS if name in changes}
    if config.model.endswith(".cfg"):
        if changes:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changes)
            raise ValueError(f"{config.model}: a cfg is changed in its text, not by {flags}")
        network = _read(config, num_classes)
    else:
        network = by_name(
            config.model,
            num_classes=num_classes,
            width=config.width,
            height=config.height,
            **changes,
        )
    return _with_heads(network, heads) if heads else network


def changed(architecture: ArchitectureConfig) -> dict[str, Any]:
    """The settings that are not as the architecture was named."""
    return {
        item.name: getattr(architecture, item.name)
        for item in fields(architecture)
        if getattr(architecture, item.name) != getattr(AS_NAMED, item.name)
    }


def _read(config: TrainConfig, num_classes: int) -> Network:
    network = read_cfg(config.model)
    if network.channels != 3:
        raise ValueError(
            f"{config.model}: takes {network.channels} channels; pictures are read with 3 (RGB)"
        )
    if network.num_classes != num_classes:
        raise ValueError(
            f"{config.model}: is for {network.num_classes} classes, the data have {num_classes}; "
            f"set classes={num_classes} in each [yolo] and filters to fit before it"
        )
    return network.resized(config.width, config.height)


def _with_heads(network: Network, values: dict[str, Any]) -> Network:
    heads = network.heads
    layers = tuple(
        replace(layer, **values) if layer in heads else layer for layer in network.layers
    )
    return replace(network, layers=layers)


def load_initial(trainer: Trainer, path: Path) -> str:
    """Start from a checkpoint or Darknet weights, also partial ones. -> what was taken."""
    state, told = initial_state(path, trainer.network, trainer.config.model)
    trainer.initialise(state)
    return f"{path}: took {told}"
