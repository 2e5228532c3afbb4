"""`yolov4-fast build`: a model -> an engine file."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from yolov4_fast.commands.arguments import (
    add_json,
    add_model,
    check_output,
    named_model,
    positive,
    write_json,
)


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "build",
        help="make an engine file of a model",
        description="Make an engine file of a model, ready for `yolov4-fast detect`.",
    )
    add_model(parser)
    parser.add_argument(
        "--engine",
        help="what runs the network: openvino, or torch, the reference (default: openvino where "
        "it is installed)",
    )
    parser.add_argument(
        "--precision",
        help="f32, or bf16, faster on CPUs that have it (default: bf16 with openvino on such a "
        "CPU, else f32)",
    )
    parser.add_argument(
        "--max-batch", type=positive, default=8, metavar="N",
        help="most images the engine takes at once; more are run in turn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--resize", choices=("stretch", "letterbox"),
        help="how pictures are fitted to the input unless `detect` is told otherwise: stretched, "
        "or with their proportions kept (default: letterbox if the cfg says letter_box=1, else "
        "stretch)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help="the engine file to write, such as my.engine",
    )  # fmt: skip
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.engines.build import build_engine, default_engine, engine_class

    for path in (arguments.output, arguments.json):
        check_output(path, arguments.model, arguments.weights, arguments.names)
    engine_class(arguments.engine or default_engine())  # raises before weights are fetched
    started = time.perf_counter()
    model = named_model(arguments)
    engine = build_engine(
        model.network,
        model.state,
        model.class_names,
        engine=arguments.engine,
        precision=arguments.precision,
        max_batch=arguments.max_batch,
        resize=arguments.resize,
        path=arguments.output,
    )
    seconds = time.perf_counter() - started
    megabytes = arguments.output.stat().st_size / 1e6
    print(
        f"{arguments.output}: {engine.kind} engine, {engine.precision}, input "
        f"{engine.width}x{engine.height} ({engine.resize}), {len(engine.class_names)} classes, "
        f"up to {engine.max_batch} images a run, {megabytes:.1f} MB, built in {seconds:.1f} s"
    )
    write_json(
        arguments.json,
        {
            "engine": str(arguments.output),
            "kind": engine.kind,
            "precision": engine.precision,
            "width": engine.width,
            "height": engine.height,
            "resize": engine.resize,
            "classes": list(engine.class_names),
            "max_batch": engine.max_batch,
            "seconds": seconds,
        },
    )
    return 0
