"""How the loss of a training run is set, by hand or by the [yolo] sections of a cfg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.box_loss import BOX_LOSSES, CIOU_GRADIENTS
from training.settings import check, setting
from yolov4_fast.network.layers import Head

NORMALISERS = ("positives", "images")
# Darknet's box gradients leave out two factors of the chain rule: in x and y the derivative of the
# sigmoid and of the grid (scale_x_y * s * (1 - s) / cells), in w and h the anchor as a share of the
# input. On yolov4 at 608 the geometric mean of what is missing, over x, y, w, h and all heads, is
# 1 / 42; a loss with true gradients needs that much more weight beside objectness and classes.
DARKNET_BOX = 40.0


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms and what each of them is; training/losses.py has the formulas."""

    box_loss: str = setting("ciou", "of the boxes", choices=BOX_LOSSES)
    ciou_gradient: str = setting(
        "exact", "of CIoU's aspect term; paper: without its 1/(w^2 + h^2)", choices=CIOU_GRADIENTS
    )
    box: float = setting(5.0, "weight of the box loss", low=0)
    objectness: float = setting(1.0, "weight of the objectness loss", low=0)
    no_object: float = setting(1.0, "weight of negatives within the objectness loss", low=0)
    classes: float = setting(1.0, "weight of the class loss", low=0)
    scale_balance: tuple[float, ...] = setting(
        (), "weight of each head's objectness, finest first; empty: all alike", above=0
    )
    normaliser: str = setting("positives", "what the sums are divided by", choices=NORMALISERS)
    focal_gamma: float = setting(0.0, "focusing exponent of a focal loss; 0: off", low=0, high=5)
    focal_alpha: float = setting(
        0.25, "share of positives in the focal loss of objectness", above=0, below=1
    )
    label_smoothing: float = setting(0.0, "class labels move this far towards 0.5", low=0, below=1)
    objectness_smooth: float = setting(
        0.0, "objectness labels move this far from 1 towards the IoU", low=0, high=1
    )

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def of_heads(cls, heads: Sequence[Head]) -> LossConfig:
        """What the [yolo] sections of a cfg ask for, as Darknet has it: sums over an image, divided
        by the number of images, CIoU with the paper's gradient.

        iou_loss         the box loss; mse is SSE
        iou_normalizer   its weight, times DARKNET_BOX; of mse a half, as Darknet's gradient is the
                         error itself and that of its square is twice as much
        obj_normalizer   the weight of each head's objectness
        cls_normalizer   the weight of classes, which Darknet itself forgets in most places
        delta_normalizer a factor on all three
        label_smooth_eps label_smoothing
        focal_loss       a focal loss with gamma 2, alpha 0.5; there of classes only
        objectness_smooth  objectness_smooth 1, if any head has it; Darknet's gives those labels to
                         other boxes that overlap the object too

        ignore_thresh and iou_thresh are read off the heads themselves. Not honoured: max_delta
        (gradients are clipped by their norm, if at all), truth_thresh (of no effect at 1, which all
        cfgs have), iou_thresh_kind, counters_per_class. Raises ValueError where the heads disagree
        on what there is one of.
        """
        loss = _common(heads, "iou_loss")
        factor = _number(heads, "delta_normalizer", 1.0)
        smoothing = _number(heads, "label_smooth_eps", 0.0)
        box = _common(heads, "iou_normalizer") * (0.5 if loss == "mse" else DARKNET_BOX)
        finest_first = sorted(heads, key=lambda head: head.stride)
        weights = tuple(head.obj_normalizer for head in finest_first)
        alike = len(set(weights)) == 1
        return cls(
            box_loss="sse" if loss == "mse" else loss,
            ciou_gradient="paper",
            box=box * factor,
            objectness=(weights[0] if alike else 1.0) * factor,
            classes=_common(heads, "cls_normalizer") * factor,
            scale_balance=() if alike else weights,
            normaliser="images",
            focal_gamma=2.0 if _number(heads, "focal_loss", 0.0) else 0.0,
            focal_alpha=0.5,
            label_smoothing=smoothing,
            objectness_smooth=float(any(_option(head, "objectness_smooth", 0.0) for head in heads)),
        )


def _common(heads: Sequence[Head], name: str) -> Any:
    """The value of a field that all heads must agree on."""
    return _one(name, [getattr(head, name) for head in heads])


def _number(heads: Sequence[Head], key: str, default: float) -> float:
    """The value of a verbatim training key that all heads must agree on."""
    return float(_one(key, [_option(head, key, default) for head in heads]))


def _one(name: str, values: Sequence[Any]) -> Any:
    if len(set(values)) != 1:
        told = ", ".join(map(str, values))
        raise ValueError(f"{name} must be the same in every [yolo] section, not {told}")
    return values[0]


def _option(head: Head, key: str, default: float) -> float:
    text = dict(head.training).get(key)
    try:
        return default if text is None else float(text)
    except ValueError:
        raise ValueError(f"[yolo] {key}={text} is not a number") from None
