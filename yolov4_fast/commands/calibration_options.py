"""Flags of the commands that quantise."""

from __future__ import annotations

import argparse

METHODS = ("entropy", "percentile", "minmax")  # of engines.quantize, which imports onnx


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The flags of `build` for precisions of 8 bits."""
    parser.add_argument(
        "--calibrate", metavar="DIR",
        help="for int8 and fp8: a folder of pictures like those it will see, or a data set as "
        "`val` takes it; of an annotated one the loss of AP is measured and told",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-method", choices=METHODS,
        help="for int8: how the largest value to keep is found for each tensor: entropy keeps its "
        "histogram most alike, percentile all but one value in 100,000, minmax all (default: "
        "percentile)",
    )  # fmt: skip
