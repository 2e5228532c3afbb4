"""What can be switched in the networks of the YOLOv4 family: the paper's "bag of specials"."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from yolov4_fast.network.layers import NetworkError


@dataclass(frozen=True, kw_only=True)
class Switches:
    """The defaults are the official network.

    activation: of the backbone. neck_activation: of neck and heads. spp: spatial pyramid pooling.
    pan: path aggregation; without it the path is top-down only, as in YOLOv3, with three heads.
    csp: cross-stage partial stages; without them residual stages, which make Darknet-53. sam:
    spatial attention in the block before each head, ahead of the block's last 1x1 convolution, as
    in yolov4-sam-mish.cfg of AlexeyAB/darknet. weighted_shortcuts: how the weights of the residual
    connections, one an input, are normalised (MiWRC); "none": plain sums. scale_x_y: of the heads
    at strides 8, 16 and 32; iou_thresh, ignore_thresh: of all heads; None: the architecture's own.
    """

    activation: str = "mish"
    neck_activation: str = "leaky"
    spp: bool = True
    pan: bool = True
    csp: bool = True
    sam: bool = False
    weighted_shortcuts: str = "none"
    scale_x_y: tuple[float, ...] | None = None
    iou_thresh: float | None = None
    ignore_thresh: float | None = None

    def __post_init__(self) -> None:
        scales = self.scale_x_y
        if scales is not None and (len(scales) != 3 or not all(0 < s < inf for s in scales)):
            raise NetworkError(
                f"scale_x_y takes three positive numbers, for strides 8, 16 and 32, not {scales}"
            )

    def thresholds(self) -> dict[str, float]:
        """The fields of `Head` that are set here."""
        named = {"iou_thresh": self.iou_thresh, "ignore_thresh": self.ignore_thresh}
        return {name: value for name, value in named.items() if value is not None}
