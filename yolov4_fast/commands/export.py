"""`yolov4-fast export`: a model -> ONNX, Darknet cfg, weights and names, or a small checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from yolov4_fast.commands.arguments import (
    add_json,
    add_model,
    check_output,
    named_model,
    write_json,
)
from yolov4_fast.files import replacing

SUFFIXES = {"onnx": ".onnx", "darknet": ".cfg", "safetensors": ".safetensors"}


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a model as ONNX, Darknet files or a small checkpoint",
        description="Write a model as ONNX (raw maps, dynamic batch), as Darknet cfg, weights and "
        "names, or as a checkpoint of float16 weights without the trainer's state.",
    )
    add_model(parser)
    parser.add_argument(
        "--format", choices=tuple(SUFFIXES), required=True,
        help="onnx: images [N, 3, H, W] in 0..1 to the raw maps of the heads; darknet: .cfg, "
        ".weights and .names; safetensors: a checkpoint of half the size",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help="the .onnx, .safetensors or .cfg to write; .weights and .names go beside the .cfg",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from yolov4_fast.checkpoint import write_checkpoint
    from yolov4_fast.darknet.cfg import write_cfg
    from yolov4_fast.darknet.weights import write_weights
    from yolov4_fast.engines.onnx_export import export_onnx

    output: Path = arguments.output
    wanted = SUFFIXES[arguments.format]
    if output.suffix != wanted:
        raise ValueError(f"{output}: the output of --format {arguments.format} ends in {wanted}")
    written = [output]
    if arguments.format == "darknet":
        written += [output.with_suffix(".weights"), output.with_suffix(".names")]
    for path in (*written, arguments.json):
        check_output(path, arguments.model, arguments.weights, arguments.names)
    model = named_model(arguments)
    if arguments.format == "onnx":
        export_onnx(model.network, model.state, output)
    elif arguments.format == "safetensors":
        write_checkpoint(output, model.network, model.state, model.class_names, dtype=torch.float16)
    else:
        write_weights(written[1], model.network, model.state)  # refuses what it cannot hold
        _write_text(written[0], write_cfg(model.network))
        _write_text(written[2], "\n".join(model.class_names) + "\n")
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
        },
    )
    return 0


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
