"""The command line of `python -m training.train`, and the configuration it sets."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.augment import AugmentConfig
from training.config import OPTIMIZERS, PRECISIONS, TrainConfig
from training.losses import BOX_LOSSES, LossConfig
from yolov4_fast.commands.arguments import positive, size
from yolov4_fast.network.architectures import NAMES

DEFAULTS = TrainConfig()
DESCRIPTION = "Train a network on VOC, COCO or Darknet data."


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to the help of each argument that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m training.train",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    data = p.add_argument_group("data")
    data.add_argument("--data", required=True, help="VOC folder, COCO JSON or Darknet .data file")
    data.add_argument("--split", default="train", help="what to train on")
    data.add_argument("--val-split", default="val", help="what to validate on")
    data.add_argument("--output", required=True, type=Path, help="folder for checkpoints and logs")
    data.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.safetensors")
    data.add_argument("--workers", type=count, default=1, help="loader processes; 0: none")
    data.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train",
    )
    data.add_argument("--val-every", type=positive, default=5, help="epochs between validations")
    model = p.add_argument_group("model")
    model.add_argument("--model", default=DEFAULTS.model, help=f"a .cfg or {', '.join(NAMES)}")
    model.add_argument(
        "--weights", type=Path, help="start from a checkpoint or Darknet weights, also partial ones"
    )
    model.add_argument("--size", type=size, default="416", metavar="N|WxH", help="input in pixels")
    run = p.add_argument_group("training")
    run.add_argument("--epochs", type=int, default=DEFAULTS.epochs, help="passes over the data")
    run.add_argument("--batch", type=int, default=DEFAULTS.batch_size, help="images per step")
    run.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=DEFAULTS.optimizer, help="how to step"
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, (rate, _) in OPTIMIZERS.items())
    decays = ", ".join(f"{decay:g} for {name}" for name, (_, decay) in OPTIMIZERS.items())
    run.add_argument("--learning-rate", type=float, help=f"by default {rates}")
    run.add_argument("--weight-decay", type=float, help=f"by default {decays}")
    run.add_argument(
        "--warmup-epochs",
        type=float,
        default=DEFAULTS.warmup_epochs,
        help="in which the learning rate rises from 0; a cosine follows",
    )
    run.add_argument(
        "--ema-decay",
        type=float,
        default=DEFAULTS.ema_decay,
        help="of the averaged weights that are validated and kept",
    )
    run.add_argument(
        "--box-loss", choices=BOX_LOSSES, default=DEFAULTS.loss.box_loss, help="of the boxes"
    )
    run.add_argument("--mosaic", type=float, default=DEFAULTS.augment.mosaic, help="probability")
    run.add_argument(
        "--mosaic-off-epochs",
        type=int,
        default=DEFAULTS.mosaic_off_epochs,
        help="last epochs, which see whole images only",
    )
    run.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=DEFAULTS.precision,
        help="of the network; weights and loss stay in float32",
    )
    run.add_argument("--seed", type=int, default=DEFAULTS.seed, help="of all that is random")
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
    rate, decay = OPTIMIZERS[arguments.optimizer]
    return TrainConfig(
        model=arguments.model,
        width=width,
        height=height,
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        optimizer=arguments.optimizer,
        learning_rate=rate if arguments.learning_rate is None else arguments.learning_rate,
        weight_decay=decay if arguments.weight_decay is None else arguments.weight_decay,
        warmup_epochs=arguments.warmup_epochs,
        ema_decay=arguments.ema_decay,
        mosaic_off_epochs=arguments.mosaic_off_epochs,
        precision=arguments.precision,
        seed=arguments.seed,
        loss=LossConfig(box_loss=arguments.box_loss),
        augment=AugmentConfig(mosaic=arguments.mosaic),
    )
