"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov4_fast.files import replacing

if TYPE_CHECKING:
    from yolov4_fast.model import Model


def size(text: str) -> tuple[int, int]:
    """`N` or `WxH` -> (width, height)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor WIDTHxHEIGHT in pixels")
    return int(parts[0]), int(parts[-1])


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and what completes it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Darknet .cfg (with --weights), a training checkpoint (.safetensors), the name of "
        "an official model (yolov4, yolov4-tiny: its weights are fetched once and checked), or the "
        "name of an architecture (such as yolov4-nano, with --weights or --random)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="Darknet .weights for MODEL, or a checkpoint of the same network",
    )  # fmt: skip
    parser.add_argument(
        "--names", type=Path, metavar="FILE",
        help="class names, one a line (default: the checkpoint's; COCO's for 80 classes; "
        "else class_0, class_1, ...)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=size, metavar="N|WxH",
        help="input size in pixels, such as 416 or 640x384: multiples of the network's largest "
        "stride, usually 32 (default: the model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--random", action="store_true", help="random weights, which find nothing: for speed tests"
    )


def named_model(arguments: argparse.Namespace) -> Model:
    """The model that `add_model`'s arguments name; prints what had to be assumed."""
    from yolov4_fast.model import open_model

    model = open_model(
        arguments.model,
        weights=arguments.weights,
        names=arguments.names,
        size=arguments.size,
        random=arguments.random,
    )
    for note in model.notes:
        print(f"note: {note}")
    return model


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine", metavar="ENGINE", help="an engine file, made by `yolov4-fast build`"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        help="where the engine runs: cpu, or for a cuda or torch engine a GPU such as cuda:1 "
        "(default: the first GPU for a cuda engine, else cpu)",
    )


def add_thresholds(parser: argparse.ArgumentParser, confidence: float | None = None) -> None:
    """confidence: what the command takes where none is given; None for what the engine has."""
    own = "default: as the engine was built,"
    parser.add_argument(
        "--confidence", type=share, default=confidence, metavar="F",
        help="least score of a detection, 0 to 1 "
        + (f"({own} 0.25)" if confidence is None else "(default: %(default)s)"),
    )  # fmt: skip
    parser.add_argument(
        "--iou", type=share, metavar="F",
        help="of two boxes of one class that overlap by more than this, 0 to 1, the lesser is "
        f"dropped ({own} 0.45)",
    )  # fmt: skip
    parser.add_argument(
        "--resize", choices=("stretch", "letterbox"),
        help="how a picture is fitted to the input: stretched, or with its proportions kept and "
        f"grey bars ({own} which is as the model was trained)",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results as JSON for programs too"
    )


def check_output(path: Path | None, *inputs: object) -> None:
    """Raise ValueError where a file could not be written, or is one of the inputs.

    Called before the work, which may be long. What only shows while writing shows then.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not an ordinary file, and would be replaced by one")
    if path.exists() and any(
        Path(str(given)).exists() and path.samefile(str(given)) for given in inputs
    ):
        raise ValueError(f"{path}: is read by this command too; choose another output")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise ValueError where files could not be written in a folder, there already or not."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing}: is a file, not a folder to write in")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing}: this folder cannot be written to")


def write_json(path: Path | None, value: Any) -> None:
    """Write atomically; nothing where no path was given."""
    if path is None:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
