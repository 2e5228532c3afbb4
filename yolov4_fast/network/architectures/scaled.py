"""Scaled-YOLOv4 (arXiv 2011.08036): cross-stage connections in backbone, pooling and neck."""

from __future__ import annotations

from yolov4_fast.network.architectures.builder import (
    Anchors,
    Builder,
    Training,
    choose_anchors,
    csp_stage,
    pan,
    spp,
)
from yolov4_fast.network.architectures.yolov4 import MASKS, YOLOV4_ANCHORS, YOLOV4_TRAINING
from yolov4_fast.network.layers import Network

SCALED_TRAINING: Training = tuple(
    (key, "0.001" if key == "learning_rate" else value) for key, value in YOLOV4_TRAINING
)
OBJ_NORMALIZER = (4.0, 1.0, 0.4)  # at strides 8, 16, 32
OBJECTNESS_SMOOTH = ("0", "1", "1")
MAX_DELTA = ("5", "5", "2")


def csp_pooling(b: Builder, filters: int, repeats: int) -> int:
    """Spatial pyramid pooling on one of two paths, then `repeats` pairs of convolutions, and join.

    The pairs are not scaled by depth: the first of them only brings the four pooled maps together.
    """
    source = b.last
    bypass = b.conv(filters)
    b.route(source)
    b.conv(filters)
    b.conv(filters, 3)
    b.conv(filters)
    spp(b)
    main = pairs(b, filters, repeats)
    b.route(main, bypass)
    return b.conv(filters)


def csp_block(b: Builder, filters: int, repeats: int) -> int:
    """One 1x1 convolution, then two paths (pairs of 1x1 and 3x3 on one of them), and join."""
    source = b.conv(filters)
    bypass = b.conv(filters)
    b.route(source)
    main = pairs(b, filters, b.repeats(repeats))
    b.route(main, bypass)
    return b.conv(filters)


def pairs(b: Builder, filters: int, count: int) -> int:
    for _ in range(count):
        b.conv(filters)
        b.conv(filters, 3)
    return b.last


def scaled(
    b: Builder,
    num_classes: int,
    anchors: Anchors | None,
    backbone: tuple[tuple[int, int], ...],
    neck: tuple[int, int, int],
    pooling_repeats: int,
    block_repeats: int,
) -> None:
    """The whole network. backbone: filters and residual blocks by stride; neck: filters."""
    chosen = choose_anchors(anchors, YOLOV4_ANCHORS)
    b.conv(32, 3)
    filters, repeats = backbone[0]
    b.conv(filters, 3, stride=2)
    for _ in range(b.repeats(repeats)):
        b.residual(filters // 2, filters)
    stages = [csp_stage(b, filters, repeats) for filters, repeats in backbone[1:]]
    csp_pooling(b, neck[2], pooling_repeats)

    def head(scale: int) -> int:
        b.conv(2 * neck[scale], 3)
        return b.head(
            num_classes,
            chosen,
            MASKS[scale],
            8 << scale,
            activation="logistic",
            scale_x_y=2.0,
            new_coords=True,
            nms_kind="diounms",
            beta_nms=0.6,
            ignore_thresh=0.7,
            iou_thresh=0.2,
            iou_loss="ciou",
            iou_normalizer=0.05,
            obj_normalizer=OBJ_NORMALIZER[scale],
            cls_normalizer=0.5,
            training=(
                ("jitter", ".1"),
                ("objectness_smooth", OBJECTNESS_SMOOTH[scale]),
                ("truth_thresh", "1"),
                ("resize", "1.5"),
                ("max_delta", MAX_DELTA[scale]),
            ),
        )

    def block(filters: int, ends: bool) -> int:
        return csp_block(b, filters, block_repeats)

    pan(b, stages[1], stages[2], neck, "mish", block, head)


def yolov4_csp(
    num_classes: int = 80,
    width: int = 512,
    height: int = 512,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
) -> Network:
    """YOLOv4-CSP: Mish throughout, logistic heads with new_coords, letterboxed input."""
    b = Builder(width_multiple, depth_multiple)
    backbone = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))
    scaled(b, num_classes, anchors, backbone, (128, 256, 512), 1, 2)
    return b.build(width, height, SCALED_TRAINING, letter_box=True)


def yolov4x_mish(
    num_classes: int = 80,
    width: int = 640,
    height: int = 640,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
) -> Network:
    """YOLOv4x-mish: YOLOv4-CSP 1.25 times as wide and 1.33 times as deep."""
    b = Builder(width_multiple, depth_multiple)
    backbone = ((80, 1), (160, 3), (320, 10), (640, 10), (1280, 5))
    scaled(b, num_classes, anchors, backbone, (160, 320, 640), 2, 3)
    return b.build(width, height, SCALED_TRAINING, letter_box=True)
