"""Whole configurations by name, which flags then change.

fast     Our own for small data sets: the defaults of `TrainConfig`.
seed     em-1001's "YOLOv4 from scratch" on PASCAL VOC: its network and anchors, Adam, 100 epochs
         with lower rates from epochs 30 and 50 on. `--schedule cosine` is its cosine annealing with
         T_max 100. What its text leaves open (augmentation, weights of the loss terms) is as in
         `fast`, without mosaic, which its table adds in a row of its own.
darknet  cfg/yolov4.cfg of AlexeyAB/darknet: 500,500 batches, or as many epochs as are asked for
         with the same shares of them at each learning rate.
cfg      The training section of a cfg: see `cfg_training`.

Darknet's learning rates hold as they are. Its layers add the gradients of all n images of a batch,
and its update divides by n: w <- w + rate / n * v, v <- momentum v - sum of gradients - decay n w.
With v / n in place of v that is torch's SGD on a loss that is the sum over images divided by their
number (`normaliser="images"`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from training.augment import AugmentConfig
from training.cfg_training import RANDOM, scales_within, training_of
from training.config import ArchitectureConfig, TrainConfig, ValidationConfig
from training.losses import LossConfig
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Network

PRESETS = ("fast", "seed", "darknet", "cfg")

SEED = TrainConfig(
    model="yolov4-seed-leaky",
    epochs=100,
    batch_size=32,
    optimizer="adam",
    learning_rate=1e-4,
    weight_decay=1e-4,
    schedule="steps",
    steps=(0.3, 0.5),
    scales=(0.5, 0.2),  # 1e-4, 5e-5, 1e-5
    final_learning_rate=0.0,  # of the cosine
    warmup_epochs=0.0,
    clip_gradient=0.0,
    ema_decay=0.0,
    mosaic_off_epochs=0,
    architecture=ArchitectureConfig(iou_thresh=1.0, ignore_thresh=0.5),
    augment=AugmentConfig(mosaic=0.0),
    validation=ValidationConfig(confidence=0.05, nms_iou=0.45),
)

DARKNET = TrainConfig(
    model="yolov4",
    width=608,
    height=608,
    max_batches=500_500,
    batch_size=64,
    subdivisions=8,
    optimizer="sgd",
    learning_rate=0.0013,
    momentum=0.949,
    nesterov=False,
    weight_decay=0.0005,
    schedule="steps",
    steps=(400_000 / 500_500, 450_000 / 500_500),
    scales=(0.1, 0.1),
    warmup_epochs=0.0,
    warmup_steps=1000,
    warmup_power=4.0,
    clip_gradient=0.0,
    ema_decay=0.0,
    mosaic_off_epochs=0,
)


class Preset(NamedTuple):
    """What a preset sets, and what of a cfg's training section it does not honour."""

    config: TrainConfig
    notes: tuple[str, ...] = ()


def preset(name: str, model: str | None = None, size: tuple[int, int] | None = None) -> Preset:
    """The configuration of that name, for a model and an input (width, height) other than its own
    where they are given. Raises ValueError, or OSError where a cfg cannot be read.
    """
    match name:
        case "fast":
            return Preset(_changed(TrainConfig(), model, size))
        case "seed":
            return Preset(_changed(SEED, model, size))
        case "darknet":
            return Preset(darknet(_changed(DARKNET, model, size)))
        case "cfg":
            if model is None or not model.endswith(".cfg"):
                raise ValueError(
                    "--preset cfg takes what the [net] section of a cfg says: give --model FILE.cfg"
                )
            network = read_cfg(model)
            if size:
                network = network.resized(*size)
            return Preset(*training_of(network, model))
    raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")


def darknet(config: TrainConfig) -> TrainConfig:
    """With the loss that the network's heads ask for, and sizes within Darknet's 1.4 either way."""
    network = named_network(config.model)
    step = network.max_stride
    return replace(
        config,
        multi_scale=scales_within(config.width, RANDOM, step),
        loss=LossConfig.of_heads(network.heads),
    )


def named_network(model: str) -> Network:
    """A cfg's network, or an architecture by name, whatever its classes."""
    return read_cfg(model) if model.endswith(".cfg") else by_name(model)


def _changed(config: TrainConfig, model: str | None, size: tuple[int, int] | None) -> TrainConfig:
    if model is not None:
        config = replace(config, model=model)
    return replace(config, width=size[0], height=size[1]) if size else config
