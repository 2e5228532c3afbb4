"""How good the averaged weights are: the detector that users run, on the validation split.

It runs in float32 as the torch engine on the device that trains, whose decoding and NMS are the
same ops that the cuda engine captures (their GPU kernels on a GPU). The cuda engine itself would
measure its kernels and build its plan anew for each set of weights, which costs more than a
validation does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.config import ValidationConfig
from yolov4_fast.datasets import Dataset
from yolov4_fast.detector import Detector
from yolov4_fast.engines.build import build_engine
from yolov4_fast.evaluation import Evaluation, evaluate
from yolov4_fast.network.layers import Network

BATCH = 16
PAPER_BETA = 1.0  # exponent of DIoU-NMS in its paper


def make_detector(
    network: Network,
    state: Mapping[str, Tensor],
    class_names: tuple[str, ...],
    config: ValidationConfig,
    device: torch.device,
) -> Detector:
    """The detector of these weights, with the configuration's thresholds and kind of NMS."""
    engine = build_engine(
        network,
        {name: value.cpu() for name, value in state.items()},
        class_names,
        engine="torch",
        precision="f32",
        max_batch=BATCH,
        device=str(device),
    )
    if config.nms == "network":
        return Detector(engine, confidence=config.confidence, iou=config.nms_iou)
    beta = PAPER_BETA if config.nms == "diou" else None
    return Detector(engine, confidence=config.confidence, iou=config.nms_iou, beta=beta)


def validate(detector: Detector, dataset: Dataset) -> Evaluation:
    """VOC AP at IoU 0.5, area under the curve."""
    return evaluate(detector, dataset, metric="voc", confidence=detector.confidence, progress=False)
