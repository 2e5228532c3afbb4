"""Every mistake of a user: one line that names it, status 2, nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast.cli import main

MINI = ["mini.cfg", "--weights", "mini.weights"]
OUT = ["-o", "x.engine"]
WIDE = ["wide.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "COMMAND"),
        (["find"], "invalid choice: 'find'"),
        (["build", "nope.cfg", *OUT], "nope.cfg: No such file"),
        (["build", "nope.safetensors", *OUT], "nope.safetensors: there is no such checkpoint"),
        (["build", "mini.cfg", *OUT], "mini.cfg: has no weights of its own"),
        (["build", "mini.cfg", "--weights", "nope.weights", *OUT], "nope.weights: No such file"),
        (
            ["build", "mini.cfg", "--weights", "short.weights", *OUT],
            "108,928 floats are expected after the header, but 50,000 were found",
        ),
        (["build", "mini.cfg", "--weights", "nan.weights", *OUT], "NaN or infinity"),
        (["build", "mini.cfg", "--weights", "mini.engine", *OUT], "mini.engine: does not begin"),
        (["build", "typo.cfg", "--weights", "mini.weights", *OUT], "did you mean [maxpool]?"),
        (["build", "wide.png", *OUT], "wide.png: a model is a .cfg"),
        (["build", "mini.engine", *OUT], "mini.engine: is an engine file"),
        (["build", "mini.weights", *OUT], "give MODEL.cfg --weights mini.weights"),
        (["build", "empty", *OUT], "empty: is a folder"),
        (["build", "yolov9", *OUT], "there are yolov4, yolov4-tiny"),
        (["build", "yolov4-nano", *OUT], "--random"),
        (["build", *MINI, "--random", *OUT], "--random makes weights up"),
        (["build", "mini.safetensors", "--weights", "mini.weights", *OUT], "its own weights"),
        (["build", *MINI, "--names", "two.names", *OUT], "2 names for a network of 3 classes"),
        (["build", *MINI, "--names", "mini.weights", *OUT], "one class name a line"),
        (["build", *MINI, "--names", "mini.names", "--size", "100", *OUT], "multiples of 16"),
        (["build", *MINI, "--size", "0", *OUT], "'0' is neither N nor WIDTHxHEIGHT"),
        (["build", *MINI, "--size", "64x64x3", *OUT], "'64x64x3' is neither"),
        (["build", *MINI, "--max-batch", "0", *OUT], "'0' is not a whole number from 1 up"),
        (["build", *MINI, "--engine", "warp", *OUT], "there are openvino, torch"),
        (["build", *MINI, "--engine", "torch", "--precision", "f8", *OUT], "no precision 'f8'"),
        (["build", *MINI], "-o/--output"),
        (["build", *MINI, "-o", "empty"], "empty: is a folder"),
        (["build", *MINI, "-o", "two.names/x.engine"], "two.names: is a file, not a folder"),
        (["build", *MINI, "-o", "mini.weights"], "mini.weights: is read by this command too"),
        (["build", *MINI, *OUT, "--json", "/dev/null"], "/dev/null: is not an ordinary file"),
        (["detect", "nope.engine", *WIDE], "nope.engine"),
        (["detect", "cut.engine", *WIDE], "cut.engine: is cut short"),
        (["detect", "flipped.engine", *WIDE], "flipped.engine: model.onnx is damaged"),
        (["detect", "newer.engine", *WIDE], "is of engine format 99"),
        (["detect", "mini.safetensors", *WIDE], "not an engine file; make one"),
        (["detect", "mini.engine", "nope.png"], "nope.png"),
        (["detect", "mini.engine", "*.gif"], "*.gif"),
        (["detect", "mini.engine", "empty"], "no images or videos in the folder empty"),
        (["detect", "mini.engine", *WIDE, "--confidence", "nan"], "'nan' is not a number from 0"),
        (["detect", "mini.engine", *WIDE, "--iou", "-0.1"], "'-0.1' is not a number from 0 to 1"),
        (["detect", "mini.engine", *WIDE, "--resize", "crop"], "'crop'"),
        (["detect", "mini.engine", *WIDE, "--device", "warp"], "not on 'warp'"),
        (["detect", "torch.engine", *WIDE, "--device", "warp"], "no device 'warp'"),
        (["detect", "mini.engine", *WIDE, "--save", "two.names"], "two.names: is a file"),
        (["detect", "mini.engine", *WIDE, "--save", "."], "wide.png lies there"),
        (["detect", "mini.engine", *WIDE, "--json", "two.names/x.json"], "two.names: is a file"),
        (["detect", "mini.engine", *WIDE, "--json", "wide.png"], "wide.png: is read by"),
        (["info", "nope"], "no model is called 'nope'"),
        (["info", "cut.engine"], "cut.engine: is cut short"),
        (["info", "flipped.engine"], "flipped.engine: model.onnx is damaged"),
        (["export", *MINI, "--format", "onnx", "-o", "x.cfg"], "ends in .onnx"),
        (["export", *MINI, "--format", "darknet", "-o", "mini.cfg"], "is read by this command"),
        (["export", "mini.engine", "--format", "onnx", "-o", "x.onnx"], "is an engine file"),
        (["benchmark", "mini.engine", "--batch", "3"], "build it with --max-batch 3"),
        (["benchmark", "mini.engine", "--size", "50"], "multiples of 16"),
        (["benchmark", "mini.engine", "--image", "nope.png"], "nope.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words: list[str], told: str, refused: Callable[..., str]) -> None:
    assert told in refused(*words)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it all")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, refused: Callable[..., str]) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to" in refused("build", *MINI, "-o", str(tmp_path / "x.engine"))


def test_an_official_model_from_a_mirror_without_it(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("YOLOV4_FAST_WEIGHTS_URL", "ftp://example.org")
    assert "ftp://example.org" in refused("build", "yolov4-tiny", *OUT)
    assert not list(tmp_path.iterdir())


def test_a_warning_is_one_line(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Path("odd.cfg")
    cfg.write_text(
        Path("mini.cfg").read_text().replace("[maxpool]", "[maxpool]\nstopbackward=1", 1)
    )
    try:
        assert main(["info", str(cfg)]) == 0
    finally:
        cfg.unlink()
    error = capsys.readouterr().err
    assert error.startswith("warning: odd.cfg: ignored") and "stopbackward" in error
    assert error.count("\n") == 1 and ".py" not in error
