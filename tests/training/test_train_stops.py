"""Stopping a run: Ctrl-C and SIGTERM once and twice, and losses that are not finite."""

import os
import re
import shlex
import signal
import time

import pytest
import torch
from run_results import assert_same_run, last_step
from safetensors import safe_open

from training.interrupts import Interrupts
from training.train import main
from training.trainer import Trainer
from yolov4_fast.checkpoint import read_checkpoint

LONG = ("--epochs", "400", "--val-every", "1000")


def log_rows(tmp_path) -> int:
    log = tmp_path / "run/log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(command, tmp_path, start, number):
    child = start([*command, *LONG])
    child.wait_for(lambda: log_rows(tmp_path) >= 2)
    os.kill(child.pid, number)
    assert child.wait() == 130
    step = last_step(tmp_path / "run")
    assert 6 <= step < 1200
    told = re.search(r"stopped after step (\d+) of 1200, saved in .*last\.safetensors", child.text)
    assert told and int(told[1]) == step, child.text
    assert child.text.rstrip().endswith("--resume")


def test_ctrl_c_in_a_terminal_reaches_the_workers_too(command, tmp_path, start):
    """Who still have to prepare what the step under way waits for."""
    child = start([*command, *LONG, "--workers", "2"])
    child.wait_for(lambda: log_rows(tmp_path) >= 2)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait() == 130
    assert "stopped after step" in child.text and "Traceback" not in child.text


def test_the_command_that_it_names_goes_on(command, tmp_path, start, monkeypatch):
    """And ends with the bits of a run that was not stopped."""
    child = start([*command, "--epochs", "12"])
    child.wait_for(lambda: log_rows(tmp_path) >= 2)
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    words = shlex.split(child.text.splitlines()[-1])
    assert words[:3] == ["python", "-m", "training.train"]
    assert start(words[3:]).wait() == 0
    straight = [*command, "--epochs", "12"]
    straight[straight.index("--output") + 1] = str(tmp_path / "straight")
    assert start(straight).wait() == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_second_signal_stops_at_once(command, tmp_path, monkeypatch, capsys):
    """Even in the middle of a step; what was saved before stays."""
    original = Trainer.train_step

    def twice(self, batch):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr("training.interrupts.SAME", 0.0)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            raise AssertionError("the second signal did not stop the step")
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", twice)
    assert main(command) == 130
    assert last_step(tmp_path / "run") == 3
    told = capsys.readouterr().err
    assert "stopping after this step; again to stop at once" in told
    assert "last.safetensors holds the run up to its last save; go on with:" in told


def test_a_signal_while_validating_is_obeyed_at_once(command, tmp_path, monkeypatch, capsys):
    """The steps of the epoch are saved, and the validation is made when the run goes on."""

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        raise AssertionError("the validation was not stopped")

    with monkeypatch.context() as patch:
        patch.setattr("training.run.validate", interrupted)
        assert main(command) == 130
    assert "stopped after step 6 of 12" in capsys.readouterr().err
    progress = read_checkpoint(tmp_path / "run/last.safetensors").metadata["progress"]
    assert (progress["step"], progress["epoch"]) == (6, 1)
    assert main([*command, "--resume"]) == 0


def test_a_signal_before_anything_was_saved(command, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    monkeypatch.setattr("training.train.open_datasets", interrupted)
    assert main(command) == 130
    assert "interrupted, nothing saved; go on with:" in capsys.readouterr().err


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_repeated_signal_within_a_moment_counts_once():
    """torchrun passes on what the terminal has sent already."""
    with Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupts.requested


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_diverging_loss_stops_and_keeps_the_batch(
    command, tmp_path, monkeypatch, capsys, workers
):
    """Without touching the checkpoints of before."""
    original, seen = Trainer.train_step, []

    def poisoned(self, batch):
        seen.append(batch)
        if self.step == 7:
            with torch.no_grad():
                next(self.module.parameters()).mul_(torch.inf)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    assert main([*command, "--workers", workers]) == 2
    told = capsys.readouterr().err
    path = tmp_path / "run/diverged-at-step-7.safetensors"
    assert re.search(r"error: the loss became (nan|inf) at step 7; a lower learning rate", told)
    assert str(path) in told and "Traceback" not in told
    assert last_step(tmp_path / "run") == 6
    assert all(
        torch.isfinite(value).all()
        for value in read_checkpoint(tmp_path / "run/last.safetensors").state.values()
    )
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("images"), seen[-1].images)
        assert torch.equal(file.get_tensor("targets"), seen[-1].targets)
        assert file.get_tensor("step") == 7
        assert not torch.isfinite(file.get_tensor("losses")[0])
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 3


def test_too_large_a_learning_rate_stops_with_advice(command, tmp_path, capsys):
    assert main([*command, "--learning-rate", "1e30"]) == 2
    assert "lower learning rate than 1e+30" in capsys.readouterr().err
    assert list((tmp_path / "run").glob("diverged-at-step-*.safetensors"))
