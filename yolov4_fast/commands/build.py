"""`yolov4-fast build`: a model -> an engine file."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from yolov4_fast.commands.arguments import (
    add_device,
    add_json,
    add_model,
    check_output,
    named_model,
    positive,
    write_json,
)
from yolov4_fast.commands.calibration_options import add_calibration
from yolov4_fast.commands.tensorrt_options import add_tensorrt, tensorrt_options


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "build",
        help="make an engine file of a model",
        description="Make an engine file of a model, ready for `yolov4-fast detect`.",
    )
    add_model(parser)
    parser.add_argument(
        "--engine",
        help="what runs the network: cuda or tensorrt on NVIDIA GPUs, openvino on CPUs, or torch, "
        "the reference (default: cuda where there is a GPU, else openvino where it is installed)",
    )
    parser.add_argument(
        "--precision",
        help="fp16, bf16, fp32 (also called f32), or int8 and fp8, which need --calibrate; which "
        "of them there are depends on the engine (default: fp16 on GPUs; bf16 with openvino on a "
        "CPU that has it; else f32)",
    )
    add_calibration(parser)
    add_device(parser)
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
    add_tensorrt(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from yolov4_fast.commands.calibration import measure_loss, open_calibration
    from yolov4_fast.engines.build import build_engine, default_engine, engine_class
    from yolov4_fast.evaluation import match_classes

    for path in (arguments.output, arguments.json):
        check_output(path, arguments.model, arguments.weights, arguments.names, arguments.calibrate)
    kind = arguments.engine or default_engine()
    engine_class(kind).check_device(arguments.device)  # raises before weights are fetched
    tensorrt = tensorrt_options(arguments, kind)
    calibration = open_calibration(arguments.calibrate) if arguments.calibrate else None
    started = time.perf_counter()
    model = named_model(arguments)
    if calibration and calibration.dataset:
        match_classes(model.class_names, calibration.dataset.class_names)  # before it takes long
    engine = build_engine(
        model.network,
        model.state,
        model.class_names,
        engine=kind,
        precision=arguments.precision,
        max_batch=arguments.max_batch,
        resize=arguments.resize,
        device=arguments.device,
        calibration=calibration.images() if calibration else None,
        calibration_method=arguments.calibration_method,
        tensorrt=tensorrt,
        progress=sys.stderr.isatty(),
        path=arguments.output,
    )
    seconds = time.perf_counter() - started
    megabytes = arguments.output.stat().st_size / 1e6
    print(
        f"{arguments.output}: {engine.kind} engine, {engine.precision}, input "
        f"{engine.width}x{engine.height} ({engine.resize}), {len(engine.class_names)} classes, "
        f"up to {engine.max_batch} images a run, {megabytes:.1f} MB, built in {seconds:.1f} s"
    )
    facts = {
        "engine": str(arguments.output),
        "kind": engine.kind,
        "precision": engine.precision,
        "width": engine.width,
        "height": engine.height,
        "resize": engine.resize,
        "classes": list(engine.class_names),
        "max_batch": engine.max_batch,
        "seconds": seconds,
    }
    if calibration and calibration.dataset:
        loss = measure_loss(engine, model, calibration.dataset, progress=sys.stderr.isatty())
        print(
            f"AP50 on {loss['images']} images of {calibration.source}: {loss['f32']:.4f} in f32, "
            f"{loss[engine.precision]:.4f} in {engine.precision}, a loss of {loss['loss']:.4f}"
        )
        facts["AP50"] = loss
    write_json(arguments.json, facts)
    return 0
