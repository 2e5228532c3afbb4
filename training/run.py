"""A whole run: epochs, validations, checkpoints, and stopping at any moment without losing any.

`last.safetensors` is written at the end of every epoch and every few minutes within one, always
between two steps; `best.safetensors` where the validation mAP50 rises. A run that is killed goes on
from the last; all that was written for later steps is dropped and made again, the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from training.augment import AugmentConfig
from training.board import Board
from training.config import TrainConfig
from training.interrupts import Interrupts
from training.loader import Epoch, TrainingSet, batches
from training.log import Log
from training.multi_scale import multi_scale_size
from training.pictures import write_curves
from training.progress import Progress
from training.resume import save
from training.trainer import Diverged, Trainer, TrainingError
from training.validation import make_detector, validate
from yolov4_fast.datasets import Dataset
from yolov4_fast.evaluation import Evaluation
from yolov4_fast.files import replacing

LAST, BEST = "last.safetensors", "best.safetensors"  # in the output folder
CURVES, ROWS, BOARD = "curves.png", "log.jsonl", "tensorboard"


class Stopped(Exception):
    """Ctrl-C or SIGTERM: the run was saved, and can go on."""


@dataclass(frozen=True)
class Course:
    """How a run is watched and kept; none of it changes its weights."""

    output: Path
    val_every: int = 5  # epochs
    save_every: float = 10.0  # minutes; 0: at the ends of epochs only
    workers: int = 0  # processes of the loader


class Run:
    """Trains to the end of the configuration's course. `progress` is where it begins."""

    def __init__(
        self,
        trainer: Trainer,
        examples: TrainingSet,
        validation: Dataset,
        progress: Progress,
        course: Course,
        interrupts: Interrupts,
    ) -> None:
        self.trainer, self.examples, self.validation = trainer, examples, validation
        self.progress, self.course, self.interrupts = progress, course, interrupts
        self.config, self.processes = trainer.config, trainer.processes
        self.augment = examples.config
        self.class_names = validation.class_names
        self.epochs = -(-trainer.total_steps // trainer.steps_per_epoch)
        self.saved = time.monotonic()
        self.evaluation: Evaluation | None = None  # the last
        self.log: Log | None = None
        self.board: Board | None = None
        if self.processes.main:
            self.log = Log(
                course.output / ROWS, self.config, progress, trainer.total_steps,
                trainer.steps_per_epoch,
            )  # fmt: skip
            self.board = Board(course.output / BOARD, progress.step)

    def train(self) -> None:
        """Every epoch that is left. Raises Stopped, TrainingError."""
        try:
            with self.interrupts.held():
                while self.progress.epoch < self.epochs:
                    self._epoch()
        except Diverged as error:
            raise TrainingError(f"{error}; {self._keep(error)}") from None
        finally:
            if self.board:
                self.board.close()
        if self.log and self.evaluation:  # else there was nothing left to do
            write_curves(self.course.output / CURVES, self.log.rows(), self.evaluation)

    def _epoch(self) -> None:
        """What is left of an epoch, its validation where it is time for one, the checkpoints."""
        progress, epoch = self.progress, self.progress.epoch + 1
        if self.log:
            self.log.begin_epoch()
        self._steps()
        if self.log:
            self.log.end_training()
        if not self.processes.main:
            progress.end_epoch()
            return
        evaluation = None
        if epoch % self.course.val_every == 0 or epoch == self.epochs:
            evaluation = self.evaluation = self._validate()
        self._end_epoch(evaluation)

    def _end_epoch(self, evaluation: Evaluation | None) -> None:
        """Bookkeeping, in an order that a kill in between leaves consistent: what comes before
        `last` is done again, the same, when the run goes on from the one before.
        """
        progress, means = self.progress, self.progress.means()
        progress.end_epoch()
        if evaluation and evaluation.mAP50 > progress.best:
            progress.best, progress.best_epoch = evaluation.mAP50, progress.epoch
            self._save(BEST, evaluation, resumable=False)
        assert self.log
        self.log.end_epoch(means, evaluation)
        self._save(LAST, evaluation, resumable=True)

    def _steps(self) -> None:
        trainer, progress = self.trainer, self.progress
        end = min((progress.epoch + 1) * trainer.steps_per_epoch, trainer.total_steps)
        if progress.step >= end:  # all that is missing is the validation
            return
        for batch in self._loader():
            first = progress.step % trainer.steps_per_epoch == 0
            if self.board and first and progress.epoch % self.course.val_every == 0:
                self.board.batch(batch, self.class_names, progress.step)
            rate = trainer.learning_rate(progress.step)
            losses = trainer.train_step(batch)
            progress.add(losses)
            if self.log and self.board:
                self.board.step(losses, rate, self.log.step(losses), progress.step)
            if self.processes.any(self.interrupts.requested):
                self._stop(together=True)
            if progress.step == end:
                break
            if self.processes.main and self._is_time_to_save():
                self._save(LAST, None, resumable=True)

    def _loader(self) -> Epoch:
        """The batches that are left of the epoch: this process's share of each."""
        config, processes, progress = self.config, self.processes, self.progress
        last_of_all = progress.epoch >= self.epochs - config.mosaic_off_epochs
        self.examples.config = _whole(self.augment) if last_of_all else self.augment
        begun = progress.epoch * self.trainer.steps_per_epoch
        return batches(
            self.examples,
            config.batch_size // processes.world,
            progress.epoch,
            workers=self.course.workers,
            first_batch=progress.step - begun,
            rank=processes.rank,
            world=processes.world,
            pin_memory=processes.device.type == "cuda",
            sizes=_sizes(config, begun, self.trainer.network.max_stride),
        )

    def _validate(self) -> Evaluation:
        """Of the averaged weights. Ctrl-C ends it at once: with it the run goes on later."""
        assert self.board
        try:
            with self.interrupts.at_once():
                detector = make_detector(
                    self.trainer.network,
                    self.trainer.average.state,
                    self.class_names,
                    self.config.validation,
                    self.processes.device,
                )
                evaluation = validate(detector, self.validation)
        except KeyboardInterrupt:
            self._stop(together=False)  # the others wait within their next step
        self.board.evaluation(evaluation, self.progress.step)
        self.board.detections(detector, self.validation, self.progress.step)
        return evaluation

    def _is_time_to_save(self) -> bool:
        return 0 < self.course.save_every * 60 <= time.monotonic() - self.saved

    def _save(self, name: str, evaluation: Evaluation | None, *, resumable: bool) -> None:
        if self.board:
            self.board.flush()
        path = self.course.output / name
        save(path, self.trainer, self.class_names, self.progress, evaluation, resumable=resumable)
        self.saved = time.monotonic()

    def _stop(self, *, together: bool) -> NoReturn:
        """Save and end the run. together: all processes are here, and so end when it is saved."""
        if self.processes.main:
            self._save(LAST, None, resumable=True)
        if together:
            self.processes.barrier()
        raise Stopped(
            f"stopped after step {self.progress.step} of {self.trainer.total_steps}, saved in "
            f"{self.course.output / LAST}"
        )

    def _keep(self, error: Diverged) -> str:
        """Write the batch that made the loss diverge. -> a sentence that says where."""
        rank = f"-of-process-{self.processes.rank}" if self.processes.world > 1 else ""
        path = self.course.output / f"diverged-at-step-{error.step}{rank}.safetensors"
        tensors = {
            "images": error.batch.images.contiguous(),
            "targets": error.batch.targets.contiguous(),
            "losses": torch.stack([term.float() for term in error.losses]),
            "step": torch.tensor(error.step),
        }
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as problem:  # the latter is its form of a full disk
            return f"the batch could not be kept ({problem}); the checkpoints are those of before"
        return f"the batch is in {path}; the checkpoints are those of before"


def _sizes(
    config: TrainConfig, first_step: int, multiple: int
) -> Callable[[int], tuple[int, int]] | None:
    """(height, width) of each batch of the epoch that begins with a step; None: the set's own."""
    if not config.multi_scale:
        return None
    low, high = config.multi_scale

    def size(number: int) -> tuple[int, int]:
        step, every = first_step + number, config.multi_scale_every
        return multi_scale_size(
            config.seed, step, every, low, high, config.height, config.width, multiple
        )

    return size


def _whole(config: AugmentConfig) -> AugmentConfig:
    """Without what joins several pictures into one."""
    return replace(config, mosaic=0.0, cutmix=0.0, mixup=0.0)
