"""The command line: `yolov4-fast detect | build | val | benchmark | info | export`.

A user's mistake ends with one line on standard error and exit status 2; a run that had to skip
something ends with 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from yolov4_fast.commands import benchmark, build, detect, export, info, val

COMMANDS = (detect, build, val, benchmark, info, export)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="yolov4-fast",
        description="YOLOv4 as an optimized inference engine: build an engine file, then detect.",
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    warnings.showwarning = _show_warning
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def entry() -> None:
    """The console script. A closed pipe (`| head`) is no error."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


if __name__ == "__main__":
    entry()
