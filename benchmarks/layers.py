"""Every step of a plan on the GPU: is it right, how long does it take, how far from its floor.

    python -m benchmarks.layers [--model yolov4] [--size 416] [--batch 1 32] [--precision fp16]

The network runs on a picture step by step. What each step's kernel wrote is held against the step's
definition in float32 on the very inputs it read, so that no error is passed on. Times are of the
step alone, ten launches in one graph, its inputs warm; the floor is that of `roofline`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fps_gpu import DEVICE, DTYPES
from benchmarks.harness import environment
from benchmarks.roofline import cost, measure_rates
from yolov4_fast import build_engine
from yolov4_fast.commands.arguments import size
from yolov4_fast.commands.benchmark import drawn_image
from yolov4_fast.engines.cuda.engine import CudaEngine
from yolov4_fast.engines.cuda.plan import Step, View
from yolov4_fast.engines.cuda.reference import reference_kernel
from yolov4_fast.files import replacing
from yolov4_fast.model import open_model
from yolov4_fast.ops import resize

# Of the step's largest value: one rounding of the result, and sums in another order.
LIMITS = {"fp16": 2e-3, "bf16": 1.6e-2, "f32": 1e-5}


def check(engine: CudaEngine, batch: int) -> list[dict[str, Any]]:
    """Run the steps one by one; each one's largest error as a share of its largest value."""
    executor, weights = engine.executor(batch), engine.weights
    picture = torch.from_numpy(drawn_image(480, 640))
    image = resize([picture], engine.height, engine.width, "stretch")
    executor.image.copy_(image.permute(0, 2, 3, 1))
    rows = []
    for number, (step, name, kernel) in enumerate(executor.steps):
        exact = {view: executor.tensor(view).float() for view in step.reads}
        exact |= {
            view: torch.empty_like(executor.tensor(view), dtype=torch.float32)
            for view in step.writes
        }
        reference_kernel(step, exact.__getitem__, weights)()
        for view in step.writes:
            executor.tensor(view).fill_(torch.nan)
        kernel()
        error = max(relative(executor.tensor(view), exact[view]) for view in step.writes)
        rows.append(
            {"step": number, "what": describe(engine, step), "kernel": name, "error": error}
        )
    return rows


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN counts as infinite."""
    error = float((found.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    return error if error == error else float("inf")


def describe(engine: CudaEngine, step: Step) -> str:
    def shape(view: View) -> str:
        buffer = engine.plan.buffers[view.buffer]
        return f"{buffer.height}x{buffer.width}x{view.channels}"

    kind = type(step).__name__.lower()
    return f"{kind} {shape(step.reads[0])} -> {shape(step.writes[0])}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="yolov4", help="an architecture's name")
    parser.add_argument("--size", type=size, default=(416, 416), metavar="N|WxH")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--precision", choices=tuple(LIMITS), default="fp16")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)

    model = open_model(arguments.model, size=arguments.size, random=True)
    engine = build_engine(
        model.network,
        model.state,
        model.class_names,
        engine="cuda",
        precision=arguments.precision,
        max_batch=max(arguments.batch),
    )
    assert isinstance(engine, CudaEngine)
    rates = measure_rates(DEVICE, DTYPES.get(arguments.precision, torch.float32))
    limit = LIMITS[arguments.precision]
    record: dict[str, Any] = {
        "benchmark": f"layers of {arguments.model} {arguments.size}, {arguments.precision}",
        "environment": environment(),
        "rates": asdict(rates),
        "batches": {},
    }
    wrong = 0
    for batch in arguments.batch:
        with engine.exclusive(), torch.inference_mode():
            rows = check(engine, batch)
            itemsize = 4 if arguments.precision == "f32" else 2
            for row, (step, _, kernel) in zip(rows, engine.executor(batch).steps, strict=True):
                row["seconds"] = engine.seconds(kernel)
                row["floor"] = cost(engine.plan, step, batch, itemsize).floor(rates)
        wrong += sum(row["error"] > limit for row in rows)
        record["batches"][batch] = rows
        total, floor = (sum(row[key] for row in rows) for key in ("seconds", "floor"))
        print(f"batch {batch}: {1e3 * total:.3f} ms in {len(rows)} steps, floor {1e3 * floor:.3f}")
        for row in sorted(rows, key=lambda row: row["floor"] - row["seconds"])[:15]:
            print(
                f"  {row['step']:4} {row['what']:44} {1e6 * row['seconds']:8.1f} us, floor "
                f"{1e6 * row['floor']:7.1f}, error {row['error']:.1e}, {row['kernel']}"
            )
        for row in rows:
            if row["error"] > limit:
                print(f"  WRONG: {row}")
    if arguments.output:
        with replacing(arguments.output) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
