"""Train a network on VOC, COCO or Darknet data: `python -m training.train --data DIR --output DIR`.

Writes `last.safetensors` after every epoch (with all that --resume needs), `best.safetensors`
whenever the validation mAP50 rises, TensorBoard scalars, and one JSON line per epoch to
`log.jsonl`. `yolov4-fast build` takes either checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from training.augment import AugmentConfig
from training.config import OPTIMIZERS, PRECISIONS, TrainConfig
from training.loader import TrainingSet, batches
from training.losses import BOX_LOSSES, LossConfig, Losses
from training.trainer import Progress, Trainer
from yolov4_fast.checkpoint import is_checkpoint, read_checkpoint
from yolov4_fast.commands.arguments import positive, size
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.weights import read_backbone
from yolov4_fast.datasets import Dataset, open_dataset
from yolov4_fast.evaluation import Evaluation
from yolov4_fast.network.architectures import NAMES, by_name
from yolov4_fast.network.layers import Network

DEFAULTS = TrainConfig()
LAST, BEST = "last.safetensors", "best.safetensors"  # in the output folder


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = p.add_argument_group("data")
    data.add_argument("--data", required=True, help="VOC folder, COCO JSON or Darknet .data file")
    data.add_argument("--split", default="train", help="what to train on")
    data.add_argument("--val-split", default="val", help="what to validate on")
    data.add_argument("--output", required=True, type=Path, help="folder for checkpoints and logs")
    data.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.safetensors")
    data.add_argument("--workers", type=count, default=1, help="loader processes; 0: none")
    data.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    data.add_argument("--val-every", type=positive, default=5, help="epochs between validations")
    model = p.add_argument_group("model")
    model.add_argument("--model", default=DEFAULTS.model, help=f"a .cfg or {', '.join(NAMES)}")
    model.add_argument(
        "--weights", type=Path, help="start from a checkpoint or Darknet weights, also partial ones"
    )
    model.add_argument("--size", type=size, default="416", metavar="N|WxH")
    run = p.add_argument_group("training")
    run.add_argument("--epochs", type=int, default=DEFAULTS.epochs)
    run.add_argument("--batch", type=int, default=DEFAULTS.batch_size, help="images per step")
    run.add_argument("--optimizer", choices=OPTIMIZERS, default=DEFAULTS.optimizer)
    run.add_argument("--learning-rate", type=float, default=DEFAULTS.learning_rate)
    run.add_argument("--weight-decay", type=float, default=DEFAULTS.weight_decay)
    run.add_argument("--warmup-epochs", type=float, default=DEFAULTS.warmup_epochs)
    run.add_argument("--ema-decay", type=float, default=DEFAULTS.ema_decay)
    run.add_argument("--box-loss", choices=BOX_LOSSES, default=DEFAULTS.loss.box_loss)
    run.add_argument("--mosaic", type=float, default=DEFAULTS.augment.mosaic, help="probability")
    run.add_argument(
        "--mosaic-off-epochs",
        type=int,
        default=DEFAULTS.mosaic_off_epochs,
        help="last epochs, which see whole images only",
    )
    run.add_argument("--precision", choices=PRECISIONS, default=DEFAULTS.precision)
    run.add_argument("--seed", type=int, default=DEFAULTS.seed)
    return p


def count(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def device(text: str) -> torch.device:
    """A device that torch has here."""
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises both for a missing backend
        reason = str(error).split(". ")[0]
        raise argparse.ArgumentTypeError(f"torch has no {text!r} here: {reason}") from None
    return chosen


def configuration(arguments: argparse.Namespace) -> TrainConfig:
    width, height = arguments.size
    return TrainConfig(
        model=arguments.model,
        width=width,
        height=height,
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        warmup_epochs=arguments.warmup_epochs,
        ema_decay=arguments.ema_decay,
        mosaic_off_epochs=arguments.mosaic_off_epochs,
        precision=arguments.precision,
        seed=arguments.seed,
        loss=LossConfig(box_loss=arguments.box_loss),
        augment=AugmentConfig(mosaic=arguments.mosaic),
    )


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
        print(f"{name}: {len(dataset)} images, {len(dataset.problems)} problems in annotations")
        for problem in dataset.problems[:5]:
            print(f"  {problem}")


class Log:
    """Progress on the terminal, `log.jsonl` and TensorBoard."""

    def __init__(self, output: Path, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

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


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
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
