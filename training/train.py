"""Train a network on VOC, COCO or Darknet data: `python -m training.train --data DIR --output DIR`.

Writes `last.safetensors` after every epoch (with all that --resume needs), `best.safetensors`
whenever the validation mAP50 rises, TensorBoard scalars, and one JSON line per epoch to
`log.jsonl`. `yolov4-fast build` takes either checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from training.config import TrainConfig
from training.loader import TrainingSet, batches
from training.log import Log
from training.options import configuration, parser
from training.trainer import Progress, Trainer
from yolov4_fast.checkpoint import is_checkpoint, read_checkpoint
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.weights import read_backbone
from yolov4_fast.datasets import Dataset, DatasetWarning, open_dataset
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Network

SHOWN = 5  # problems of a data set that are printed
LAST, BEST = "last.safetensors", "best.safetensors"  # in the output folder


def make_network(config: TrainConfig, num_classes: int) -> Network:
    """The network to train: an architecture by name, or a .cfg that must fit the data's classes."""
    if not config.model.endswith(".cfg"):
        return by_name(
            config.model, num_classes=num_classes, width=config.width, height=config.height
        )
    network = read_cfg(config.model)
    if network.channels != 3:
        raise ValueError(
            f"{config.model}: takes {network.channels} channels; pictures are read with 3 (RGB)"
        )
    if network.num_classes != num_classes:
        raise ValueError(
            f"{config.model}: is for {network.num_classes} classes, the data have {num_classes}; "
            f"set classes={num_classes} in each [yolo] and filters to fit before it"
        )
    return network.resized(config.width, config.height)


def open_data(path: str, split: str, val_split: str) -> tuple[Dataset, Dataset]:
    """What to train on and what to validate on, with the classes of the first."""
    if path.endswith(".json"):
        raise ValueError(f"{path}: one COCO file is one split; give the folder that holds it")
    training = open_dataset(path, split)
    validation = open_dataset(path, val_split, training.class_names)
    for dataset in (training, validation):
        if not any((~(a.difficult | a.crowd)).any() for a in dataset.annotations):
            raise ValueError(f"{path}: split {dataset.split!r} has no objects to find")
    return training, validation


def load_initial(trainer: Trainer, path: Path) -> None:
    if is_checkpoint(path):
        taken, total = trainer.initialise(read_checkpoint(path).state)
        if taken < total / 2:  # what fits then, by layer number and shape, fits by chance
            raise ValueError(
                f"{path}: is of another network: only {taken} of {total} tensors fit "
                f"{trainer.config.model}"
            )
        print(f"{path}: took {taken} of {total} tensors")
    else:
        state, layers = read_backbone(path, trainer.network)
        trainer.initialise(state)
        print(f"{path}: took {layers} layers")


def train(arguments: argparse.Namespace) -> None:
    config = configuration(arguments)
    last, best = arguments.output / LAST, arguments.output / BEST
    if last.exists() and not arguments.resume:
        raise ValueError(
            f"{arguments.output} already holds a run: give --resume or another --output"
        )
    training, validation = open_data(arguments.data, arguments.split, arguments.val_split)
    network = make_network(config, len(training.class_names))
    examples = TrainingSet(
        training,
        config.height,
        config.width,
        config.augment,
        seed=config.seed,
        resize="letterbox" if network.letter_box else "stretch",
        progress=sys.stderr.isatty(),
    )
    steps = len(examples) // config.batch_size
    if not steps:
        raise ValueError(f"{len(examples)} images do not fill one batch of {config.batch_size}")
    trainer = Trainer(config, network, training.class_names, steps, arguments.device)
    if arguments.resume:
        trainer.resume(last)
        if trainer.progress.best_epoch and not best.exists():
            print(f"{best} is gone: the best of the epochs from here on will be kept")
            trainer.progress.best, trainer.progress.best_epoch = Progress.best, 0
    elif arguments.weights:
        load_initial(trainer, arguments.weights)
    describe(trainer, training, validation)
    log = Log(arguments.output, trainer)
    try:
        while trainer.progress.epoch < config.epochs:
            run_epoch(trainer, examples, validation, log, arguments)
    finally:
        log.close()
    progress = trainer.progress
    if progress.best_epoch:
        print(f"best mAP50 {progress.best:.4f} after epoch {progress.best_epoch}: {best}")


def run_epoch(
    trainer: Trainer,
    examples: TrainingSet,
    validation: Dataset,
    log: Log,
    arguments: argparse.Namespace,
) -> None:
    """Train for one epoch, validate where it is time to, and write the checkpoints."""
    config, progress = trainer.config, trainer.progress
    if progress.epoch >= config.epochs - config.mosaic_off_epochs:
        examples.config = replace(config.augment, mosaic=0.0)
    loader = batches(examples, config.batch_size, progress.epoch, workers=arguments.workers)
    log.epoch_begins(len(loader))
    for losses in trainer.run_epoch(loader):
        log.step(losses)
    evaluation = None
    if progress.epoch % arguments.val_every == 0 or progress.epoch == config.epochs:
        evaluation = trainer.validate(validation)
        if evaluation.mAP50 > progress.best:
            progress.best, progress.best_epoch = evaluation.mAP50, progress.epoch
            trainer.save(arguments.output / BEST, evaluation, resumable=False)
    trainer.save(arguments.output / LAST, evaluation, resumable=True)
    log.epoch_ends(evaluation)


def describe(trainer: Trainer, training: Dataset, validation: Dataset) -> None:
    network, config = trainer.network, trainer.config
    print(
        f"{config.model}: {network.parameters():,} parameters, "
        f"{network.operations() / 1e9:.2f} Gops at {network.width}x{network.height}, "
        f"{len(trainer.class_names)} classes ({', '.join(trainer.class_names)})"
    )
    for name, dataset in (("train", training), ("val", validation)):
        count = len(dataset.problems)
        told = f", {count} problem{'s' * (count > 1)} in the annotations:" if count else ""
        print(f"{name}: {len(dataset)} images{told}")
        for problem in dataset.problems[:SHOWN]:
            print(f"  {problem}")
        if count > SHOWN:
            print(f"  and {count - SHOWN} more")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DatasetWarning)  # `describe` names the problems
            train(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        last = arguments.output / LAST
        print(
            f"\ninterrupted; go on with the same command and --resume ({last})"
            if last.exists()
            else "\ninterrupted before the first epoch was done; there is no checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
