"""The command line of `python -m training.train`, and the configuration it sets.

Every field of `TrainConfig` and of the configurations in it has a flag: its name with dashes
(`--label-smoothing`), except that `batch_size` is --batch, and width and height are --size. A
preset gives the values that the flags then override.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from training.config import TrainConfig
from training.loader import CACHES
from training.presets import PRESETS, Preset, preset
from training.stepping import OPTIMIZERS
from yolov4_fast.commands.arguments import positive, size
from yolov4_fast.network.architectures import NAMES

DEFAULTS = TrainConfig()
DESCRIPTION = "Train a network on VOC, COCO or Darknet data."
NESTED = ("architecture", "loss", "augment", "validation")  # configurations within TrainConfig
FLAGS = {"batch_size": "--batch"}  # where the flag is not the field's name
PREFIX = "set_"  # of fields in the parsed arguments, which are there only where they were given


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m training.train", description=DESCRIPTION, allow_abbrev=False
    )
    _add_run(p)
    model = p.add_argument_group("model")
    model.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="start from a checkpoint or Darknet weights, also partial ones",
    )  # fmt: skip
    model.add_argument(
        "--size", type=size, metavar="N|WxH",
        help="input in pixels (default: 416; of a cfg by --preset cfg, its own)",
    )  # fmt: skip
    groups = {"": p.add_argument_group("training"), "architecture": model}
    groups |= {
        name: p.add_argument_group(title)
        for name, title in (
            ("loss", "loss"), ("augment", "augmentation"), ("validation", "validation"),
        )
    }  # fmt: skip
    for owner, item, kind in settings():
        if item.name not in ("width", "height"):
            add_setting(model if item.name == "model" else groups[owner], item, kind)
    return p


def _add_run(p: argparse.ArgumentParser) -> None:
    """What a run is given besides its configuration: none of it changes the weights it ends with,
    but the data and where it runs.
    """
    run = p.add_argument_group("run")
    run.add_argument(
        "--preset", choices=PRESETS, default=PRESETS[0],
        help="defaults of all that is set below: our own for small data (fast), those of "
        "em-1001's YOLOv4 (seed), of Darknet's yolov4.cfg (darknet), or of the training section "
        "of --model FILE.cfg (cfg); the defaults shown are those of fast (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--data", action="append", metavar="PATH",
        help="VOC folder, COCO folder or Darknet .data file; several are joined",
    )  # fmt: skip
    run.add_argument(
        "--val-data", action="append", metavar="PATH",
        help="what to validate on, where it is not another split of --data: VOC 07+12 is validated "
        "on VOC2007 alone",
    )  # fmt: skip
    add_running(run)
    run.add_argument("--output", type=Path, metavar="DIR", help="folder for checkpoints and logs")
    run.add_argument(
        "--val-every", type=positive, default=5, metavar="N",
        help="epochs between validations (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--save-every", type=minutes, default=10.0, metavar="MINUTES",
        help="between checkpoints within an epoch; 0: at its end only (default: %(default)g)",
    )  # fmt: skip
    run.add_argument(
        "--print-config", action="store_true",
        help="print the configuration that all of this sets, as JSON, and stop",
    )  # fmt: skip


def add_running(run: argparse._ArgumentGroup) -> None:
    """What every training of ours is given: its splits, and how and where it runs."""
    run.add_argument("--split", default="train", help="what to train on (default: %(default)s)")
    run.add_argument(
        "--val-split", default="val", help="what to validate on (default: %(default)s)"
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
        help="of the cache on disk, which other runs can use too (default: OUTPUT)",
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


def settings() -> list[tuple[str, Field[Any], Any]]:
    """Every field: the configuration within TrainConfig that it belongs to ("" for its own), the
    field, its type.
    """
    found = []
    for owner in ("", *NESTED):
        config = getattr(DEFAULTS, owner) if owner else DEFAULTS
        types = get_type_hints(type(config))
        found += [(owner, f, types[f.name]) for f in fields(config) if f.name not in NESTED]
    return found


def add_setting(group: argparse._ArgumentGroup, item: Field[Any], kind: Any) -> None:
    flag = FLAGS.get(item.name, "--" + item.name.replace("_", "-"))
    choices, text = item.metadata["choices"], item.metadata["help"].replace("%", "%%")
    if item.name == "model":
        text += f": {', '.join(NAMES)}"
    options: dict[str, Any] = {
        "dest": PREFIX + item.name,
        "default": argparse.SUPPRESS,
        "help": f"{text} (default: {_shown(item)})",
    }
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif choices:
        group.add_argument(flag, choices=choices, **options)
    else:
        convert, metavar = _reader(item.name, kind)
        group.add_argument(flag, type=convert, metavar=metavar, **options)


def _shown(item: Field[Any]) -> str:
    """The default of a setting as a flag would give it."""
    value = item.default
    if item.name in ("learning_rate", "weight_decay"):
        position = ("learning_rate", "weight_decay").index(item.name)
        return ", ".join(f"{usual[position]:g} for {o}" for o, usual in OPTIMIZERS.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ("", ()):
        return "none" if item.name in ("multi_scale", "scale_balance") else "as named"
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _reader(name: str, kind: Any) -> tuple[Callable[[str], Any], str]:
    """How a flag of this type reads its text, and what stands for the value in the help."""
    if name == "multi_scale":
        return widths, "LEAST-LARGEST"
    if kind == tuple[float, ...]:
        return numbers, "F,..."
    if kind is int:
        return whole, "N"
    if kind is float or float in get_args(kind):
        return number, "F"
    return str, {"anchors": "W,H,...|FILE"}.get(name, name.upper())


def configuration(arguments: argparse.Namespace) -> tuple[TrainConfig, tuple[str, ...]]:
    """What the preset and the flags set, and what of a cfg's training section is not honoured.

    Raises ValueError naming the first setting that cannot be.
    """
    given = {
        key.removeprefix(PREFIX): value
        for key, value in vars(arguments).items()
        if key.startswith(PREFIX)
    }
    if arguments.size:
        given["width"], given["height"] = arguments.size
    chosen: Preset = preset(arguments.preset, given.get("model"), arguments.size)
    config = chosen.config
    if given.get("optimizer", config.optimizer) != config.optimizer:
        rate, decay = OPTIMIZERS[given["optimizer"]]
        given = {"learning_rate": rate, "weight_decay": decay} | given
    if "epochs" in given:  # the preset's own length gives way
        given = {"max_batches": 0} | given
    changes: dict[str, dict[str, Any]] = {}
    for owner, item, _ in settings():
        if item.name in given:
            changes.setdefault(owner, {})[item.name] = given[item.name]
    top = changes.pop("", {})
    nested = {owner: replace(getattr(config, owner), **values) for owner, values in changes.items()}
    return replace(config, **top, **nested), chosen.notes


def count(text: str) -> int:
    """A whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them; none where the text is empty."""
    return tuple(number(part) for part in text.split(",")) if text else ()


def widths(text: str) -> tuple[int, ...]:
    """LEAST-LARGEST, in pixels; empty or "none": no such thing."""
    if text in ("", "none"):
        return ()
    parts = text.split("-")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LEAST-LARGEST in pixels, such as 320-608"
        )
    return int(parts[0]), int(parts[1])


def minutes(text: str) -> float:
    value = number(text)
    if not (isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes from 0 up")
    return value


def device(text: str) -> torch.device:
    """A device that torch has here."""
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises both for a missing backend
        reason = str(error).split(". ")[0]
        raise argparse.ArgumentTypeError(f"torch has no {text!r} here: {reason}") from None
    return chosen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; those that are wrong end the program, as argparse does."""
    p = parser()
    arguments = p.parse_args(argv)
    missing = [flag for flag in ("data", "output") if getattr(arguments, flag) is None]
    if missing and not arguments.print_config:
        p.error(f"the following arguments are required: {', '.join(f'--{m}' for m in missing)}")
    return arguments
