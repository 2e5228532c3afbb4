"""Flags of the commands that build a TensorRT plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov4_fast.commands.arguments import positive, size

if TYPE_CHECKING:
    from yolov4_fast.engines.tensorrt.options import TensorRtOptions

NO_CACHE = "none"

# What arguments are called -> what the options are called; None where a flag was not given.
FLAGS = {
    "min_batch": "min_batch",
    "opt_batch": "opt_batch",
    "min_size": "min_size",
    "opt_size": "opt_size",
    "max_size": "max_size",
    "workspace": "workspace_mb",
    "timing_cache": "timing_cache",
    "version_compatible": "version_compatible",
    "hardware_compatible": "hardware_compatible",
    "dla": "dla",
    "tf32": "tf32",
}


def add_tensorrt(parser: argparse.ArgumentParser, *, sizes: bool = False) -> None:
    """sizes: whether the plan may have an open height and width, as no engine of ours has."""
    group = parser.add_argument_group("TensorRT", "only for a plan of TensorRT")
    group.add_argument(
        "--min-batch", type=positive, metavar="N", help="least images of a run (default: 1)"
    )
    group.add_argument(
        "--opt-batch", type=positive, metavar="N",
        help="images of the runs that it is to be fastest at (default: as --max-batch)",
    )  # fmt: skip
    for name, what in (("min", "least"), ("opt", "usual"), ("max", "largest")) if sizes else ():
        group.add_argument(
            f"--{name}-size", type=size, metavar="N|WxH",
            help=f"{what} input size of a plan of several; all three sizes or none (default: "
            "only the model's size)",
        )  # fmt: skip
    group.add_argument(
        "--workspace", type=positive, metavar="MB",
        help="most scratch memory of a layer in MiB (default: what the GPU has)",
    )  # fmt: skip
    group.add_argument(
        "--timing-cache", type=_cache, metavar="FILE|none",
        help="where the times of kernels are kept for the next build (default: in the user's "
        "cache folder, by GPU and version)",
    )  # fmt: skip
    group.add_argument(
        "--version-compatible", action="store_true", default=None,
        help="the plan runs with later versions of TensorRT too; it may be slower",
    )  # fmt: skip
    group.add_argument(
        "--hardware-compatible", choices=("ampere-plus", "same-sm"),
        help="the plan runs on all GPUs from Ampere on, or on all of the same compute "
        "capability, and may be slower there (default: only on this model of GPU)",
    )  # fmt: skip
    group.add_argument(
        "--dla", type=_core, metavar="N",
        help="what can runs on the DLA core of this number, the rest on the GPU",
    )  # fmt: skip
    group.add_argument(
        "--tf32", action="store_true", default=None,
        help="f32 convolutions round what they read to 10 bits, which is faster",
    )  # fmt: skip


def tensorrt_options(
    arguments: argparse.Namespace, kind: str = "tensorrt"
) -> TensorRtOptions | None:
    """What the flags ask for; None where the engine is of another kind. Raises ValueError, also
    where a flag was given for another kind of engine.
    """
    given: dict[str, Any] = {
        option: value
        for flag, option in FLAGS.items()
        if (value := getattr(arguments, flag, None)) is not None
    }
    if kind != "tensorrt":
        if given:
            flags = {option: flag for flag, option in FLAGS.items()}
            names = ", ".join("--" + flags[option].replace("_", "-") for option in given)
            raise ValueError(f"{names}: only for --engine tensorrt, and the engine is {kind}")
        return None
    from yolov4_fast.engines.tensorrt.options import TensorRtOptions

    if given.get("timing_cache") == NO_CACHE:
        given["timing_cache"] = None
    return TensorRtOptions(**given)


def _cache(text: str) -> Path | str:
    return NO_CACHE if text == NO_CACHE else Path(text)


def _core(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a DLA core: 0, 1, ...")
    return int(text)
