"""What the training of a classifier is set to: frozen, kept in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import WEIGHTED
from training.settings import setting
from training.stepping import SteppingConfig
from yolov4_fast.network.layers import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(SteppingConfig):
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
    final_learning_rate: float = setting(
        0.01, "share of the learning rate at the end of the cosine", low=0, high=1
    )
    warmup_epochs: float = setting(5.0, "in which the learning rate rises from 0", low=0)
    label_smoothing: float = setting(
        0.1, "share of the label that is spread over all classes", low=0, below=1
    )
    dropblock: float = setting(
        0.1, "share of a map that is dropped at the end of the run", low=0, below=1
    )
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutmix + self.mosaic > 1:
            raise ValueError(
                f"cutmix {self.cutmix} and mosaic {self.mosaic} add up to more than 1: a picture "
                "has one of them or none"
            )
