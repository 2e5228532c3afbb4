"""`python -m training.pretrain` on drawn pictures of three classes, at a sixteenth of the width."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from drawn_classes import CLASSES, draw, rows, tensors

from training.classify.options import parser
from training.distributed import Processes
from training.pretrain import Run, main
from yolov4_fast.checkpoint import read_checkpoint, read_resume
from yolov4_fast.cli import main as yolov4_fast


@pytest.mark.slow
def test_three_classes_are_learnt(command: list[str], tmp_path: Path) -> None:
    command[command.index("--epochs") + 1] = "24"
    settings = ["--learning-rate", "4e-3", "--ema-decay", "0.9", "--crop", "0.6"]
    assert main([*command, *settings]) == 0
    found = rows(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["top1"] > 0.65  # chance is 0.33


def test_a_run_writes_checkpoints_and_a_log(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    best = read_checkpoint(tmp_path / "run/best.safetensors")
    assert best.class_names == CLASSES
    assert len(best.network.layers) == 105 and not best.network.heads
    assert (best.network.width, best.network.height) == (64, 64)
    assert best.state["classifier.weight"].shape == (3, 64)
    assert not read_resume(tmp_path / "run/best.safetensors")
    found = rows(tmp_path / "run")
    assert [row["epoch"] for row in found] == [1, 2, 3] and found[-1]["step"] == 15
    assert best.metadata["top1"] == max(row["top1"] for row in found)
    assert all(0 <= row["top1"] <= row["top5"] == 1 for row in found)
    assert list((tmp_path / "run/tensorboard").iterdir())
    told = capsys.readouterr().out
    assert "train: 120 pictures, 40 to 40 of a class" in told
    assert f"best top-1 {best.metadata['top1']:.4f}" in told


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(
    command: list[str], darknet_reference: Path, tmp_path: Path
) -> None:
    """Pictures, statistics of normalisation, averages and accuracy are those of the whole batch."""
    at = command.index("--width-multiple")
    del command[at : at + 2]
    model = ["--model", str(darknet_reference / "mini.cfg"), "--dropblock", "0", "--epochs", "2"]
    plain = ["--optimizer", "sgd", "--ema-decay", "0.9"]  # Adam makes 1 of the sign of rounding
    command += [*model, *plain]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "training.pretrain", *command],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "best top-1" in told[0] and told[1] == ""
    one, two = (read_checkpoint(tmp_path / run / "last.safetensors") for run in ("one", "run"))
    for key in one.state:
        torch.testing.assert_close(two.state[key], one.state[key], rtol=1e-3, atol=1e-4, msg=key)
    straight, shared = rows(tmp_path / "one"), rows(tmp_path / "run")
    for first, second in zip(straight, shared, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["top1"] == pytest.approx(first["top1"], abs=1 / 36 + 1e-9)


def test_a_file_in_the_outputs_place_is_told_before_pictures_are_read(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("training.pretrain.Pictures", None)
    (tmp_path / "run").write_text("notes")
    assert main(command) == 2
    assert f"error: {tmp_path / 'run'}: is a file, not a folder" in capsys.readouterr().err


def test_a_batch_that_does_not_split_among_processes(command: list[str]) -> None:
    arguments = parser().parse_args([*command, "--batch", "25"])
    with pytest.raises(ValueError, match="a batch of 25 does not split among 2 processes"):
        Run(arguments, Processes(torch.device("cpu"), 0, 2))


class TestMistakes:
    def test_a_diverging_run_stops_with_advice(
        self, command: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        rate = ["--learning-rate", "1e30", "--clip-gradient", "0", "--warmup-epochs", "0"]
        assert main([*command, *rate]) == 2
        assert "a lower learning rate than 1e+30 is the usual remedy" in capsys.readouterr().err

    def test_pictures_that_cannot_be_decoded_are_counted_and_named(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for kind, name in enumerate(CLASSES):
                (tmp_path / "data" / split / name).mkdir(parents=True)
                for number in range(4):
                    file = tmp_path / "data" / split / name / f"{number}.jpg"
                    cv2.imwrite(str(file), draw(kind, rng))
        (tmp_path / "data/train/frame/2.jpg").write_bytes(b"no picture")
        (tmp_path / "data/val/frame/2.jpg").write_bytes(b"no picture")
        command += ["--data", str(tmp_path / "data"), "--batch", "12", "--epochs", "1"]
        for cache in ("memory", "none"):
            output = tmp_path / cache
            assert main([*command, "--output", str(output), "--cache", cache]) == 0
            told = capsys.readouterr()
            assert "train/frame/2.jpg: cannot be decoded" in told.err
            assert told.err.count("cannot be decoded") == 2
            assert "val/frame/2.jpg: cannot be decoded" in told.err
            assert "  2 cannot be decoded" in told.out
        by_memory, by_none = (
            tensors(tmp_path / c / "last.safetensors") for c in ("memory", "none")
        )
        assert all(torch.equal(by_memory[key], by_none[key]) for key in by_memory)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--batch", "121"], "120 pictures do not fill one batch of 121"),
            (["--size", "60"], "60 does not fit|width must be|multiples of 32"),
            (["--size", "72"], "multiples of 32"),
            (["--model", "yolov4-nano"], "yolov4-nano takes no 'width_multiple'"),
            (["--model", "nothing"], "no architecture is called 'nothing'"),
            (["--model", "a.cfg"], "a.cfg: width_multiple is for architectures by name"),
            (["--data", "/nowhere"], "there is no folder /nowhere/train"),
            (["--cutmix", "0.8"], "add up to more than 1"),
            (["--crop", "2"], "crop must be above 0 and at most 1"),
            (["--model", "yolov3-tiny"], "no place for DropBlock"),
        ],
    )
    def test_one_clear_error(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
        options: list[str], words: str,
    ) -> None:  # fmt: skip
        assert main([*command, *options]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1 and re.search(words, told)
        assert not (tmp_path / "run").exists()

    def test_one_class_is_none(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "data/train/only").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "data/train/only/0.png"), np.zeros((9, 9, 3), np.uint8))
        assert main([*command, "--data", str(tmp_path / "data")]) == 2
        assert "holds the class 'only' alone" in capsys.readouterr().err

    def test_a_classifier_cannot_be_built_into_an_engine(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*command, "--epochs", "1"]) == 0
        best = str(tmp_path / "run/best.safetensors")
        capsys.readouterr()
        assert yolov4_fast(["build", best, "-o", str(tmp_path / "a.engine")]) == 2
        told = capsys.readouterr().err
        assert told == f"error: {best}: has no [yolo] head, so it cannot detect\n"
        assert not (tmp_path / "a.engine").exists()
