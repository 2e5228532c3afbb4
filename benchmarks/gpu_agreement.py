"""Detections and AP of the sample model in every precision of an engine against float32.

    python -m benchmarks.gpu_agreement [--engine cuda] [--scenes 100] [--output FILE]

The float32 torch engine on the CPU is the reference. Every box of it over 0.3 must be matched at an
IoU over 0.95 by a box of its class, with scores within 0.001 (f32), 0.01 (fp16) or 0.03 (bf16 and
FP8). FP8 is calibrated on scenes that are not among those compared. The exit status is 1 where a
precision does not hold.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.agreement import agreement
from benchmarks.harness import environment
from training.scene import scene
from training.shapes import write_dataset
from yolov4_fast import Detector, build_engine
from yolov4_fast.checkpoint import read_checkpoint
from yolov4_fast.datasets import open_dataset
from yolov4_fast.engines.build import engine_class
from yolov4_fast.engines.cuda.cudnn_graphs import available
from yolov4_fast.engines.engine import DeviceError, Engine, EngineError
from yolov4_fast.evaluation import evaluate
from yolov4_fast.files import replacing

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "shapes-nano.safetensors"
SCORE_DIFFERENCE = {"f32": 0.001, "fp16": 0.01, "bf16": 0.03, "fp8": 0.03}
SIDE = 416
CALIBRATION_SCENES = 64


def build(engine: str, precision: str) -> Engine:
    checkpoint = read_checkpoint(SAMPLE)
    options: dict[str, Any] = {}
    if precision == "fp8":
        options["calibration"] = [
            torch.from_numpy(scene(SIDE, SIDE, np.random.default_rng((9, number))).image)
            for number in range(CALIBRATION_SCENES)
        ]
    return build_engine(
        checkpoint.network,
        checkpoint.state,
        checkpoint.class_names,
        engine=engine,
        precision=precision,
        max_batch=16,
        confidence=0.2,  # so that a box near 0.3 is there in both, whatever the rounding
        **options,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--engine", default="cuda")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "scenes"
        write_dataset(data, {"val": arguments.scenes}, SIDE, SIDE, seed=5)
        dataset = open_dataset(data, "val")
        pictures = [dataset.image_path(index) for index in range(len(dataset))]
        with build("torch", "f32") as engine:
            reference = Detector(engine)
            expected = reference.detect(pictures)
            truth = evaluate(reference, dataset, progress=False)
        print(f"float32 torch: mAP50 {truth.mAP50:.4f} of {len(pictures)} scenes")
        for precision in engine_class(arguments.engine).precisions:
            try:
                engine = build(arguments.engine, precision)
            except EngineError as error:
                if not may_be_missing(precision, error):
                    raise
                print(f"{precision}: left out, {error}")
                continue
            with engine:
                detector = Detector(engine)
                result = agreement(expected, detector.detect(pictures))
                measured = evaluate(detector, dataset, progress=False)
            holds = result.within(SCORE_DIFFERENCE[precision])
            loss = truth.mAP50 - measured.mAP50
            rows.append(
                {"precision": precision, "holds": holds, "mAP50 loss": loss, **asdict(result)}
            )
            verdict = "holds" if holds else "DOES NOT HOLD"
            print(f"{arguments.engine} {precision}: {result}, mAP50 loss {loss:+.4f}: {verdict}")
    if arguments.output:
        record = {"benchmark": "agreement", "environment": environment(), "precisions": rows}
        with replacing(arguments.output) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    return int(not all(row["holds"] for row in rows))


def may_be_missing(precision: str, error: EngineError) -> bool:
    """Whether a precision is left out for what the machine lacks: the GPU is too old for bf16 or
    FP8, or cuDNN's fused kernels are not there, which only FP8 cannot do without.
    """
    too_old = isinstance(error, DeviceError) and precision in ("bf16", "fp8")
    return too_old or (precision == "fp8" and available() is not None)


if __name__ == "__main__":
    raise SystemExit(main())
