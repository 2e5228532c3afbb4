"""The plugin YoloV4Detect: decode and DIoU-NMS as the last layer of a TensorRT plan.

csrc/tensorrt holds it, an IPluginV3 in a library of its own that needs TensorRT and no torch. In
ONNX it is one node, which TensorRT's parser looks up among the registered plugins by its type and
version; other runtimes cannot run a graph that holds it. A plan that was built with it needs the
library wherever it runs, unless it carries it (a version-compatible plan does). A program loads it
through TensorRT's registry (`load_library`, `trtexec --dynamicPlugins`); in one that only opens
libraries (Triton Inference Server's `plugins`, LD_PRELOAD) it registers itself where the variable
YOLOV4_FAST_REGISTER_PLUGIN is 1.

Inputs: the raw maps [N, A * (5 + classes), h, w] in head order. Outputs, K = max_detections:

    num_detections     [N, 1] int32
    detection_boxes    [N, K, 4] float32 xyxy relative to the network's input, not clipped
    detection_scores   [N, K] float32, descending
    detection_classes  [N, K] int32

What is over num_detections is 0, and -1 in detection_classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.network.layers import Network
from yolov4_fast.ops.diou_nms import MAX_CANDIDATES

if TYPE_CHECKING:
    import onnx

TYPE = "YoloV4Detect"
VERSION = "1"
DOMAIN = "yolov4_fast"  # of the ONNX node; TensorRT's parser looks at the type alone
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
PLAIN_IOU = -1.0  # the attribute `beta` for no penalty
PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class DetectionOutputs:
    """What the plugin reports. Raises EngineError for values out of range."""

    confidence: float = 0.25  # least score, in 0..1
    iou: float = 0.45  # overlap at which the lesser of two boxes of a class is dropped, in 0..1
    beta: float | None = None  # exponent of DIoU-NMS; None: plain IoU
    max_detections: int = 300  # K, the most of an image

    def __post_init__(self) -> None:
        for name in ("confidence", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise EngineError(f"{name} {getattr(self, name)}: it must lie in 0..1")
        if self.beta is not None and not (math.isfinite(self.beta) and self.beta >= 0):
            raise EngineError(f"beta {self.beta}: it must be at least 0, or None for plain IoU")
        if not 1 <= self.max_detections <= MAX_CANDIDATES:
            raise EngineError(
                f"max_detections {self.max_detections}: a plan reports 1 to {MAX_CANDIDATES}"
            )


def detect_node(
    network: Network, outputs: DetectionOutputs, map_names: Sequence[str]
) -> onnx.NodeProto:
    """The ONNX node that turns the raw maps of these names, in head order, into OUTPUTS.

    The model must import the opset (DOMAIN, 1). Raises EngineError.
    """
    from onnx import helper

    heads = network.heads
    if not heads or len(map_names) != len(heads):
        raise EngineError(f"{len(map_names)} maps for a network of {len(heads)} detection heads")
    return helper.make_node(
        TYPE,
        list(map_names),
        list(OUTPUTS),
        name="detect",
        domain=DOMAIN,
        anchors=[float(side) for head in heads for size in head.anchors for side in size],
        anchor_counts=[len(head.anchors) for head in heads],
        scale_x_y=[float(head.scale_x_y) for head in heads],
        new_coords=[int(head.new_coords) for head in heads],
        strides=[head.stride for head in heads],
        num_classes=network.num_classes,
        confidence=float(outputs.confidence),
        iou=float(outputs.iou),
        beta=PLAIN_IOU if outputs.beta is None else float(outputs.beta),
        max_detections=outputs.max_detections,
    )


def plugin_library(major: int, folder: Path = PACKAGE) -> Path:
    """Where the library of the plugin lies for TensorRT of this major version.

    setup.py builds it beside yolov4_fast/_C where it finds NvInfer.h; its name tells the version
    that it was built with. Raises EngineError, naming how to build it, where there is none.
    """
    path = folder / f"libyolov4_fast_tensorrt{major}.so"
    if path.is_file():
        return path
    others = sorted(other.name for other in folder.glob("libyolov4_fast_tensorrt*.so"))
    there = f"there is {', '.join(others)}" if others else "there is none of another version either"
    raise EngineError(
        f"the plugin {TYPE} was not built for TensorRT {major}: {path} is missing ({there}); with "
        f"nvcc and the headers of TensorRT {major} on the machine build it with: "
        "TENSORRT_ROOT=/path/to/TensorRT pip install --no-build-isolation -e ."
    )
