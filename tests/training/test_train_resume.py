"""Going on with a run: the same bits as one that was never stopped."""

import shutil

import pytest
import torch
from run_results import CLASSES, EVERYTHING, assert_same_run, last_step, rows

import training.run
from training.resume import save
from training.run import Run
from training.train import main
from training.trainer import Trainer
from yolov4_fast.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_resume,
    write_checkpoint,
)
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.network.module import NetworkModule


class Stop(Exception):
    """As if the process had been killed: nobody catches it."""


def to(output, command: list[str]) -> list[str]:
    command = list(command)
    command[command.index("--output") + 1] = str(output)
    return command


def stopped_at(step: int, command: list[str], monkeypatch) -> None:
    """Run up to the middle of a step, when the one before has been saved."""
    original = Trainer.train_step

    def until(self, batch):
        if self.step == step:
            raise Stop
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", until)
        with pytest.raises(Stop):
            main([*command, "--save-every", "1e-9"])


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_after_an_epoch(command, tmp_path, monkeypatch, optimizer):
    command += ["--optimizer", optimizer]
    assert main(command) == 0
    stopped = to(tmp_path / "stopped", command)
    stopped_at(6, stopped, monkeypatch)
    assert main([*stopped, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_within_epochs_with_everything_on(command, tmp_path, monkeypatch, workers):
    command += [*EVERYTHING, "--workers", workers]
    assert main(command) == 0
    stopped = to(tmp_path / "stopped", command)
    for step in (2, 4, 8, 11):
        stopped_at(step, [*stopped, "--resume"], monkeypatch)
        assert last_step(tmp_path / "stopped") == step
    assert main([*stopped, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_between_best_and_last(command, tmp_path, monkeypatch):
    """What was written for a validation that `last` does not know of is written again."""
    assert main(command) == 0
    stopped = to(tmp_path / "stopped", command)

    def only_best(path, trainer, names, progress, *values, **options):
        if progress.epoch == 2 and options["resumable"]:
            raise Stop
        save(path, trainer, names, progress, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.run, "save", only_best)
        with pytest.raises(Stop):
            main(stopped)
    assert [row["epoch"] for row in rows(tmp_path / "stopped")] == [1, 2]
    assert read_checkpoint(tmp_path / "stopped/best.safetensors").metadata["progress"]["epoch"] == 2
    assert last_step(tmp_path / "stopped") == 3
    assert main([*stopped, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_before_the_validation_of_an_epoch(command, tmp_path, monkeypatch):
    """All its steps are done: only the validation is."""
    assert main(command) == 0
    stopped = to(tmp_path / "stopped", command)

    def saved_and_killed(self):
        self._save("last.safetensors", None, resumable=True)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_validate", saved_and_killed)
        with pytest.raises(Stop):
            main(stopped)
    assert last_step(tmp_path / "stopped") == 6
    assert main([*stopped, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_before_the_first_checkpoint(command, tmp_path, monkeypatch, capsys):
    assert main(command) == 0
    stopped = to(tmp_path / "stopped", command)
    stopped_at(0, stopped, monkeypatch)
    (tmp_path / "stopped/log.jsonl").write_text('{"epoch": 9, "step": 1}\n')
    assert main([*stopped, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "stopped/last.safetensors is not there: the run begins at its beginning" in told
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_a_row_that_was_being_written_is_dropped(command, tmp_path, monkeypatch):
    stopped_at(7, command, monkeypatch)
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text() + '{"epoch": 3, "st')
    assert main([*command, "--resume"]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_tensorboard_has_no_step_twice(command, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_is_time_to_save", lambda self: self.progress.step == 4)
        stopped_at(5, command, monkeypatch)
    assert last_step(tmp_path / "run") == 4  # and step 5 was written to TensorBoard
    assert main([*command, "--resume"]) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("loss/total")]
    assert steps == list(range(1, 13))
    assert [event.step for event in events.Scalars("val/mAP50")] == [6, 12]


def test_a_finished_run_has_nothing_left_to_do(command, tmp_path):
    assert main(command) == 0
    before = read_resume(tmp_path / "run/last.safetensors")
    assert main([*command, "--resume"]) == 0
    after = read_resume(tmp_path / "run/last.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_without_the_best_checkpoint_another_is_written(command, tmp_path, monkeypatch, capsys):
    command += ["--epochs", "2", "--val-every", "1"]
    stopped_at(4, command, monkeypatch)
    best = tmp_path / "run/best.safetensors"
    best.unlink()
    assert main([*command, "--resume"]) == 0
    assert f"{best} is gone" in capsys.readouterr().out
    assert read_checkpoint(best).metadata["progress"]["best_epoch"] == 2


def test_a_checkpoint_from_before_there_were_more_settings(command, tmp_path, monkeypatch):
    """Absent settings had their defaults, and absent sums of losses begin anew."""
    assert main(command) == 0
    stopped = to(tmp_path / "stopped", command)
    stopped_at(6, stopped, monkeypatch)
    path = tmp_path / "stopped/last.safetensors"
    whole = read_checkpoint(path)
    config, progress = whole.metadata["config"], whole.metadata["progress"]
    for name in ("validation", "architecture", "subdivisions", "steps", "nesterov"):
        del config[name]
    for name in ("sums", "summed"):
        del progress[name]
    write_checkpoint(
        path, whole.network, whole.state, whole.class_names, whole.metadata,
        resume=read_resume(path),
    )  # fmt: skip
    assert main([*stopped, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "stopped")


def test_a_best_checkpoint_cannot_be_resumed(command, tmp_path, capsys):
    assert main(command) == 0
    (tmp_path / "run/best.safetensors").replace(tmp_path / "run/last.safetensors")
    assert main([*command, "--resume"]) == 2
    assert "holds no optimiser state; give it as --weights instead" in capsys.readouterr().err


def test_other_data_are_refused(command, scenes, tmp_path, capsys):
    assert main(command) == 0
    assert main([*command, "--split", "val", "--batch", "2", "--resume"]) == 2
    assert "batch_size was 8 and is now 2" in capsys.readouterr().err
    shutil.copytree(scenes, tmp_path / "more")
    assert main([*command, "--data", str(tmp_path / "more"), "--resume"]) == 2
    assert "had 3 steps per epoch, the data give 6 now" in capsys.readouterr().err


def test_checkpoints_say_what_is_wrong_with_them(darknet_reference, tmp_path):
    network = read_cfg(darknet_reference / "mini.cfg")
    state = NetworkModule(network).state_dict()
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, network, state, CLASSES, {"note": [1, 2]}, dtype=torch.float16)
    back = read_checkpoint(path)
    assert back.network == network and back.metadata == {"note": [1, 2]}
    assert back.state["layers.0.conv.weight"].dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "b.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    write_checkpoint(path, network, state, CLASSES[:2])
    with pytest.raises(CheckpointError, match="names 2 classes, its network has 3"):
        read_checkpoint(path)
    for name in ("metadata", "version"):
        write_checkpoint(path, network, state, CLASSES)
        path.write_bytes(
            path.read_bytes().replace(f'"{name}"'.encode(), f'"{name[:-1]}X"'.encode())
        )
        with pytest.raises(CheckpointError, match=f"its header has no sound {name}"):
            read_checkpoint(path)
    broken = state | {"layers.0.bn.bias": torch.full((16,), float("nan"))}
    write_checkpoint(path, network, broken, CLASSES)
    with pytest.raises(CheckpointError, match=r"layers\.0\.bn\.bias holds NaN or infinity"):
        read_checkpoint(path)
    state.pop("layers.0.bn.bias")
    write_checkpoint(path, network, state, CLASSES)
    with pytest.raises(CheckpointError, match=r"layers\.0\.bn\.bias should be of shape \(16,\)"):
        read_checkpoint(path)
