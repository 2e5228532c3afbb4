"""Train a backbone as a classifier: `python -m training.pretrain --data DIR --output DIR`.

DIR holds train/<class>/*.jpg and val/<class>/*.jpg. Writes `last.safetensors` after every epoch
(with all that --resume needs), `best.safetensors` whenever the top-1 accuracy on val rises,
TensorBoard scalars, and one JSON line per epoch to `log.jsonl`. Either checkpoint starts the
training of a detector: `python -m training.train --weights DIR/best.safetensors`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields

import torch

from training.classify.config import PretrainConfig
from training.classify.examples import (
    CACHE_BYTES,
    Batch,
    Batches,
    EpochKeys,
    Pictures,
    TrainingExamples,
    ValidationExamples,
    validation_requests,
)
from training.classify.folder import ImageFolder, counts, open_folder
from training.classify.log import Log
from training.classify.options import configuration, parser
from training.classify.trainer import ClassifierTrainer, Progress
from training.distributed import Processes
from training.interrupts import Interrupts
from training.lock import alone
from yolov4_fast.commands.arguments import check_folder
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.architectures.backbone import backbone_of
from yolov4_fast.network.layers import Network

LAST, BEST = "last.safetensors", "best.safetensors"  # in the output folder
CHANGES = ("width_multiple", "activation", "csp", "weighted_shortcuts")  # to an architecture


def make_backbone(config: PretrainConfig) -> Network:
    """The backbone to train, of an architecture by name or of a .cfg."""
    defaults = {item.name: item.default for item in fields(config)}
    changes = {
        name: getattr(config, name) for name in CHANGES if getattr(config, name) != defaults[name]
    }
    if not config.model.endswith(".cfg"):
        size = {"width": config.width, "height": config.height}
        return backbone_of(by_name(config.model, **size, **changes))
    if changes:
        raise ValueError(f"{config.model}: {next(iter(changes))} is for architectures by name")
    network = read_cfg(config.model)
    if network.channels != 3:
        raise ValueError(
            f"{config.model}: takes {network.channels} channels; pictures are read with 3 (RGB)"
        )
    return backbone_of(network.resized(config.width, config.height))


class Run:
    """The pictures of both splits, the trainer, and where it all goes."""

    def __init__(self, arguments: argparse.Namespace, processes: Processes) -> None:
        self.arguments, self.processes, self.config = arguments, processes, configuration(arguments)
        self.last, self.best = arguments.output / LAST, arguments.output / BEST
        if self.last.exists() and not arguments.resume:
            raise ValueError(
                f"{arguments.output} already holds a run: give --resume or another --output"
            )
        self.training, self.validation = open_splits(arguments)
        steps = self._steps()
        network, names = make_backbone(self.config), self.training.class_names
        self.trainer = ClassifierTrainer(self.config, network, names, steps, processes)
        if arguments.resume and self.last.exists():
            self._resume()
        ahead = arguments.workers, processes.device.type == "cuda"
        self.pictures = self._pictures(self.training)
        self.batches = Batches(TrainingExamples(self.pictures, self.config).prepare, *ahead)
        val_pictures = self._pictures(self.validation)
        self.val_batches = Batches(ValidationExamples(val_pictures).prepare, *ahead)

    def _steps(self) -> int:
        batch, world = self.config.batch_size, self.processes.world
        if batch % world:
            raise ValueError(f"a batch of {batch} does not split among {world} processes")
        if batch > len(self.training):
            raise ValueError(f"{len(self.training)} pictures do not fill one batch of {batch}")
        return len(self.training) // batch

    def _pictures(self, folder: ImageFolder) -> Pictures:
        processes, arguments = self.processes, self.arguments
        if arguments.cache == "disk" and not processes.main:
            processes.barrier()  # rank 0 writes the file
        pictures = Pictures(
            folder,
            self.config.height,
            self.config.width,
            cache=arguments.cache,
            cache_bytes=CACHE_BYTES // processes.local_world,
            cache_folder=arguments.cache_folder or arguments.output,
            progress=processes.main and sys.stderr.isatty(),
        )
        if arguments.cache == "disk" and processes.main:
            processes.barrier()
        return pictures

    def _resume(self) -> None:
        self.trainer.resume(self.last)
        progress = self.trainer.progress
        if progress.best_epoch and not self.best.exists():
            if self.processes.main:
                print(f"{self.best} is gone: the best of the epochs from here on will be kept")
            progress.best, progress.best_epoch = Progress.best, 0

    def train(self) -> None:
        log = None
        if self.processes.main:
            describe(self)
            log = Log(self.arguments.output, self.trainer, self.training)
            log.tell_unreadable(self.training, self.pictures.unreadable)
        try:
            while self.trainer.progress.epoch < self.config.epochs:
                self._epoch(log)
        finally:
            if log:
                log.close()
        progress = self.trainer.progress
        if self.processes.main:
            print(f"best top-1 {progress.best:.4f} after epoch {progress.best_epoch}: {self.best}")

    def _epoch(self, log: Log | None) -> None:
        """Train for one epoch, validate, and write the checkpoints."""
        trainer, progress = self.trainer, self.trainer.progress
        if log:
            log.epoch_begins()
        for loss, batch in trainer.run_epoch(self.batches(self._keys())):
            if log:
                log.step(loss, batch)
        if log:
            log.training_ends()
        accuracy = trainer.validate(self._validation_batches(log))
        better = accuracy.top1 > progress.best
        if better:
            progress.best, progress.best_epoch = accuracy.top1, progress.epoch
        if log:
            log.epoch_ends(accuracy)
            if better:
                trainer.save(self.best, accuracy, resumable=False)
            trainer.save(self.last, accuracy, resumable=True)

    def _keys(self) -> EpochKeys:
        config, processes = self.config, self.processes
        count, epoch = len(self.training), self.trainer.progress.epoch
        shares = processes.rank, processes.world
        return EpochKeys(count, config.batch_size, config.seed, epoch, *shares)

    def _validation_batches(self, log: Log | None) -> Iterator[Batch]:
        processes = self.processes
        requests = validation_requests(
            len(self.validation), self.config.batch_size, processes.rank, processes.world
        )
        for batch in self.val_batches(requests):
            if log:
                log.tell_unreadable(self.validation, batch.unreadable)
            yield batch


def open_splits(arguments: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """What to train on and what to validate on, with the classes of the first."""
    training = open_folder(arguments.data, arguments.split)
    if len(training.class_names) < 2:
        raise ValueError(
            f"{arguments.data}: holds the class {training.class_names[0]!r} alone; there must be "
            "two at least to tell apart"
        )
    return training, open_folder(arguments.data, arguments.val_split, training.class_names)


def describe(run: Run) -> None:
    network, config, names = run.trainer.network, run.config, run.training.class_names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    print(
        f"backbone of {config.model}: {len(network.layers)} layers, {network.parameters():,} "
        f"parameters, {network.operations() / 1e9:.2f} Gops at {network.width}x{network.height}, "
        f"{len(names)} classes ({shown})"
    )
    for folder in (run.training, run.validation):
        least, most = counts(folder)
        print(f"{folder.split}: {len(folder)} pictures, {least} to {most} of a class")
    unreadable = len(run.pictures.unreadable)
    if unreadable:
        print(f"{unreadable} of them cannot be decoded; their neighbours take their places")


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 2 after an error that was told; 130 after Ctrl-C or SIGTERM."""
    arguments = parser().parse_args(argv)
    processes = Processes(torch.device("cpu"))
    with Interrupts():  # the workers pass Ctrl-C over
        try:
            processes = Processes.start(arguments.device)
            check_folder(arguments.output)  # not after all pictures have been read
            run = Run(arguments, processes)
            with alone(arguments.output) if processes.main else nullcontext():
                run.train()
        except (ValueError, OSError) as error:
            if processes.claim_error():
                print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if processes.main:
                print(f"\ninterrupted{_how_to_go_on(arguments)}", file=sys.stderr)
            return 130
        except RuntimeError as error:
            return _failed(error, processes)
        finally:
            processes.close()
    return 0


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    last = arguments.output / LAST
    if last.exists():
        return f"; go on with the same command and --resume ({last})"
    return " before the first epoch was done; there is no checkpoint"


def _failed(error: RuntimeError, processes: Processes) -> int:
    """What torch raises: for a peer that has gone, for a full GPU, or for a mistake of ours."""
    first = processes.claim_error()
    if processes.world > 1 and not first:
        return 2  # because another process failed, which has said why
    if isinstance(error, torch.cuda.OutOfMemoryError):
        hint = "--precision bf16 or a smaller --batch need less memory"
        print(f"error: {error}; {hint}", file=sys.stderr)
        return 2
    raise error


if __name__ == "__main__":
    sys.exit(main())
