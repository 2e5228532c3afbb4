"""The tiny networks: YOLOv4-tiny with two or three heads (arXiv 2011.08036), YOLOv3-tiny.

They repeat no blocks, so there is no depth to scale.
"""

from __future__ import annotations

from typing import Any

from yolov4_fast.network.architectures.builder import (
    Anchors,
    Builder,
    Training,
    choose_anchors,
)
from yolov4_fast.network.architectures.yolov4 import YOLOV4_ANCHORS
from yolov4_fast.network.layers import Network, Route

TINY_ANCHORS: Anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
YOLOV4_TINY_HEAD: dict[str, Any] = {
    "scale_x_y": 1.05,
    "nms_kind": "greedynms",
    "beta_nms": 0.6,
    "ignore_thresh": 0.7,
    "iou_loss": "ciou",
    "iou_normalizer": 0.07,
    "training": (("jitter", ".3"), ("truth_thresh", "1"), ("random", "0"), ("resize", "1.5")),
}
YOLOV3_HEAD: dict[str, Any] = {
    "ignore_thresh": 0.7,
    "training": (("jitter", ".3"), ("truth_thresh", "1"), ("random", "1")),
}


def darknet_training(
    batch: int, subdivisions: int, learning_rate: str, max_batches: int, steps: str
) -> Training:
    """[net]'s training keys of the networks that are trained without mosaic."""
    return (
        ("batch", str(batch)),
        ("subdivisions", str(subdivisions)),
        ("momentum", "0.9"),
        ("decay", "0.0005"),
        ("angle", "0"),
        ("saturation", "1.5"),
        ("exposure", "1.5"),
        ("hue", ".1"),
        ("learning_rate", learning_rate),
        ("burn_in", "1000"),
        ("max_batches", str(max_batches)),
        ("policy", "steps"),
        ("steps", steps),
        ("scales", ".1,.1"),
    )


def tiny_stage(b: Builder, filters: int) -> int:
    """A cross-stage partial stage on the second half of the channels, then 2x2 pooling.

    Returns the layer before the last concatenation, which the heads read.
    """
    first = b.conv(filters, 3, activation="leaky")
    b.add(Route(inputs=(first,), groups=2, group=1))
    a = b.conv(filters // 2, 3, activation="leaky")
    c = b.conv(filters // 2, 3, activation="leaky")
    b.route(c, a)
    joined = b.conv(filters, activation="leaky")
    b.route(first, joined)
    b.pool(2, 2)
    return joined


def tiny_backbone(b: Builder) -> tuple[int, int, int]:
    """Layers at strides 8, 16 and, last, 32."""
    b.conv(32, 3, stride=2, activation="leaky")
    b.conv(64, 3, stride=2, activation="leaky")
    tiny_stage(b, 64)
    stride8, stride16 = tiny_stage(b, 128), tiny_stage(b, 256)
    b.conv(512, 3, activation="leaky")
    return stride8, stride16, b.conv(256, activation="leaky")


def merge(b: Builder, coarse: int, fine: int, filters: int) -> int:
    """Upsample a coarse map beside a finer one, then a 3x3 convolution of twice `filters`."""
    b.route(coarse)
    b.conv(filters, activation="leaky")
    b.route(b.upsample(), fine)
    return b.conv(2 * filters, 3, activation="leaky")


def yolov4_tiny(
    num_classes: int = 80,
    width: int = 416,
    height: int = 416,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
) -> Network:
    """YOLOv4-tiny: heads at strides 32 and 16.

    The finer head uses anchors 1 to 3, not 0 to 2: so the official weights were trained.
    """
    b = Builder(width_multiple)
    chosen = choose_anchors(anchors, TINY_ANCHORS)
    _, stride16, stride32 = tiny_backbone(b)
    b.conv(512, 3, activation="leaky")
    b.head(num_classes, chosen, (3, 4, 5), 32, **YOLOV4_TINY_HEAD)
    merge(b, stride32, stride16, 128)
    b.head(num_classes, chosen, (1, 2, 3), 16, **YOLOV4_TINY_HEAD)
    training = darknet_training(64, 1, "0.00261", 2000200, "1600000,1800000")
    return b.build(width, height, training)


def yolov4_tiny_3l(
    num_classes: int = 80,
    width: int = 608,
    height: int = 608,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
) -> Network:
    """YOLOv4-tiny with a third head, at stride 8, and YOLOv4's nine anchors."""
    b = Builder(width_multiple)
    chosen = choose_anchors(anchors, YOLOV4_ANCHORS)
    stride8, stride16, stride32 = tiny_backbone(b)
    b.conv(512, 3, activation="leaky")
    b.head(num_classes, chosen, (6, 7, 8), 32, **YOLOV4_TINY_HEAD)
    middle = merge(b, stride32, stride16, 128)
    b.head(num_classes, chosen, (3, 4, 5), 16, **YOLOV4_TINY_HEAD)
    merge(b, middle, stride8, 64)
    b.head(num_classes, chosen, (0, 1, 2), 8, **YOLOV4_TINY_HEAD)
    return b.build(width, height, darknet_training(32, 4, "0.00261", 500200, "400000,450000"))


def yolov3_tiny(
    num_classes: int = 80,
    width: int = 416,
    height: int = 416,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
) -> Network:
    """YOLOv3-tiny: seven convolutions with max-pooling between them, heads at strides 32 and 16."""
    b = Builder(width_multiple)
    chosen = choose_anchors(anchors, TINY_ANCHORS)
    for filters in (16, 32, 64, 128):
        b.conv(filters, 3, activation="leaky")
        b.pool(2, 2)
    stride16 = b.conv(256, 3, activation="leaky")
    b.pool(2, 2)
    b.conv(512, 3, activation="leaky")
    b.pool(2, 1)
    b.conv(1024, 3, activation="leaky")
    stride32 = b.conv(256, activation="leaky")
    b.conv(512, 3, activation="leaky")
    b.head(num_classes, chosen, (3, 4, 5), 32, **YOLOV3_HEAD)
    merge(b, stride32, stride16, 128)
    b.head(num_classes, chosen, (0, 1, 2), 16, **YOLOV3_HEAD)
    return b.build(width, height, darknet_training(64, 2, "0.001", 500200, "400000,450000"))
