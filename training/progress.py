"""Where a run stands, beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from training.losses import Losses


@dataclass
class Progress:
    """What a checkpoint keeps of a run's course."""

    epoch: int = 0  # epochs completed, their validation too
    step: int = 0  # optimiser steps taken
    best: float = -1.0  # highest validation mAP50 so far
    best_epoch: int = 0
    sums: list[float] = field(default_factory=list)  # of each loss term over the epoch under way
    summed: int = 0  # steps in `sums`

    def add(self, losses: Losses) -> None:
        """Count a step of the epoch under way."""
        values = [float(value) for value in losses]
        sums = self.sums or [0.0] * len(values)
        self.sums = [total + value for total, value in zip(sums, values, strict=True)]
        self.summed += 1
        self.step += 1

    def means(self) -> dict[str, float]:
        """Mean of each loss term over the epoch so far."""
        return {
            name: total / self.summed
            for name, total in zip(Losses._fields, self.sums, strict=False)
        }

    def end_epoch(self) -> None:
        self.epoch += 1
        self.sums, self.summed = [], 0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))
