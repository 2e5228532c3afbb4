"""A classifier's training that was stopped goes on as if it had not been, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from drawn_classes import command_of, rows, tensors

from training.classify.examples import Batch
from training.classify.log import Log
from training.classify.trainer import ClassifierTrainer
from training.pretrain import main
from yolov4_fast.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def straight(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs of runs that nothing disturbed, by optimiser."""
    outputs = {}
    for optimizer in ("adamw", "sgd"):
        outputs[optimizer] = tmp_path_factory.mktemp("straight") / optimizer
        assert main([*command_of(pictures, outputs[optimizer]), "--optimizer", optimizer]) == 0
    return outputs


@pytest.mark.parametrize(
    ("optimizer", "moment"),
    [
        ("adamw", "after a step"), ("adamw", "before the checkpoint"),
        ("adamw", "after the checkpoint"), ("sgd", "after the checkpoint"),
    ],
)  # fmt: skip
def test_a_stopped_run_ends_with_the_same_bits(
    command: list[str],
    straight: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
    moment: str,
) -> None:
    command += ["--optimizer", optimizer]
    with monkeypatch.context() as patch:
        stop_at(patch, moment)
        assert main(command) == 130
    assert "go on with the same command and --resume" in capsys.readouterr().err
    written = read_checkpoint(tmp_path / "run/last.safetensors").metadata["progress"]
    assert written["epoch"] == (2 if moment == "after the checkpoint" else 1)
    assert main([*command, "--resume"]) == 0
    for file in ("last.safetensors", "best.safetensors"):
        whole = tensors(straight[optimizer] / file)
        resumed = tensors(tmp_path / "run" / file)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    kept = ("epoch", "step", "loss", "top1", "top5")
    whole, resumed = (
        [[row[key] for key in kept] for row in rows(output)]
        for output in (straight[optimizer], tmp_path / "run")
    )
    assert resumed == whole


def test_stopped_before_the_first_epoch_there_is_nothing_to_go_on_from(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", interrupted)
        assert main(command) == 130
    assert "before the first epoch was done" in capsys.readouterr().err
    assert main([*command, "--resume", "--epochs", "1"]) == 0  # begins, then


def test_a_best_checkpoint_that_is_gone_is_told_and_another_is_written(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "after the checkpoint")
        assert main(command) == 130
    best = tmp_path / "run/best.safetensors"
    best.unlink()
    assert main([*command, "--resume"]) == 0
    assert f"{best} is gone" in capsys.readouterr().out
    assert read_checkpoint(best).metadata["progress"]["best_epoch"] == 3


def test_going_on_needs_the_same_settings_and_pictures(
    command: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--epochs", "1"]) == 0
    assert main([*command, "--epochs", "1"]) == 2
    assert "already holds a run: give --resume" in capsys.readouterr().err
    for changes, words in (
        (["--epochs", "2"], "epochs was 1 and is now 2"),
        (["--epochs", "1", "--steps", "0.5,0.6"], "steps was [0.8, 0.9] and is now [0.5, 0.6]"),
        (["--epochs", "1", "--split", "val"], "had 5 steps per epoch, the pictures give 1"),
    ):
        assert main([*command, *changes, "--resume"]) == 2
        assert words in capsys.readouterr().err
    last = tmp_path / "run/last.safetensors"
    last.write_bytes((tmp_path / "run/best.safetensors").read_bytes())
    assert main([*command, "--epochs", "1", "--resume"]) == 2
    assert "is not the last checkpoint of a classifier's" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_killed_run_ends_with_the_same_bits(
    command: list[str], straight: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    last = tmp_path / "run/last.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "training.pretrain", *command, "--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # its workers too, as by a terminal
    _, told = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in told and told.count("interrupted") == 1
    assert main([*command, "--resume"]) == 0
    whole, resumed = tensors(straight["adamw"] / last.name), tensors(last)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def stop_at(patch: pytest.MonkeyPatch, moment: str) -> None:
    """Ctrl-C in the second epoch."""
    step, save = Log.step, ClassifierTrainer.save

    def stopping_step(log: Log, loss: float, batch: Batch) -> None:
        step(log, loss, batch)
        if log.trainer.progress.step == 8:
            raise KeyboardInterrupt

    def stopping_save(trainer: ClassifierTrainer, path: Path, *args: object, **kw: bool) -> None:
        second = trainer.progress.epoch == 2 and kw["resumable"]
        if second and moment == "before the checkpoint":
            raise KeyboardInterrupt
        save(trainer, path, *args, **kw)
        if second:
            raise KeyboardInterrupt

    if moment == "after a step":
        patch.setattr(Log, "step", stopping_step)
    else:
        patch.setattr(ClassifierTrainer, "save", stopping_save)
