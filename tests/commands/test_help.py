"""Help, the console script, and how it ends."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast.cli import COMMANDS, main, parser

SCRIPT = Path(sys.executable).with_name("yolov4-fast")


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def test_every_argument_is_explained() -> None:
    assert {command.__name__.rpartition(".")[2] for command in COMMANDS} == {
        "build", "detect", "val", "info", "export", "benchmark",
    }  # fmt: skip
    (subparsers,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in subparsers.choices.items():
        assert command.description
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"
            if action.default not in (None, False, argparse.SUPPRESS):
                assert "%(default)" in action.help, f"{name} {action.dest} hides its default"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["detect", "--help"]])
def test_help_and_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert "yolov4-fast" in capsys.readouterr().out


def test_the_console_script(files: Any) -> None:
    run = subprocess.run(
        [SCRIPT, "info", "nope.engine"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: no such engine file: nope.engine\n"


def test_a_reader_that_leaves_is_no_error(files: Any) -> None:
    with subprocess.Popen(
        [SCRIPT, "info", "mini.cfg", "--layers"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout and run.stderr
        run.stdout.close()  # as `| head` does, here before the first line comes
        assert run.stderr.read() == ""
    assert run.returncode == 0


def test_closed_streams(files: Any) -> None:
    command = f"'{SCRIPT}' info mini.cfg <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from yolov4_fast.cli import parser; parser().format_help(); "
        "heavy = {'torch', 'numpy', 'cv2', 'openvino', 'onnx'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
