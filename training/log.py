"""What a run tells on the terminal, and `log.jsonl`: one JSON line an epoch."""

from __future__ import annotations

import json
import sys
import time
from math import isfinite
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.config import TrainConfig
from training.losses import Losses
from training.progress import Progress
from yolov4_fast.evaluation import Evaluation
from yolov4_fast.files import replacing

SHORT = {"total": "loss", "box": "box", "objectness": "objectness", "classes": "classes"}
BAR = "{percentage:3.0f}%|{bar:12}| {desc}"
PATIENCE = 60.0  # s without a line where there is no terminal to show a live one


class Log:
    """A live line on terminals; elsewhere a line an epoch, and every minute in long ones."""

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        progress: Progress,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.path, self.config, self.progress = path, config, progress
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.epochs = -(-total_steps // steps_per_epoch)
        self.started, self.first_step = time.perf_counter(), progress.step
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_rows()

    def _drop_rows(self) -> None:
        """Rows of epochs that the checkpoint does not know of, and what a crash left of one."""
        kept = [row for row in self.rows() if row["epoch"] <= self.progress.epoch]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """The epochs so far."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the end of it was being written when the run was killed
        return rows

    def begin_epoch(self) -> None:
        done = self.progress.step - self.progress.epoch * self.steps_per_epoch
        self.epoch_started = self.last_step = self.last_line = time.perf_counter()
        self.steps = 0
        self.bar = tqdm(
            total=self.steps_per_epoch, initial=done, leave=False, unit="step",
            disable=not sys.stderr.isatty(), bar_format=BAR,
            desc=f"epoch {self.progress.epoch + 1}/{self.epochs}",
        )  # fmt: skip

    def step(self, losses: Losses) -> float:
        """After a step. -> images/s of it."""
        now = time.perf_counter()
        rate = self.config.batch_size / (now - self.last_step)
        self.last_step = now
        self.steps += 1
        terms = dict(zip(Losses._fields, (float(value) for value in losses), strict=True))
        told = (
            f"epoch {self.progress.epoch + 1}/{self.epochs}  step {self.progress.step}/"
            f"{self.total_steps}  {_terms(terms)}  {self.speed():.1f} images/s  "
            f"{self._left()} left"
        )
        self.bar.set_description_str(told, refresh=False)
        self.bar.update()
        if self.bar.disable and now - self.last_line > PATIENCE:
            self.last_line = now
            print(told, flush=True)
        return rate

    def speed(self) -> float:
        """Images/s of the epoch so far, in this process's lifetime."""
        return self.steps * self.config.batch_size / max(self.last_step - self.epoch_started, 1e-9)

    def _left(self) -> str:
        """Until the end of the whole run, validations counted in as they were so far."""
        done = self.progress.step - self.first_step
        if not done:
            return "unknown"
        elapsed = time.perf_counter() - self.started
        seconds = int(elapsed / done * (self.total_steps - self.progress.step))
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def end_training(self) -> None:
        """The epoch's steps are done; its validation may follow."""
        self.bar.close()

    def end_epoch(self, means: dict[str, float], evaluation: Evaluation | None) -> None:
        """A row and a line, once `progress` counts the epoch as done."""
        progress = self.progress
        row: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step} | means
        line = f"epoch {progress.epoch}/{self.epochs}  {_terms(means)}"
        if self.steps:
            row["images_per_second"] = self.speed()
            line += f"  {self.speed():.1f} images/s"
        line += f"  {self._left()} left"
        if evaluation:
            row["mAP50"] = evaluation.mAP50 if isfinite(evaluation.mAP50) else None
            line += f"  mAP50 {evaluation.mAP50:.4f} (best {progress.best:.4f})"
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(line, flush=True)


def _terms(terms: dict[str, float]) -> str:
    named = [f"{SHORT[name]} {value:.3f}" for name, value in terms.items()]
    return f"{named[0]} ({' '.join(named[1:])})" if named else "no steps"
