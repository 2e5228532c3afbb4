"""Anchors for a data set: `python -m training.anchors --data VOC2007 --output anchors.json`.

Prints anchors that fit its objects, how well they do, and how well those of an architecture do;
writes them for `training.train --anchors`, and draws them. How they are found: `anchor_shapes`.

Boxes are measured as training sees them: stretched or letterboxed to the input; difficult and crowd
objects are left out, and those that would be thinner than 2 px.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.anchor_shapes import (
    RECALLS,
    RESTARTS,
    Anchors,
    find_anchors,
    measure,
    object_shapes,
)
from training.augment.pipeline import RESIZES
from training.options import count
from yolov4_fast.commands.arguments import check_output, positive, size, write_json
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.datasets import DatasetWarning, open_datasets
from yolov4_fast.files import replacing
from yolov4_fast.network.architectures import NAMES, by_name

SUFFIXES = (".json", ".txt", ".png")


def as_text(anchors: Anchors) -> str:
    """As a cfg has them: `12,16, 19,36, 40,28`."""
    return ", ".join(f"{width:g},{height:g}" for width, height in anchors)


def read_anchors(text: str | Path, size: tuple[int, int] | None = None) -> Anchors:
    """Anchors from pairs of numbers (`12,16, 19,36`), or from a .json or .txt file that this tool
    wrote.

    size: width and height of the input they are for; a .json file of another one is refused. Raises
    ValueError saying what is wrong, and OSError for a file that cannot be read.
    """
    name = str(text)
    if not name.endswith((".json", ".txt")):
        return _parse_pairs(name, "anchors")
    content = Path(name).read_text(encoding="utf-8")
    if name.endswith(".txt"):
        return _parse_pairs(content, name)
    try:
        record = json.loads(content)
        pairs, made_for = record["anchors"], (record["width"], record["height"])
        flat = " ".join(f"{width} {height}" for width, height in pairs)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name}: is not what `python -m training.anchors` writes") from None
    if size is not None and made_for != size:
        raise ValueError(
            f"{name}: holds anchors for {made_for[0]}x{made_for[1]}, not {size[0]}x{size[1]}; "
            f"run `python -m training.anchors` with --size {size[0]}x{size[1]}"
        )
    return _parse_pairs(flat, name)


def _parse_pairs(text: str, where: str) -> Anchors:
    words = text.strip().removeprefix("anchors").lstrip(" =").replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{where}: {text.strip()[:60]!r} is not a list of numbers") from None
    if not numbers or len(numbers) % 2:
        raise ValueError(f"{where}: {len(numbers)} numbers are no pairs of width and height")
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError(f"{where}: widths and heights must be positive, in {text.strip()[:60]!r}")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def network_anchors(model: str, height: int, width: int) -> Anchors:
    """Those that an architecture or a .cfg comes with."""
    network = (
        read_cfg(model)
        if model.endswith(".cfg")
        else by_name(model, num_classes=1, width=width, height=height)
    )
    return network.heads[0].all_anchors


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m training.anchors", description="Find anchors that fit a data set."
    )
    p.add_argument(
        "--data", required=True, action="append", metavar="PATH",
        help="VOC folder, COCO JSON or folder, Darknet .data file; may be given several times",
    )  # fmt: skip
    p.add_argument("--split", default="train", help="default: %(default)s")
    p.add_argument(
        "--size", type=size, default="416", metavar="N|WxH",
        help="network input in pixels (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--count", type=positive, default=9, help="anchors (default: %(default)s)")
    p.add_argument(
        "--resize", choices=RESIZES, default="stretch",
        help="how pictures are fitted to the input (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--model", default="yolov4-nano",
        help=f"whose anchors to compare with: a .cfg or {', '.join(NAMES)} (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--seed", type=count, default=0, help="of k-means (default: %(default)s)")
    p.add_argument(
        "--restarts", type=positive, default=RESTARTS, help="of k-means (default: %(default)s)"
    )
    p.add_argument(
        "--output", type=Path, nargs="+", default=[], metavar="FILE",
        help="write .json or .txt, which training.train takes as --anchors, or a plot as .png",
    )  # fmt: skip
    return p


def run(arguments: argparse.Namespace) -> None:
    width, height = arguments.size
    for path in arguments.output:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: an output ends in one of {', '.join(SUFFIXES)}")
        check_output(path)
    own = network_anchors(arguments.model, height, width)
    dataset = open_datasets(arguments.data, arguments.split)
    shapes = object_shapes(dataset, height, width, arguments.resize)
    anchors = find_anchors(
        shapes, arguments.count, seed=arguments.seed, restarts=arguments.restarts
    )
    fit = measure(shapes, anchors)
    name = f"{' + '.join(arguments.data)}, {dataset.split}"
    title = f"{name}: {len(shapes)} boxes at {width}x{height}"
    print(f"{title} ({len(dataset)} images; problems in the annotations: {len(dataset.problems)})")
    row = "{:26}" + "{:>17}" * (1 + len(RECALLS))
    print(row.format("", "average IoU", *(f"recall > {least:g}" for least in RECALLS)))
    for name, (average, recalls) in (
        (f"{len(anchors)} anchors found", fit),
        (f"{len(own)} of {arguments.model}", measure(shapes, own)),
    ):
        print(row.format(name, f"{average:.4f}", *(f"{recall:.4f}" for recall in recalls)))
    print(f'for training: --anchors "{as_text(anchors)}"')
    print(f"for a cfg:    anchors = {as_text(anchors)}")
    record = {
        "anchors": anchors,
        "width": width,
        "height": height,
        "resize": arguments.resize,
        "data": arguments.data,
        "split": dataset.split,
        "boxes": len(shapes),
        "average_iou": fit.average_iou,
        "best_recall": dict(zip(map(str, RECALLS), fit.recalls, strict=True)),
    }
    for path in arguments.output:
        write(path, anchors, shapes, record, title)


def write(
    path: Path, anchors: Anchors, shapes: np.ndarray, record: dict[str, Any], title: str
) -> None:
    """As the path's ending says: everything as JSON, the line as text, or the plot."""
    if path.suffix == ".json":
        write_json(path, record)
    elif path.suffix == ".txt":
        with replacing(path) as temporary:
            temporary.write_text(as_text(anchors) + "\n", encoding="utf-8")
    else:
        from training.anchor_plot import plot_anchors

        plot_anchors(path, shapes, anchors, title)
    print(path)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DatasetWarning)  # their number is printed
            run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
