"""What a training run tells: a line per epoch, `log.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from training.losses import Losses
from training.trainer import Trainer, TrainingError
from yolov4_fast.evaluation import Evaluation


class Log:
    """Progress on the terminal, `log.jsonl` and TensorBoard."""

    def __init__(self, output: Path, trainer: Trainer) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise TrainingError("training needs TensorBoard: pip install tensorboard") from None
        output.mkdir(parents=True, exist_ok=True)
        self.trainer, self.path = trainer, output / "log.jsonl"
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=trainer.progress.step)
        self.started, self.first_epoch = time.perf_counter(), trainer.progress.epoch

    def epoch_begins(self, steps: int) -> None:
        self.epoch_started, self.sums, self.steps = time.perf_counter(), [0.0] * 4, 0
        self.bar = tqdm(
            total=steps, leave=False, disable=not sys.stderr.isatty(), unit="step",
            desc=f"epoch {self.trainer.progress.epoch + 1}/{self.trainer.config.epochs}",
        )  # fmt: skip

    def step(self, losses: Losses) -> None:
        values = [float(value) for value in losses]
        self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
        self.steps += 1
        step = self.trainer.progress.step
        for name, value in zip(Losses._fields, values, strict=True):
            self.board.add_scalar(f"loss/{name}", value, step)
        self.board.add_scalar("learning_rate", self.trainer.learning_rate(step - 1), step)
        self.last_step = time.perf_counter()
        self.bar.set_postfix_str(f"loss {values[0]:.3f}", refresh=False)
        self.bar.update()

    def epoch_ends(self, evaluation: Evaluation | None) -> None:
        self.bar.close()
        progress, config = self.trainer.progress, self.trainer.config
        means = [total / self.steps for total in self.sums]
        rate = self.steps * config.batch_size / (self.last_step - self.epoch_started)
        left = (time.perf_counter() - self.started) / (progress.epoch - self.first_epoch)
        left *= config.epochs - progress.epoch
        row = {"epoch": progress.epoch, "step": progress.step, "images_per_second": rate}
        row |= dict(zip(Losses._fields, means, strict=True))
        line = (
            f"epoch {progress.epoch}/{config.epochs}  loss {means[0]:.3f} (box {means[1]:.3f} "
            f"objectness {means[2]:.3f} classes {means[3]:.3f})  {rate:.1f} images/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        if evaluation:
            row["mAP50"] = evaluation.mAP50
            self.board.add_scalar("val/mAP50", evaluation.mAP50, progress.step)
            line += f"  mAP50 {evaluation.mAP50:.4f} (best {progress.best:.4f})"
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(line, flush=True)

    def close(self) -> None:
        self.board.close()
