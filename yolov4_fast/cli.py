"""The command line: `yolov4-fast detect | build | val | benchmark | info | export`.

A user's mistake ends with one line on standard error and exit status 2; a run that had to skip
something ends with 1. Only the command that runs imports what it needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from tqdm import tqdm

from yolov4_fast.commands import benchmark, build, detect, export, info, val

COMMANDS = (detect, build, val, benchmark, info, export)

EPILOG = """\
for example:
  yolov4-fast build yolov4-tiny -o tiny.engine
  yolov4-fast build my.cfg --weights my.weights --names my.names -o my.engine
  yolov4-fast detect my.engine photo.jpg holiday/ --save annotated --json found.json
  yolov4-fast val my.engine --data VOC2007 --split test

`yolov4-fast COMMAND --help` explains a command.
exit status: 0 done, 1 something was skipped, 2 a mistake (nothing written), 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="yolov4-fast",
        description="YOLOv4 as an optimized inference engine: build an engine file, then detect.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"yolov4-fast {_version()}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    return top


def _version() -> str:
    try:
        return version("yolov4_fast")
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Raises SystemExit where the arguments are wrong or ask for help."""
    arguments = parser().parse_args(argv)
    with _messages():
        try:
            return arguments.run(arguments)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            _say("error", _sentence(error))
            return 2
        except KeyboardInterrupt:
            _say("error", "interrupted")
            return 130


def _say(kind: str, message: object) -> None:
    """One line on standard error, not through the middle of a progress bar."""
    tqdm.write(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    """What to tell of an error; those of the system name their file first, as ours do."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.levelname.lower(), record.getMessage())


@contextmanager
def _messages() -> Iterator[None]:
    """Warnings and what the package logs, told as `warning: ...`, while a command runs."""
    logger = logging.getLogger("yolov4_fast")
    handler = _Handler(logging.WARNING)
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say("warning", message)
        try:
            yield
        finally:
            logger.removeHandler(handler)


def entry() -> NoReturn:
    """The console script. A closed pipe (`| head`) is no error."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # our own messages say what went wrong
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


if __name__ == "__main__":
    entry()
