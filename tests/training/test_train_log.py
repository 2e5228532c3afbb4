"""What a run tells while it trains: a live line on terminals, lines elsewhere, a row an epoch."""

import json
import sys

import pytest
import torch

from training.config import TrainConfig
from training.log import Log
from training.losses import Losses
from training.progress import Progress

LOSSES = Losses(*torch.tensor([6.0, 1.0, 2.0, 3.0]))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """`clock[0]` is the time."""
    now = [100.0]
    monkeypatch.setattr("training.log.time.perf_counter", lambda: now[0])
    return now


def begun(tmp_path, step: int = 0, epoch: int = 0) -> tuple[Log, Progress]:
    """Three epochs of four steps of eight images."""
    progress = Progress(step=step, epoch=epoch)
    log = Log(tmp_path / "log.jsonl", TrainConfig(batch_size=8), progress, 12, 4)
    log.begin_epoch()
    return log, progress


def test_speed_and_time_left(tmp_path, clock, capsys):
    log, progress = begun(tmp_path)
    for seconds, speed in ((2, 4), (4, 2), (2, 4), (2, 4)):
        clock[0] += seconds
        progress.add(LOSSES)
        assert log.step(LOSSES) == speed
    log.end_training()
    clock[0] += 30  # a validation
    means = progress.means()
    progress.end_epoch()
    log.end_epoch(means, None)
    # 32 images in 10 s of training; 40 s for 4 of 12 steps
    assert capsys.readouterr().out == (
        "epoch 1/3  loss 6.000 (box 1.000 objectness 2.000 classes 3.000)  "
        "3.2 images/s  1:20 left\n"
    )
    (row,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row == {
        "epoch": 1, "step": 4, "total": 6, "box": 1, "objectness": 2, "classes": 3,
        "images_per_second": 3.2,
    }  # fmt: skip


def test_hours_are_told(tmp_path, clock, capsys):
    log, progress = begun(tmp_path)
    clock[0] += 3000
    progress.step = 4
    log.end_epoch({}, None)
    assert "1:40:00 left" in capsys.readouterr().out


def test_means_are_of_the_whole_epoch_also_when_it_was_interrupted():
    progress = Progress()
    progress.add(LOSSES)
    again = Progress(**json.loads(json.dumps(progress.to_json())))
    again.add(Losses(*torch.tensor([2.0, 0.0, 1.0, 1.0])))
    assert again.means() == {"total": 4, "box": 0.5, "objectness": 1.5, "classes": 2}
    assert (again.step, again.epoch) == (2, 0)
    again.end_epoch()
    assert again.means() == {} and again.epoch == 1


def test_a_live_line_on_a_terminal(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log, progress = begun(tmp_path, step=5, epoch=1)
    clock[0] += 2
    progress.add(LOSSES)
    log.step(LOSSES)
    log.bar.refresh()
    log.end_training()
    told = capsys.readouterr()
    assert told.out == ""
    line = told.err.split("\r")
    assert any(
        "50%|" in part and "epoch 2/3  step 6/12  loss 6.000 (box 1.000" in part
        and "4.0 images/s  0:12 left" in part
        for part in line
    ), line  # fmt: skip


def test_a_line_a_minute_where_there_is_no_terminal(tmp_path, clock, capsys):
    log, progress = begun(tmp_path)
    for _ in range(4):
        clock[0] += 25
        progress.add(LOSSES)
        log.step(LOSSES)
    told = capsys.readouterr()
    assert told.err == ""
    (line,) = told.out.splitlines()
    assert line.startswith("epoch 1/3  step 3/12  loss 6.000") and line.endswith("3:45 left")


def test_rows_of_later_epochs_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    log, _ = begun(tmp_path, step=9, epoch=2)
    assert log.rows() == [{"epoch": 1}, {"epoch": 2}]
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
