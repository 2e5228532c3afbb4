"""The command line of `python -m training.pretrain`, and the configuration it sets."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import torch

from training.classify.config import PretrainConfig
from training.classify.examples import CACHES
from training.config import OPTIMIZERS
from training.options import PREFIX, add_setting, count, device
from yolov4_fast.commands.arguments import size

DEFAULTS = PretrainConfig()
DESCRIPTION = (
    "Train the backbone of a network to tell the classes of whole pictures apart; its weights then "
    "start the training of a detector."
)
MODEL = ("model", "width_multiple", "activation", "csp", "weighted_shortcuts")
PICTURES = ("cutmix", "mosaic", "crop", "flip", "hue", "saturation", "exposure")


def parser() -> argparse.ArgumentParser:
    """Every field of `PretrainConfig` has a flag: its name with dashes, except that `batch_size` is
    --batch, and width and height are --size.
    """
    p = argparse.ArgumentParser(
        prog="python -m training.pretrain", description=DESCRIPTION, allow_abbrev=False
    )
    _add_run(p)
    model = p.add_argument_group("model")
    model.add_argument(
        "--size", type=size, metavar="N|WxH",
        help=f"input in pixels (default: {DEFAULTS.width})",
    )  # fmt: skip
    pictures = p.add_argument_group("pictures")
    training = p.add_argument_group("training")
    types = get_type_hints(PretrainConfig)
    for item in fields(PretrainConfig):
        if item.name not in ("width", "height"):
            group = model if item.name in MODEL else pictures if item.name in PICTURES else training
            add_setting(group, item, types[item.name])
    return p


def _add_run(p: argparse.ArgumentParser) -> None:
    run = p.add_argument_group("run")
    run.add_argument(
        "--data", type=Path, required=True, metavar="DIR",
        help="folder with train/<class>/*.jpg and val/<class>/*.jpg",
    )  # fmt: skip
    run.add_argument("--split", default="train", help="what to train on (default: %(default)s)")
    run.add_argument(
        "--val-split", default="val", help="what to validate on (default: %(default)s)"
    )
    run.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for checkpoints and logs"
    )
    run.add_argument(
        "--resume", action="store_true",
        help="go on from OUTPUT/last.safetensors, or begin where there is none yet",
    )  # fmt: skip
    run.add_argument(
        "--cache", choices=CACHES, default="memory",
        help="where decoded pictures are kept (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--cache-folder", type=Path, metavar="DIR",
        help="for --cache disk (default: OUTPUT); runs that share it share the files",
    )  # fmt: skip
    run.add_argument(
        "--workers", type=count, default=1, metavar="N",
        help="loader processes; 0: none (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train; under torchrun cuda is the GPU of each process's number "
        "(default: %(default)s)",
    )  # fmt: skip


def configuration(arguments: argparse.Namespace) -> PretrainConfig:
    """What the flags set. Raises ValueError naming the first setting that cannot be."""
    given = {
        key.removeprefix(PREFIX): value
        for key, value in vars(arguments).items()
        if key.startswith(PREFIX)
    }
    if arguments.size:
        given["width"], given["height"] = arguments.size
    if "optimizer" in given:
        rate, decay = OPTIMIZERS[given["optimizer"]]
        given = {"learning_rate": rate, "weight_decay": decay} | given
    return PretrainConfig(**given)
