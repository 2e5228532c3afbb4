"""What a classifier's training tells: a live line, a line per epoch, `log.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.classify.examples import Batch
from training.classify.folder import ImageFolder
from training.classify.trainer import Accuracy, ClassifierTrainer
from yolov4_fast.files import replacing

SHOWN = 5  # pictures that cannot be decoded whose names are printed


class Log:
    """For the one process of a run that speaks. What a killed run wrote after its last checkpoint
    is dropped.
    """

    def __init__(self, output: Path, trainer: ClassifierTrainer, folder: ImageFolder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("training needs TensorBoard: pip install tensorboard") from None
        self.trainer, self.folder, self.path = trainer, folder, output / "log.jsonl"
        self.unreadable: set[Path] = set()
        output.mkdir(parents=True, exist_ok=True)
        self._drop_rows()
        step = trainer.progress.step
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self.started, self.first_epoch = time.perf_counter(), trainer.progress.epoch

    def _drop_rows(self) -> None:
        """Rows of epochs that the checkpoint does not know of, and what a crash left of one."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                known = json.loads(line)["epoch"] <= self.trainer.progress.epoch
            except ValueError:
                known = False
            kept += [line + "\n"] if known else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept))

    def epoch_begins(self) -> None:
        progress, steps = self.trainer.progress, self.trainer.steps_per_epoch
        self.epoch_started = self.last_step = time.perf_counter()
        self.total, self.steps = 0.0, 0
        self.bar = tqdm(
            total=steps, leave=False, disable=not sys.stderr.isatty(), unit="step",
            desc=f"epoch {progress.epoch + 1}/{self.trainer.config.epochs}",
        )  # fmt: skip

    def step(self, loss: float, batch: Batch) -> None:
        step = self.trainer.progress.step
        self.total += loss
        self.steps += 1
        self.last_step = time.perf_counter()
        self.board.add_scalar("loss", loss, step)
        self.board.add_scalar("learning_rate", self.trainer.learning_rate(step - 1), step)
        self.tell_unreadable(self.folder, batch.unreadable)
        self.bar.set_postfix_str(
            f"loss {self.total / self.steps:.3f}  {self._speed():.1f} pictures/s", refresh=False
        )
        self.bar.update()

    def tell_unreadable(self, folder: ImageFolder, indices: tuple[int, ...]) -> None:
        """Names the first few pictures that cannot be decoded; each once."""
        for path in (folder.image_paths[index] for index in indices):
            if path not in self.unreadable:
                self.unreadable.add(path)
                if len(self.unreadable) <= SHOWN:
                    tqdm.write(f"{path}: cannot be decoded", file=sys.stderr)

    def _speed(self) -> float:
        """Training pictures/s of the epoch so far, over all processes."""
        seconds = max(self.last_step - self.epoch_started, 1e-9)
        return self.steps * self.trainer.config.batch_size / seconds

    def training_ends(self) -> None:
        """The epoch's steps are done, and its validation follows."""
        self.bar.close()

    def epoch_ends(self, accuracy: Accuracy) -> None:
        """A row, before the checkpoint of the epoch is written."""
        progress, epochs = self.trainer.progress, self.trainer.config.epochs
        done = (time.perf_counter() - self.started) / (progress.epoch - self.first_epoch)
        left = int(done * (epochs - progress.epoch))
        loss = self.total / self.steps
        row: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "loss": loss}
        row |= {"top1": accuracy.top1, "top5": accuracy.top5, "pictures_per_second": self._speed()}
        self.board.add_scalar("val/top1", accuracy.top1, progress.step)
        self.board.add_scalar("val/top5", accuracy.top5, progress.step)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        unreadable = len(self.unreadable)
        print(
            f"epoch {progress.epoch}/{epochs}  loss {loss:.3f}  {self._speed():.1f} pictures/s  "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  top-1 {accuracy.top1:.4f}"
            f"  top-5 {accuracy.top5:.4f}  (best top-1 {progress.best:.4f})"
            + (f"  {unreadable} cannot be decoded" if unreadable else ""),
            flush=True,
        )

    def close(self) -> None:
        self.board.close()
