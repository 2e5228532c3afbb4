"""What the training of a classifier is set to: frozen, kept in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import OPTIMIZERS, PRECISIONS, SCHEDULES, WEIGHTED
from training.settings import check, setting
from yolov4_fast.network.layers import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All that decides the weights a run ends with, apart from data and the machine's rounding."""

    model: str = setting("yolov4-nano", "a .cfg or an architecture, whose backbone is trained")
    width_multiple: float | None = setting(None, "factor on all channels", above=0, high=4)
    activation: str = setting("as named", "of the backbone", choices=("as named", *ACTIVATIONS))
    csp: bool = setting(True, "cross-stage partial stages; without: residual stages (Darknet53)")
    weighted_shortcuts: str = setting(
        "none", "normalised weights of the residual connections (MiWRC)", choices=WEIGHTED
    )
    width: int = setting(256, "of the input, px", low=32)
    height: int = setting(256, "of the input, px", low=32)
    epochs: int = setting(100, "passes over the pictures", low=1)
    batch_size: int = setting(64, "pictures per optimiser step, over all processes", low=1)
    optimizer: str = setting("adamw", "how to step", choices=tuple(OPTIMIZERS))
    learning_rate: float = setting(1e-3, "largest learning rate", above=0)
    schedule: str = setting("cosine", "of the learning rate", choices=SCHEDULES)
    final_learning_rate: float = setting(
        0.01, "share of the learning rate at the end of the cosine", low=0, high=1
    )
    steps: tuple[float, ...] = setting(
        (0.8, 0.9), "shares of the run at which `steps` changes the rate", low=0, high=1
    )
    scales: tuple[float, ...] = setting((0.1, 0.1), "factors of `steps`, one each", above=0)
    warmup_epochs: float = setting(5.0, "in which the learning rate rises from 0", low=0)
    warmup_steps: int = setting(0, "the same in steps; 0: as the epochs say", low=0)
    warmup_power: float = setting(1.0, "of that rise; Darknet's burn-in has 4", above=0)
    momentum: float = setting(0.9, "momentum of SGD, beta1 of Adam", low=0, below=1)
    nesterov: bool = setting(True, "Nesterov's momentum with SGD")
    weight_decay: float = setting(0.05, "of convolution and linear weights", low=0)
    clip_gradient: float = setting(10.0, "largest norm of the gradient; 0: not clipped", low=0)
    ema_decay: float = setting(
        0.998, "of the averaged weights that are validated and kept; 0: the weights themselves",
        low=0, below=1,
    )  # fmt: skip
    label_smoothing: float = setting(
        0.1, "share of the label that is spread over all classes", low=0, below=1
    )
    dropblock: float = setting(
        0.1, "share of a map that is dropped at the end of the run", low=0, below=1
    )
    dropblock_size: int = setting(7, "side of a dropped square, in cells", low=1)
    cutmix: float = setting(0.3, "probability of a rectangle of another picture", low=0, high=1)
    mosaic: float = setting(0.3, "probability of a mosaic of four pictures", low=0, high=1)
    crop: float = setting(
        0.25, "least share of a picture's area that a crop shows; 1: no crop but to the input's "
        "proportions", above=0, high=1,
    )  # fmt: skip
    flip: float = setting(0.5, "probability of mirroring left to right", low=0, high=1)
    hue: float = setting(0.1, "share of the colour circle that hues move by", low=0, high=1)
    saturation: float = setting(1.5, "factor or divisor of the saturation", low=1, high=10)
    exposure: float = setting(
        1.5, "factor or divisor of the brightness (HSV value)", low=1, high=10
    )
    precision: str = setting(
        "f32", "of the network; weights and loss stay in float32", choices=PRECISIONS
    )
    seed: int = setting(0, "of all that is random", low=0)

    def __post_init__(self) -> None:
        check(self)
        if self.cutmix + self.mosaic > 1:
            raise ValueError(
                f"cutmix {self.cutmix} and mosaic {self.mosaic} add up to more than 1: a picture "
                "has one of them or none"
            )
        if len(self.steps) != len(self.scales):
            raise ValueError(f"steps {self.steps} and scales {self.scales} must be as many")
