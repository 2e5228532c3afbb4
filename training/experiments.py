"""The seed's experiments: one training for each row of its tables, measured at three sizes.

    python -m training.experiments --data DIR --output runs/experiments --model yolov4-nano

Rows differ in the box loss, the schedule and the mosaic; all else is the same and as the flags of
`python -m training.train` say, which go through (`--epochs 50 --batch 32 --preset seed ...`). Each
row is a process of its own. A row that is done is kept, one that was broken off goes on, so after
Ctrl-C or a crash the same command is given again. Writes `tables.md`, `results.json` and
`tables.png` into OUTPUT after every row.

Measured is mAP50 (area under the curve, IoU 0.5) of the averaged weights after the last epoch: the
seed does not say which it took, and the best epoch would be chosen by the very pictures that are
measured (`--checkpoint best` does so all the same). Confidence and the overlap of NMS are those of
the validation (`--confidence`, `--nms-iou`).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.config import TrainConfig
from training.experiment_rows import OF_ROWS, RECORD, ROWS, TITLES, Run, make_run
from training.experiment_tables import (
    DIOU_NMS,
    NMS,
    SETTINGS,
    Settings,
    read_settings,
    write_results,
)
from training.interrupts import Interrupts
from training.model import make_network
from training.run import BEST, LAST
from training.subprocesses import INTERRUPTED, Trainings
from training.train import open_data
from training.validation import make_detector, validate
from yolov4_fast.checkpoint import read_checkpoint
from yolov4_fast.commands.arguments import positive, write_json
from yolov4_fast.datasets import Dataset, DatasetWarning

CHECKPOINTS = {"last": LAST, "best": BEST}
STRIDE = 32

OWN = ("--resume", "--print-config")  # of training.train: rows are resumed anyway


@dataclass(frozen=True)
class Protocol:
    """How rows are measured."""

    sizes: tuple[tuple[int, int], ...]  # (width, height) px
    checkpoint: str


def sizes_in_proportion(widths: Sequence[int], width: int, height: int) -> list[tuple[int, int]]:
    """(width, height) for each width, in the proportions of an input, to whole strides."""
    return [(w, max(1, round(w * height / width / STRIDE)) * STRIDE) for w in widths]


def settings_of(run: Run, protocol: Protocol) -> Settings:
    """What all rows of a folder have in common, by name: the same for every row and seed."""
    given = run.arguments
    return _common(run.config) | {
        "data": given.data,
        "split": given.split,
        "val_split": given.val_split,
        "val_data": given.val_data,
        "weights": given.weights and str(given.weights),
        "sizes": [list(size) for size in protocol.sizes],
        "checkpoint": protocol.checkpoint,
    }


def _common(config: TrainConfig) -> Settings:
    """A configuration by the names of its fields, without those that rows and seeds differ in."""
    flat: Settings = {}
    for name, value in config.to_json().items():
        flat |= value if isinstance(value, dict) else {name: value}
    own = {flag.removeprefix("--").replace("-", "_") for flag in (*OF_ROWS, "--seed")}
    return {name: value for name, value in flat.items() if name not in own}


def check_settings(output: Path, settings: Settings) -> None:
    """Raise ValueError where a folder was begun with other settings, naming the first.

    A folder of which no row has left anything, as none could begin, is not bound by its settings.
    """
    begun = any(next(output.glob(f"*/{name}"), None) for name in (RECORD, *CHECKPOINTS.values()))
    if not begun or not (output / SETTINGS).exists():
        return
    # One that was not there when the folder was begun had its default.
    before = _common(TrainConfig()) | read_settings(output)
    for name in before | settings:
        old, new = before.get(name), settings.get(name)
        if old != new:
            raise ValueError(
                f"{output}: was begun with other settings: {name} was {old!r} and is now {new!r}; "
                "give those settings, or another --output"
            )


def measure(
    run: Run, protocol: Protocol, validation: Dataset, stopped: Callable[[], bool]
) -> list[dict[str, Any]] | None:
    """mAP50 at every size with both kinds of NMS; None where it was stopped on the way."""
    checkpoint = read_checkpoint(run.folder / CHECKPOINTS[protocol.checkpoint])
    found = []
    for width, height in protocol.sizes:
        for nms in (NMS, DIOU_NMS):
            if stopped():
                return None
            detector = make_detector(
                checkpoint.network.resized(width, height),
                checkpoint.state,
                checkpoint.class_names,
                replace(run.config.validation, nms=nms),
                run.arguments.device,
            )
            result = validate(detector, validation).to_json()
            kept = {key: result[key] for key in ("mAP50", "images", "classes")}
            found.append({"width": width, "height": height, "nms": nms} | kept)
    return found


def complete(run: Run, protocol: Protocol, validation: Dataset, trainings: Trainings) -> bool:
    """Train and measure one row. -> whether it is done; False where it was stopped."""
    resume = ("--resume",) if (run.folder / LAST).exists() else ()
    status = trainings.run(run.label, run.folder, (*run.flags, *resume))
    if status == INTERRUPTED:
        return False
    if status:
        raise ValueError(f"its training ended with status {status}; see {run.folder}")
    print(f"{run.label}: measuring", flush=True)
    evaluations = measure(run, protocol, validation, trainings.stopped)
    if evaluations is None:
        return False
    record = {
        "row": run.row.name,
        "seed": run.seed,
        "command": ["python", "-m", "training.train", *run.flags, "--output", str(run.folder)],
        "evaluations": evaluations,
    }
    write_json(run.record, record)
    return True


def complete_all(
    runs: Sequence[Run], protocol: Protocol, validation: Dataset, output: Path, jobs: int
) -> list[str]:
    """Bring every run to its end, `jobs` side by side. -> what failed, each a sentence."""
    trainings, failures = Trainings(jobs), []
    with ThreadPoolExecutor(jobs) as pool:
        begun = {pool.submit(complete, run, protocol, validation, trainings): run for run in runs}
        try:
            for future in as_completed(begun):
                try:
                    if not future.result():  # the training was interrupted, and not by us
                        raise KeyboardInterrupt
                    write_results(output, TITLES)
                except (ValueError, OSError) as error:
                    failures.append(f"{begun[future].label}: {error}")
                    print(f"error: {failures[-1]}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            trainings.stop()
            raise
    return failures


def run_experiments(options: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """All that `main` was asked for but the printing. -> what failed."""
    for flag in flags:
        name = flag.split("=")[0]
        if name in OF_ROWS:
            raise ValueError(f"{name} is what the rows differ in; it cannot be given for all")
        if name in OWN:
            raise ValueError(f"{name} cannot be given here: rows that were begun go on anyway")
    rows = [row for row in ROWS if row.name in (options.rows or TITLES)]
    seeds: Sequence[int | None] = options.seeds or (None,)
    runs = [make_run(row, seed, options.output, flags) for seed in seeds for row in rows]
    config, given = runs[0].config, runs[0].arguments
    if not given.data:
        raise ValueError("--data is missing: what to train on")
    protocol = Protocol(
        tuple(sizes_in_proportion(options.sizes, config.width, config.height)), options.checkpoint
    )
    settings = settings_of(runs[0], protocol)
    check_settings(options.output, settings)
    pending = [run for run in runs if not run.record.exists()]
    if not pending:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)  # the trainings tell
        training, validation = open_data(given.data, given.split, given.val_split, given.val_data)
    network = make_network(config, len(training.class_names))
    for width, height in protocol.sizes:  # found out before anything is trained
        network.resized(width, height)
    write_json(options.output / SETTINGS, settings)
    if config.mosaic_off_epochs >= config.epochs:
        print("note: no epoch sees a mosaic: --mosaic-off-epochs is not below --epochs")
    print(f"{len(pending)} of {len(runs)} trainings to do", flush=True)
    return complete_all(pending, protocol, validation, options.output, options.jobs)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m training.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of python -m training.train and hold for every row.",
        allow_abbrev=False,
    )
    p.add_argument("--output", required=True, type=Path, help="folder for the rows and tables")
    p.add_argument(
        "--rows", type=_names, metavar="A,B",
        help=f"only these rows, of {', '.join(row.name for row in ROWS)}",
    )  # fmt: skip
    p.add_argument(
        "--seeds", type=_numbers, metavar="A,B",
        help="train every row once with each: tables show mean and standard deviation",
    )  # fmt: skip
    p.add_argument(
        "--sizes", type=_widths, default=(320, 416, 512), metavar="A,B",
        help="widths to measure at, multiples of 32, the height in proportion (320,416,512)",
    )  # fmt: skip
    p.add_argument(
        "--checkpoint", choices=tuple(CHECKPOINTS), default="last",
        help="which weights are measured (last)",
    )  # fmt: skip
    p.add_argument("--jobs", type=positive, default=1, help="trainings side by side (1)")
    p.add_argument("--table-only", action="store_true", help="only show what is there already")
    return p


def _names(text: str) -> tuple[str, ...]:
    known, names = [row.name for row in ROWS], tuple(text.split(","))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a row; rows: {', '.join(known)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len({*parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different numbers: 0,1,2")
    return tuple(int(part) for part in parts)


def _widths(text: str) -> tuple[int, ...]:
    widths = _numbers(text)
    if not all(width and width % STRIDE == 0 for width in widths):
        raise argparse.ArgumentTypeError(f"{text!r}: widths must be multiples of {STRIDE}")
    return widths


def main(argv: Sequence[str] | None = None) -> int:
    options, flags = parser().parse_known_args(argv)
    try:
        if find_spec("matplotlib") is None:  # not after the first row
            raise ValueError("the chart needs matplotlib: pip install matplotlib")
        with Interrupts():
            failures = [] if options.table_only else run_experiments(options, flags)
        print(write_results(options.output, TITLES))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
