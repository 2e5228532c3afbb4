"""`yolov4-fast export`: a model -> ONNX, a TensorRT plan, Darknet cfg, weights and names, a small
checkpoint, or a model repository of Triton Inference Server.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands import export_plan, export_repository
from yolov4_fast.commands.arguments import (
    add_json,
    add_model,
    check_output,
    named_model,
    positive,
    share,
    write_json,
)
from yolov4_fast.files import replacing

if TYPE_CHECKING:
    from yolov4_fast.engines.tensorrt.plugins import DetectionOutputs
    from yolov4_fast.model import Model
    from yolov4_fast.network.layers import Network

PRECISIONS = {"onnx": "f32", export_plan.FORMAT: "fp16"}  # of the formats that are a network
SUFFIXES = {
    "onnx": ".onnx",
    export_plan.FORMAT: export_plan.SUFFIX,
    "darknet": ".cfg",
    "safetensors": ".safetensors",
}
NETWORKS = f"--format {' or '.join(PRECISIONS)}"
DEFAULTS = {"confidence": 0.25, "iou": 0.45, "max_detections": 300, "max_batch": 8}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a model as ONNX, plan, Darknet files or a small checkpoint, or for a server",
        description="Write a model as ONNX, as a TensorRT plan, as Darknet cfg, weights and names, "
        "or as a checkpoint of float16 weights without the trainer's state; or as a model "
        "repository for Triton Inference Server.",
    )
    add_model(parser)
    parser.add_argument(
        "--format", choices=tuple(SUFFIXES),
        help="onnx: images [N, 3, H, W] in 0..1 to the raw maps of the heads; tensorrt: a plan of "
        "that, built on this machine's GPU; darknet: .cfg, .weights and .names; safetensors: a "
        "checkpoint of half the size",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="the .onnx, .plan, .safetensors or .cfg to write; .weights and .names go beside the "
        ".cfg",
    )  # fmt: skip
    _add_network(parser)
    export_plan.add_flags(parser)
    export_repository.add_flags(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network", f"for {NETWORKS}")
    group.add_argument(
        "--precision", choices=("f32", "fp16", "bf16"),
        help="type of the weights and of all between input and maps (default: f32 for onnx, fp16 "
        "for tensorrt)",
    )  # fmt: skip
    group.add_argument(
        "--dynamic-size", action="store_true",
        help="leave height and width open, in multiples of the largest stride",
    )  # fmt: skip
    group.add_argument(
        "--uint8", action="store_true",
        help="take images [N, H, W, 3] uint8 and divide them by 255 inside",
    )  # fmt: skip
    group.add_argument(
        "--with-nms", action="store_true",
        help="end with decode and NMS, the plugin YoloV4Detect, which TensorRT alone runs: "
        "num_detections, detection_boxes, detection_scores, detection_classes",
    )  # fmt: skip
    group.add_argument(
        "--confidence", type=share, metavar="F",
        help="least score that is reported (default: 0.25)",
    )  # fmt: skip
    group.add_argument(
        "--iou", type=share, metavar="F", help="overlap over which NMS drops (default: 0.45)"
    )
    group.add_argument(
        "--max-detections", type=positive, metavar="N",
        help="the most that NMS reports of an image (default: 300)",
    )  # fmt: skip
    group.add_argument(
        "--max-batch", type=positive, metavar="N",
        help="the most images that run at once (default: 8)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if arguments.triton_repository is not None and arguments.format is None:
        arguments.format = "onnx"
    _check_flags(arguments)
    for flag, value in DEFAULTS.items() | {("precision", PRECISIONS.get(arguments.format))}:
        if getattr(arguments, flag) is None:
            setattr(arguments, flag, value)
    check_output(arguments.json, arguments.model, arguments.weights, arguments.names)
    written = [] if arguments.output is None else _outputs(arguments)
    model = named_model(arguments)
    if arguments.triton_repository is not None:
        facts = export_repository.export_repository(
            model,
            arguments,
            _detections(arguments, model.network),
            lambda path: _export_network(model, path, arguments),
        )
        written = [Path(path) for path in facts["files"]]
    else:
        facts = _export_file(model, written, arguments)
    for path in written:
        print(f"{path}: {path.stat().st_size:,} bytes")
    write_json(
        arguments.json,
        {
            "format": arguments.format,
            "files": [str(path) for path in written],
            "width": model.network.width,
            "height": model.network.height,
            "classes": list(model.class_names),
        }
        | facts,
    )
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    if arguments.format is None:
        raise ValueError(f"--format is needed, one of {', '.join(SUFFIXES)}")
    if arguments.output is None and arguments.triton_repository is None:
        raise ValueError("-o is needed, or --triton-repository")
    network, serves = arguments.format in PRECISIONS, arguments.triton_repository is not None
    nms = "--with-nms or --triton-repository"
    needs = {
        **dict.fromkeys(("precision", "dynamic_size", "uint8", "with_nms"), (network, NETWORKS)),
        "confidence": (arguments.with_decode or arguments.with_nms or serves, nms),
        **dict.fromkeys(("iou", "max_detections"), (arguments.with_nms or serves, nms)),
        "max_batch": (
            arguments.format == export_plan.FORMAT or serves,
            f"--format {export_plan.FORMAT} or --triton-repository",
        ),
    }
    for flag, (fits, partner) in needs.items():
        if export_plan.is_given(arguments, flag) and not fits:
            raise ValueError(f"--{flag.replace('_', '-')} goes with {partner}")
    export_plan.check_flags(arguments)
    export_repository.check_flags(arguments)


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    """The files that will be written. Raises ValueError where one could not be."""
    output: Path = arguments.output
    wanted = SUFFIXES[arguments.format]
    if output.suffix != wanted:
        raise ValueError(f"{output}: the output of --format {arguments.format} ends in {wanted}")
    outputs = [output]
    if arguments.format == "darknet":
        outputs += [output.with_suffix(".weights"), output.with_suffix(".names")]
    for path in outputs:
        check_output(path, arguments.model, arguments.weights, arguments.names)
    return outputs


def _export_file(
    model: Model, written: list[Path], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Write the files of a format; returns facts for programs beyond the common ones."""
    import torch

    from yolov4_fast.checkpoint import write_checkpoint
    from yolov4_fast.darknet.cfg import write_cfg
    from yolov4_fast.darknet.weights import write_weights

    output = written[0]
    match arguments.format:
        case "safetensors":
            write_checkpoint(
                output, model.network, model.state, model.class_names, dtype=torch.float16
            )
        case "darknet":
            write_weights(written[1], model.network, model.state)  # refuses what it cannot hold
            _write_text(written[0], write_cfg(model.network))
            _write_text(written[2], "\n".join(model.class_names) + "\n")
        case _:
            return _export_network(model, output, arguments)
    return {}


def _export_network(model: Model, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from yolov4_fast.engines.onnx_export import export_onnx

    detect = _detections(arguments, model.network)
    if arguments.format == export_plan.FORMAT:
        return export_plan.write_plan(model, path, arguments, detect)
    onnx = export_onnx(
        model.network,
        model.state,
        path,
        precision=arguments.precision,
        dynamic_size=arguments.dynamic_size,
        uint8_input=arguments.uint8,
        detect=detect,
    )
    return {
        "precision": arguments.precision,
        "opset": onnx.opset_import[0].version,
        "inputs": [value.name for value in onnx.graph.input],
        "outputs": [value.name for value in onnx.graph.output],
    }


def _detections(arguments: argparse.Namespace, network: Network) -> DetectionOutputs | None:
    """What --with-nms asks for."""
    from yolov4_fast.engines.tensorrt.plugins import DetectionOutputs

    if not arguments.with_nms:
        return None
    return DetectionOutputs(
        confidence=arguments.confidence,
        iou=arguments.iou,
        beta=network.nms_beta,
        max_detections=arguments.max_detections,
    )


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
