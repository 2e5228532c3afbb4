"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from yolov4_fast.files import replacing


def size(text: str) -> tuple[int, int]:
    """`N` or `WxH` -> (width, height)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor WIDTHxHEIGHT")
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
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and what completes it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a .cfg, a training checkpoint (.safetensors), an official model's name (its weights "
        "are fetched and checked), or an architecture's name",
    )
    parser.add_argument("--weights", type=Path, help="Darknet .weights (or a checkpoint) for MODEL")
    parser.add_argument("--names", type=Path, help="file with one class name a line")
    parser.add_argument("--size", type=size, metavar="N|WxH", help="input size in pixels")
    parser.add_argument("--random", action="store_true", help="random weights, for speed tests")


def add_thresholds(parser: argparse.ArgumentParser, confidence: float, iou: float) -> None:
    parser.add_argument("--confidence", type=share, default=confidence, help="(%(default)s)")
    parser.add_argument("--iou", type=share, default=iou, help="NMS threshold (%(default)s)")
    parser.add_argument(
        "--resize",
        choices=("stretch", "letterbox"),
        help="how pictures are fitted to the input (default: as the engine was built)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON too")


def write_json(path: Path | None, value: Any) -> None:
    """Write atomically; nothing where no path was given."""
    if path is None:
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
