"""YOLOv3 (arXiv 1804.02767): Darknet-53 and a feature pyramid, leaky throughout."""

from __future__ import annotations

from yolov4_fast.network.architectures.builder import (
    Anchors,
    Builder,
    alternate,
    choose_anchors,
    darknet53,
    spp,
)
from yolov4_fast.network.architectures.tiny import YOLOV3_HEAD, darknet_training
from yolov4_fast.network.layers import Network

YOLOV3_ANCHORS: Anchors = (
    (10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326),
)  # fmt: skip
YOLOV3_TRAINING = darknet_training(64, 16, "0.001", 500200, "400000,450000")


def pyramid(b: Builder, num_classes: int, anchors: Anchors, stride8: int, stride16: int) -> None:
    """Heads at strides 32, 16 and 8, each finer one reading the one before, upsampled."""
    finer = ((256, stride16, (3, 4, 5), 16), (128, stride8, (0, 1, 2), 8))
    top = b.last
    b.conv(1024, 3, activation="leaky")
    b.head(num_classes, anchors, (6, 7, 8), 32, **YOLOV3_HEAD)
    for filters, source, mask, stride in finer:
        b.route(top)
        b.conv(filters, activation="leaky")
        b.route(b.upsample(), source)
        top = alternate(b, filters, 5, "leaky")
        b.conv(2 * filters, 3, activation="leaky")
        b.head(num_classes, anchors, mask, stride, **YOLOV3_HEAD)


def yolov3(
    num_classes: int = 80,
    width: int = 416,
    height: int = 416,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
) -> Network:
    """YOLOv3 on Darknet-53."""
    b = Builder(width_multiple, depth_multiple)
    stride8, stride16, _ = darknet53(b, "leaky")
    alternate(b, 512, 5, "leaky")
    pyramid(b, num_classes, choose_anchors(anchors, YOLOV3_ANCHORS), stride8, stride16)
    return b.build(width, height, YOLOV3_TRAINING)


def yolov3_spp(
    num_classes: int = 80,
    width: int = 608,
    height: int = 608,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
) -> Network:
    """YOLOv3 with spatial pyramid pooling before the coarsest head."""
    b = Builder(width_multiple, depth_multiple)
    stride8, stride16, _ = darknet53(b, "leaky")
    alternate(b, 512, 3, "leaky")
    spp(b)
    alternate(b, 512, 3, "leaky")
    pyramid(b, num_classes, choose_anchors(anchors, YOLOV3_ANCHORS), stride8, stride16)
    return b.build(width, height, YOLOV3_TRAINING)
