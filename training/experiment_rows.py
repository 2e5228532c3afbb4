"""The rows of the seed's tables as flags of `python -m training.train`, and the runs they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.config import TrainConfig
from training.options import configuration
from training.options import parser as train_parser

# 1e-4 up to epoch 30, 5e-5 up to epoch 50, then 1e-5, of 100 epochs; as shares of any run
STEPS = ("--schedule", "steps", "--steps", "0.3,0.5", "--scales", "0.5,0.2")
COSINE = ("--schedule", "cosine")
RECORD = "row.json"  # in the folder of a row that is done
# What rows differ in
OF_ROWS = ("--box-loss", "--schedule", "--steps", "--scales", "--mosaic")


@dataclass(frozen=True)
class Row:
    """One row of the tables."""

    name: str  # of its folder
    title: str
    flags: tuple[str, ...]


def _row(title: str, name: str, box_loss: str, schedule: tuple[str, ...], mosaic: str = "0") -> Row:
    return Row(name, title, ("--box-loss", box_loss, *schedule, "--mosaic", mosaic))


ROWS = (
    _row("CSP (SSE)", "sse", "sse", STEPS),
    _row("CSP + GIoU", "giou", "giou", STEPS),
    _row("CSP + DIoU", "diou", "diou", STEPS),
    _row("CSP + CIoU", "ciou", "ciou", STEPS),
    _row("CSP + SIoU", "siou", "siou", STEPS),
    _row("CSP + CIoU + CA", "ciou-ca", "ciou", COSINE),
    _row("CSP + CIoU + CA + M", "ciou-ca-m", "ciou", COSINE, mosaic="0.5"),
)
TITLES = {row.name: row.title for row in ROWS}


@dataclass(frozen=True)
class Run:
    """The training of one row with one seed."""

    row: Row
    seed: int
    folder: Path
    arguments: argparse.Namespace  # of training.train
    config: TrainConfig
    flags: tuple[str, ...]  # that `arguments` were read from

    @property
    def label(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def record(self) -> Path:
        """Written when the row is done."""
        return self.folder / RECORD


def make_run(row: Row, seed: int | None, output: Path, flags: Sequence[str]) -> Run:
    """The run of a row; the seed is that of the flags where none is given."""
    own = [*flags, *row.flags, *(() if seed is None else ("--seed", str(seed)))]
    arguments = train_parser().parse_args([*own, "--output", str(output)])
    config, _ = configuration(arguments)
    folder = output / f"{row.name}-seed{config.seed}"
    return Run(row, config.seed, folder, arguments, config, tuple(own))
