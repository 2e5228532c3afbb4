"""YOLOv4 (arXiv 2004.10934), a small one for CPUs, and two well-known re-implementations of it.

All of them take the fields of `Switches` as further keyword arguments.
"""

from __future__ import annotations

from typing import Any

from yolov4_fast.network.architectures.builder import (
    Anchors,
    Builder,
    Training,
    alternate,
    choose_anchors,
    csp_stage,
    darknet53,
    pan,
    spp,
)
from yolov4_fast.network.architectures.switches import Switches
from yolov4_fast.network.layers import Network

YOLOV4_ANCHORS: Anchors = (
    (12, 16), (19, 36), (40, 28), (36, 75), (76, 55), (72, 146), (142, 110), (192, 243), (459, 401),
)  # fmt: skip
MASKS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))  # at strides 8, 16, 32
YOLOV4_TRAINING: Training = (
    ("batch", "64"),
    ("subdivisions", "8"),
    ("momentum", "0.949"),
    ("decay", "0.0005"),
    ("angle", "0"),
    ("saturation", "1.5"),
    ("exposure", "1.5"),
    ("hue", ".1"),
    ("learning_rate", "0.0013"),
    ("burn_in", "1000"),
    ("max_batches", "500500"),
    ("policy", "steps"),
    ("steps", "400000,450000"),
    ("scales", ".1,.1"),
    ("mosaic", "1"),
)
YOLOV4_HEAD: dict[str, Any] = {
    "nms_kind": "greedynms",
    "beta_nms": 0.6,
    "ignore_thresh": 0.7,
    "iou_thresh": 0.213,
    "iou_loss": "ciou",
    "iou_normalizer": 0.07,
    "training": (("jitter", ".3"), ("truth_thresh", "1"), ("max_delta", "5")),
}
DIOU_NMS: dict[str, Any] = {"nms_kind": "diounms", "beta_nms": 1.0}  # as the paper has it


def csp_darknet53(b: Builder) -> tuple[int, int, int]:
    """CSPDarknet53, with Mish unless b has another activation. Returns the layers at strides 8, 16
    and 32.
    """
    b.conv(32, 3)
    csp_stage(b, 64, 1, first=True)
    csp_stage(b, 128, 2)
    return csp_stage(b, 256, 8), csp_stage(b, 512, 8), csp_stage(b, 1024, 4)


def built_backbone(
    switches: Switches, width_multiple: float, depth_multiple: float
) -> tuple[Builder, int, int]:
    """A builder that holds the backbone (its last layer is at stride 32), and the backbone's layers
    at strides 8 and 16.
    """
    b = Builder(width_multiple, depth_multiple, switches.activation, switches.weighted_shortcuts)
    stride8, stride16, _ = csp_darknet53(b) if switches.csp else darknet53(b)
    return b, stride8, stride16


def pooling(b: Builder, switches: Switches) -> None:
    """Spatial pyramid pooling between three convolutions and three; without it they are five, as
    YOLOv3 stands to YOLOv3-SPP.
    """
    activation = switches.neck_activation
    sam = switches.sam and not switches.pan  # without path aggregation a head reads the last
    if not switches.spp:
        alternate(b, 512, 5, activation, sam)
        return
    alternate(b, 512, 3, activation)
    spp(b)
    alternate(b, 512, 3, activation, sam)


def pan_with_heads(
    b: Builder,
    stride8: int,
    stride16: int,
    switches: Switches,
    num_classes: int,
    anchors: Anchors,
    scale_x_y: tuple[float, float, float] = (1.2, 1.1, 1.05),
    newest_first: bool = True,
    **settings: Any,
) -> None:
    """YOLOv4's neck and heads after the pyramid pooling, one activation throughout.

    scale_x_y and settings (further fields of `Head`): where the switches say nothing else.
    """
    activation = switches.neck_activation

    def head(scale: int) -> int:
        b.conv(256 << scale, 3, activation=activation)
        return b.head(
            num_classes,
            anchors,
            MASKS[scale],
            8 << scale,
            scale_x_y=(switches.scale_x_y or scale_x_y)[scale],
            **(YOLOV4_HEAD | settings | switches.thresholds()),
        )

    def block(filters: int, ends: bool) -> int:
        return alternate(b, filters, 5, activation, switches.sam and ends)

    pan(
        b, stride8, stride16, (128, 256, 512), activation, block, head, newest_first, switches.pan
    )  # fmt: skip


def yolov4(
    num_classes: int = 80,
    width: int = 608,
    height: int = 608,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
    **switches: Any,
) -> Network:
    """YOLOv4: CSPDarknet53 with Mish, SPP, PAN with leaky (or Mish) convolutions, three heads."""
    chosen = Switches(**switches)
    b, stride8, stride16 = built_backbone(chosen, width_multiple, depth_multiple)
    pooling(b, chosen)
    pan_with_heads(
        b, stride8, stride16, chosen, num_classes, choose_anchors(anchors, YOLOV4_ANCHORS)
    )
    return b.build(width, height, YOLOV4_TRAINING)


def yolov4_nano(
    num_classes: int = 80,
    width: int = 416,
    height: int = 416,
    anchors: Anchors | None = None,
    **switches: Any,
) -> Network:
    """YOLOv4 at a quarter of its width: 4.1 million parameters, 4 Gops at 416; made for CPUs."""
    return yolov4(num_classes, width, height, anchors, width_multiple=0.25, **switches)


# Of a network trained on PASCAL VOC, as fractions of the image, finest first.
SEED_ANCHORS: Anchors = (
    (0.02, 0.03), (0.04, 0.07), (0.08, 0.06), (0.07, 0.15), (0.15, 0.11), (0.14, 0.29),
    (0.28, 0.22), (0.38, 0.48), (0.9, 0.78),
)  # fmt: skip


def yolov4_seed_leaky(
    num_classes: int = 20,
    width: int = 416,
    height: int = 416,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
    **switches: Any,
) -> Network:
    """The "YOLOv4 from scratch" re-implementation (github.com/em-1001/YOLOv4).

    Layers are those of `yolov4` with its leaky neck. What differs is in the heads: a plain sigmoid
    (scale_x_y 1), anchors given as fractions of the image, DIoU-NMS with exponent 1, 20 classes.
    Two habits of that code are not taken over: its blocks of five convolutions run one 1x1 three
    times and one 3x3 twice, tying weights that the paper (and this network) keep apart, and it
    returns stride 32 first.
    """
    if anchors is None:
        anchors = tuple((w * width, h * height) for w, h in SEED_ANCHORS)
    chosen = Switches(**switches)
    b, stride8, stride16 = built_backbone(chosen, width_multiple, depth_multiple)
    pooling(b, chosen)
    pan_with_heads(
        b,
        stride8,
        stride16,
        chosen,
        num_classes,
        choose_anchors(anchors, SEED_ANCHORS),
        scale_x_y=(1.0, 1.0, 1.0),
        **DIOU_NMS,
    )
    return b.build(width, height, YOLOV4_TRAINING)


def yolov4_seed_mish(
    num_classes: int = 80,
    width: int = 416,
    height: int = 416,
    anchors: Anchors | None = None,
    width_multiple: float = 1.0,
    depth_multiple: float = 1.0,
    **switches: Any,
) -> Network:
    """The re-implementation with Mish everywhere (SuminizZ's review, after csm-kr/YOLOv4_pytorch).

    Against `yolov4`: Mish in neck and heads; a single 1x1 convolution to 512 channels before the
    pyramid pooling and one of 2048 to 2048 after it; every concatenation lists the older map
    first (the pooling's: the map itself, then 5, 9, 13); DIoU-NMS with exponent 1. What its text
    leaves out (join of a cross-stage block, anchors, scale_x_y) is as in `yolov4`. Its neck's
    activation is Mish unless another is named; spp=False leaves both 1x1 convolutions out too.
    """
    chosen = Switches(**({"neck_activation": "mish"} | switches))
    b, stride8, stride16 = built_backbone(chosen, width_multiple, depth_multiple)
    if chosen.spp:
        b.conv(512, activation=chosen.neck_activation)
        spp(b, newest_first=False)
        b.conv(2048, activation=chosen.neck_activation)
    alternate(b, 512, 3, chosen.neck_activation, chosen.sam and not chosen.pan)
    pan_with_heads(
        b,
        stride8,
        stride16,
        chosen,
        num_classes,
        choose_anchors(anchors, YOLOV4_ANCHORS),
        newest_first=False,
        **DIOU_NMS,
    )
    return b.build(width, height, YOLOV4_TRAINING)
