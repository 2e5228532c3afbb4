"""`export --triton-repository`: a model and its detector for Triton Inference Server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands.arguments import check_folder

if TYPE_CHECKING:
    from yolov4_fast.engines.tensorrt.plugins import DetectionOutputs
    from yolov4_fast.model import Model


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Triton Inference Server")
    group.add_argument(
        "--triton-repository", type=Path, metavar="DIR",
        help="instead of -o: write two models into this model repository: the network, as "
        "--format onnx (the default here) or tensorrt, and the detector that takes pictures and "
        "gives boxes",
    )  # fmt: skip
    group.add_argument(
        "--model-name", metavar="NAME",
        help="of the detector in the repository; the network is NAME_network (default: the name of "
        "MODEL)",
    )  # fmt: skip
    group.add_argument(
        "--backend", choices=("onnxruntime", "openvino"),
        help="what the server runs the ONNX with (default: onnxruntime)",
    )  # fmt: skip
    group.add_argument(
        "--resize", choices=("stretch", "letterbox"),
        help="how the detector fits a picture to the input (default: as the model was trained)",
    )  # fmt: skip


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    if arguments.triton_repository is None:
        for flag in ("model_name", "backend", "resize"):
            if getattr(arguments, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} goes with --triton-repository")
        return
    if arguments.output is not None:
        raise ValueError("-o and --triton-repository: give one of the two")
    if arguments.format not in ("onnx", "tensorrt"):
        raise ValueError("--triton-repository goes with --format onnx or tensorrt")
    if arguments.backend is not None and arguments.format != "onnx":
        raise ValueError("--backend goes with --format onnx: a plan has TensorRT's")
    if arguments.uint8 or arguments.dynamic_size or arguments.with_decode:
        raise ValueError(
            "--uint8, --dynamic-size and --with-decode do not go with --triton-repository: its "
            "detector sends the network float32 images of one size, and takes raw maps or what "
            "--with-nms leaves"
        )
    if (arguments.min_batch or 1) > 1:
        raise ValueError("--min-batch: the server runs single images too, so it must be 1")
    check_folder(arguments.triton_repository)


def export_repository(
    model: Model,
    arguments: argparse.Namespace,
    detect: DetectionOutputs | None,
    write_network: Callable[[Path], object],
) -> dict[str, Any]:
    """Write the repository; returns facts for programs.

    detect: what the network's plan ends with, None for raw maps. write_network: writes the network
    of the model at a path.
    """
    from yolov4_fast.engines.engine import Manifest
    from yolov4_fast.engines.triton_repository import Served, write_repository

    network = model.network
    served = Served(
        name=arguments.model_name or Path(arguments.model).stem,
        backend=(arguments.backend or "onnxruntime") if arguments.format == "onnx" else "tensorrt",
        manifest=Manifest(
            kind=arguments.format,
            network=network,
            class_names=model.class_names,
            resize=arguments.resize or ("letterbox" if network.letter_box else "stretch"),
            precision=arguments.precision,
            max_batch=arguments.max_batch,
            confidence=arguments.confidence,
            iou=arguments.iou,
        ),
        max_detections=arguments.max_detections,
        detect=detect,
    )
    folders = write_repository(arguments.triton_repository, served, write_network)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {
        "files": [str(path) for path in files],
        "model": served.name,
        "network": served.network_name,
        "backend": served.backend,
    }
