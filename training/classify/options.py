"""The command line of `python -m training.pretrain`, and the configuration it sets."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from training.classify.config import PretrainConfig
from training.options import PREFIX, add_running, add_setting
from training.stepping import OPTIMIZERS
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
    run.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for checkpoints and logs"
    )
    add_running(run)


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
