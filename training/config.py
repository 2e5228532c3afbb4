"""What a training run is set to: frozen, kept in every checkpoint, compared on resuming."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from training.augment import AugmentConfig
from training.losses import LossConfig
from training.settings import check, setting
from training.stepping import SteppingConfig, listed
from yolov4_fast.network.layers import ACTIVATIONS

NORMS = ("sync", "local", "cross")
WEIGHTED = ("none", "relu", "softmax")


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """Changes to the architecture that was named; empty or "as named": leave it as it is."""

    width_multiple: float | None = setting(None, "factor on all channels", above=0, high=4)
    activation: str = setting(
        "as named", "activation of the backbone", choices=("as named", *ACTIVATIONS)
    )
    neck_activation: str = setting(
        "as named", "activation of neck and heads", choices=("as named", *ACTIVATIONS)
    )
    spp: bool = setting(True, "spatial pyramid pooling")
    pan: bool = setting(True, "path aggregation; without: top-down only, as in YOLOv3")
    csp: bool = setting(True, "cross-stage partial stages; without: residual stages (Darknet53)")
    sam: bool = setting(False, "spatial attention before each head")
    weighted_shortcuts: str = setting(
        "none", "normalised weights of the residual connections (MiWRC)", choices=WEIGHTED
    )
    anchors: str = setting("", "nine w,h pairs in pixels of the input, or a file that holds them")
    scale_x_y: tuple[float, ...] = setting(
        (), "per head, finest first; 1,1,1: plain sigmoid", low=1, high=4
    )
    iou_thresh: float | None = setting(
        None,
        "anchors above this IoU with an object are positive too; 1: the best only",
        low=0,
        high=1,
    )
    ignore_thresh: float | None = setting(
        None, "boxes above this IoU with an object are no negatives", low=0, high=1
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How the detector of the averaged weights is measured."""

    confidence: float = setting(0.001, "least score of a detection", low=0, below=1)
    nms_iou: float = setting(0.45, "overlap at which the lesser box is dropped", low=0, high=1)
    nms: str = setting(
        "network", "kind of NMS: the network's own, plain IoU, or DIoU",
        choices=("network", "iou", "diou"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SteppingConfig):
    """All that decides the weights a run ends with, apart from data and the machine's rounding."""

    model: str = setting("yolov4-nano", "an architecture by name, or a .cfg")
    width: int = setting(416, "of the input, px", low=32)
    height: int = setting(416, "of the input, px", low=32)
    epochs: int = setting(100, "passes over the data", low=1)
    max_batches: int = setting(
        0, "optimiser steps at which the run ends; 0: when its epochs are done", low=0
    )
    batch_size: int = setting(16, "images per optimiser step, over all processes", low=1)
    subdivisions: int = setting(
        1, "mini-batches that a batch is split into, their gradients added", low=1
    )
    multi_scale: tuple[int, ...] = setting(
        (), "least and largest width that the input takes in turn", low=32
    )
    multi_scale_every: int = setting(10, "steps between changes of the size", low=1)
    batch_norm: str = setting(
        "sync",
        "statistics of normalisation: over all processes (sync), each one's own (local), or over"
        " the mini-batches of a batch so far (cross: CmBN)",
        choices=NORMS,
    )
    dropblock: float = setting(0.0, "share of a map that is dropped at the end", low=0, below=1)
    adversarial: float = setting(
        0.0, "probability that a batch is attacked before it is trained on", low=0, high=1
    )
    adversarial_step: float = setting(
        0.02, "largest change of a pixel by the attack, in 0..1", above=0, high=1
    )
    mosaic_off_epochs: int = setting(10, "last epochs, which see whole images only", low=0)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.subdivisions:
            raise ValueError(
                f"a batch of {self.batch_size} does not split into {self.subdivisions} "
                "subdivisions: one must divide the other"
            )
        if self.multi_scale and (
            len(self.multi_scale) != 2 or self.multi_scale[0] > self.multi_scale[1]
        ):
            raise ValueError(
                "multi_scale is the least and the largest width, such as 320-608, not "
                f"{listed(self.multi_scale)}"
            )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        return self.max_batches or self.epochs * steps_per_epoch

    def to_json(self) -> dict[str, Any]:
        """As JSON gives it back: tuples are lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What another run's configuration (from `to_json`) sets otherwise, as sentences.

        A setting that it lacks, as it was written before there was one, had its default.
        """
        theirs, mine = _flat(TrainConfig().to_json()) | _flat(other), _flat(self.to_json())
        return [
            f"{name} was {theirs[name]!r} and is now {mine[name]!r}"
            if name in mine
            else f"{name} was {theirs[name]!r}, a setting that this version does not have"
            for name in theirs
            if name not in mine or theirs[name] != mine[name]
        ]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by name; those of nested configurations too, as no name occurs twice."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
