"""What a training run is set to: frozen, kept in every checkpoint, compared on resuming."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any

from training.augment import AugmentConfig
from training.losses import LossConfig

OPTIMIZERS = {"adamw": (1e-3, 0.05), "sgd": (1e-2, 5e-4)}  # usual learning rate, weight decay
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the weights a run ends with, apart from data and the machine's rounding."""

    model: str = "yolov4-nano"
    width: int = 416
    height: int = 416
    epochs: int = 100
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.02  # as a share of learning_rate, at the end of the cosine
    momentum: float = 0.9  # beta1 of AdamW, momentum of SGD
    weight_decay: float = 0.05
    warmup_epochs: float = 3.0
    clip_gradient: float = 10.0
    ema_decay: float = 0.998
    mosaic_off_epochs: int = 10  # the last epochs see whole images only
    precision: str = "f32"
    seed: int = 0
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch size must be at least 1")
        if not 0 < self.learning_rate < inf:
            raise ValueError(f"a learning rate of {self.learning_rate} is not positive and finite")
        for name in ("weight_decay", "warmup_epochs", "mosaic_off_epochs", "seed"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What another run's configuration (from `to_json`) sets otherwise, as sentences."""
        mine = self.to_json()
        return [
            f"{name} was {other.get(name)!r} and is now {mine[name]!r}"
            for name in (item.name for item in fields(self))
            if other.get(name) != mine[name]
        ]
