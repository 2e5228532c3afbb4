"""How training pictures are varied."""

from __future__ import annotations

from dataclasses import dataclass

from training.settings import check, setting


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The defaults are those of Darknet's yolov4.cfg; what it does not do is off."""

    mosaic: float = setting(0.5, "probability of a mosaic of four pictures", low=0, high=1)
    cutmix: float = setting(
        0.0, "probability of a rectangle of another picture, with its objects", low=0, high=1
    )
    mixup: float = setting(0.0, "probability of blending with another picture", low=0, high=1)
    flip: float = setting(0.5, "probability of mirroring left to right", low=0, high=1)
    flip_vertical: float = setting(
        0.0,
        "the same, top to bottom: for pictures without an up, such as microscopy",
        low=0,
        high=1,
    )
    jitter: float = setting(
        0.3, "each side of the crop moves by up to this share", low=0, below=0.5
    )
    scale: float = setting(
        1.0, "the crop grows or shrinks as a whole by up to this factor", low=1, high=4
    )
    rotation: float = setting(0.0, "degrees of rotation, either way", low=0, high=180)
    hue: float = setting(0.1, "share of the colour circle that hues move by", low=0, high=1)
    saturation: float = setting(1.5, "factor or divisor of the saturation", low=1, high=10)
    exposure: float = setting(
        1.5, "factor or divisor of the brightness (HSV value)", low=1, high=10
    )
    brightness: float = setting(
        0.0, "share of the range that is added or taken away", low=0, high=1
    )
    contrast: float = setting(1.0, "factor or divisor of the contrast", low=1, high=10)
    noise: float = setting(
        0.0, "largest standard deviation of Gaussian noise, in levels of 255", low=0, high=128
    )
    random_erase: float = setting(0.0, "probability of a rectangle of random pixels", low=0, high=1)
    cutout: float = setting(0.0, "probability of grey squares", low=0, high=1)
    grid_mask: float = setting(0.0, "probability of a grid of grey squares", low=0, high=1)
    min_visible: float = setting(
        0.1, "boxes that keep a smaller share of their area are dropped", low=0, high=1
    )

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def off(cls) -> AugmentConfig:
        """Resizing only."""
        return cls(mosaic=0, flip=0, jitter=0, hue=0, saturation=1, exposure=1)
