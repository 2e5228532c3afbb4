"""Where a training step spends its time, and whether the loader keeps up, in one run.

    python -m benchmarks.training --model yolov4-nano --size 416 --batch 16 --precision bf16

Steps are the trainer's own, with all that the flags switch on (all flags of `python -m
training.train` go through); parts are told apart as in `step_parts`. The loader is timed alone,
with nothing else running, by the number of its worker processes. Without --data, scenes are drawn.
The bars: the loader alone delivers 3 x the images that the network consumes, and assignment and
loss take under a tenth of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Timing, environment, report
from benchmarks.step_parts import PARTS, observed, unobserved
from benchmarks.training_figure import draw
from training.config import TrainConfig
from training.distributed import Processes
from training.loader import Batch, TrainingSet, batches
from training.model import make_network
from training.options import configuration
from training.options import parser as train_parser
from training.shapes import write_dataset
from training.trainer import Trainer
from yolov4_fast.datasets import Dataset, open_dataset
from yolov4_fast.files import replacing

DRAWN = (640, 480)  # px, width and height of drawn scenes: those of BCCD, and usual for VOC
WARM_UP = 3  # steps; the first allocate, and choose convolutions
KEPT = 4  # different batches that steps go round
LOADER_BAR, LOSS_BAR = 3.0, 0.1


def time_loader(examples: TrainingSet, batch: int, workers: int, seconds: float) -> list[float]:
    """Seconds for each image, once for each epoch, the start of the workers included."""
    rates: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < deadline:
        start, images = time.perf_counter(), 0
        for given in batches(examples, batch, len(rates), workers=workers):
            images += len(given.images)
        rates.append((time.perf_counter() - start) / images)
    return rates[1:]  # the first meets cold caches


def time_steps(
    trainer: Trainer, kept: Sequence[Batch], steps: int
) -> tuple[dict[str, Timing], Timing]:
    """-> each part of a step, and a step that nobody looks into; the two in turn."""
    turns = cycle(kept)
    unobserved(trainer, islice(turns, WARM_UP))
    parts: list[dict[str, float]] = []
    whole: list[float] = []
    for _ in range(steps):
        whole += unobserved(trainer, islice(turns, 1))
        parts += observed(trainer, islice(turns, 1))
    return {name: Timing.of([step[name] for step in parts]) for name in PARTS}, Timing.of(whole)


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far; where the system cannot, it counts from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: on a GPU by torch, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def results_of(
    parts: dict[str, Timing],
    step: Timing,
    loaders: dict[int, Timing],
    config: TrainConfig,
    peak: int,
) -> dict[str, Any]:
    """Ratios and shares, the bars among them."""
    total = sum(timing.median for timing in parts.values())
    consumed = config.batch_size / step.median
    delivered = {str(workers): 1 / timing.median for workers, timing in loaders.items()}
    return {
        "share of the step": {name: timing.median / total for name, timing in parts.items()},
        "images/s consumed": consumed,
        "images/s of the loader alone, by workers": delivered,
        "loader / network": max(delivered.values()) / consumed,
        "bar: loader / network": LOADER_BAR,
        "assignment and loss / step": parts["loss"].median / total,
        "bar: assignment and loss / step": LOSS_BAR,
        "peak memory, MB": peak / 1e6,
    }


def flat(results: dict[str, Any]) -> dict[str, Any]:
    """Nested results by names that tell both levels."""
    lines: dict[str, Any] = {}
    for name, value in results.items():
        nested = value if isinstance(value, dict) else {"": value}
        lines |= {f"{name}: {key}" if key else name: item for key, item in nested.items()}
    return lines


def profile(
    arguments: argparse.Namespace, given: argparse.Namespace, config: TrainConfig, dataset: Dataset
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Measure. -> timings by name, and what follows from them."""
    network = make_network(config, len(dataset.class_names))
    examples = TrainingSet(
        dataset,
        config.height,
        config.width,
        config.augment,
        seed=config.seed,
        resize="letterbox" if network.letter_box else "stretch",
    )
    loaders = {
        workers: Timing.of(time_loader(examples, config.batch_size, workers, arguments.seconds))
        for workers in arguments.loader_workers
    }
    kept = list(islice(batches(examples, config.batch_size, 0), KEPT))
    trainer = Trainer(config, network, len(kept), Processes(given.device))
    reset_peak(given.device)
    parts, step = time_steps(trainer, kept, arguments.repeats)
    results = results_of(parts, step, loaders, config, peak_bytes(given.device))
    timings = {"step": step} | {f"step: {name}": timing for name, timing in parts.items()}
    timings |= {
        f"loader, {workers} worker{'s' * (workers != 1)}, an image": timing
        for workers, timing in loaders.items()
    }
    return timings, results


def drawn_dataset(folder: Path, batch: int) -> Dataset:
    """Scenes enough for an epoch of several batches."""
    width, height = DRAWN
    write_dataset(folder / "data", {"train": max(96, 8 * batch)}, height, width, seed=0)
    return open_dataset(folder / "data", "train")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--data", help="what to load (default: drawn scenes)")
    p.add_argument("--split", default="train", help="of the data (train)")
    p.add_argument("--repeats", type=int, default=20, help="steps that are timed (20)")
    p.add_argument("--seconds", type=float, default=10.0, help="for each loader (10)")
    p.add_argument(
        "--loader-workers", type=_numbers, default=(0, 1, 2), metavar="A,B",
        help="worker processes of the loader that is timed alone (0,1,2)",
    )  # fmt: skip
    p.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    p.add_argument("--figure", type=Path, metavar="FILE", help="draw them as PNG")
    return p


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, flags = parser().parse_known_args(words)
    given = train_parser().parse_args(flags)
    config, _ = configuration(given)
    with ExitStack() as stack:
        if arguments.data:
            dataset = open_dataset(arguments.data, arguments.split)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            dataset = drawn_dataset(Path(folder), config.batch_size)
        timings, results = profile(arguments, given, config, dataset)
    title = (
        f"training {Path(config.model).name} {config.width}x{config.height}, "
        f"batch {config.batch_size}, {config.precision}, "
        f"{Path(arguments.data).name if arguments.data else 'drawn scenes'}"
    )
    report(title, timings, flat(results))
    record = {
        "benchmark": title,
        "command": shlex.join(["python", "-m", "benchmarks.training", *words]),
        "environment": environment(),
        "config": config.to_json(),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "results": results,
    }
    if arguments.output:
        with replacing(arguments.output) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.figure:
        draw(arguments.figure, record)


if __name__ == "__main__":
    main()
