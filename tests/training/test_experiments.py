"""`python -m training.experiments` on a few drawn scenes, with the small network of the tests."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from training import experiments, subprocesses
from training.experiment_rows import ROWS, TITLES, make_run
from training.experiment_tables import caption, cell, markdown
from training.experiments import main, sizes_in_proportion
from training.shapes import write_dataset
from training.subprocesses import INTERRUPTED, Trainings, held
from yolov4_fast.checkpoint import read_checkpoint
from yolov4_fast.datasets import open_dataset
from yolov4_fast.detector import Detector
from yolov4_fast.engines.build import build_engine
from yolov4_fast.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments") / "drawn"
    write_dataset(folder, {"train": 16, "val": 6}, 128, 160, seed=5)
    return folder


@pytest.fixture
def cfg(darknet_reference: Path, tmp_path: Path) -> Path:
    """The small network for the eight classes of the scenes."""
    text = (darknet_reference / "mini.cfg").read_text()
    path = tmp_path / "mini8.cfg"
    path.write_text(
        text.replace("classes=3", "classes=8").replace("filters=24\na", "filters=39\na")
    )
    return path


@pytest.fixture
def flags(data: Path, cfg: Path) -> list[str]:
    """Of training.train."""
    return [
        "--data", str(data), "--model", str(cfg), "--size", "160x128", "--epochs", "1",
        "--batch", "8", "--workers", "0", "--device", "cpu", "--warmup-epochs", "0",
        "--learning-rate", "3e-3", "--ema-decay", "0", "--mosaic-off-epochs", "0",
    ]  # fmt: skip


@pytest.fixture
def command(flags: list[str], tmp_path: Path) -> list[str]:
    return [*flags, "--output", str(tmp_path / "runs"), "--sizes", "96,160", "--rows", "sse,ciou"]


class TestRows:
    @pytest.mark.parametrize(
        ("name", "box_loss", "schedule", "mosaic"),
        [
            ("sse", "sse", "steps", 0.0),
            ("giou", "giou", "steps", 0.0),
            ("diou", "diou", "steps", 0.0),
            ("ciou", "ciou", "steps", 0.0),
            ("siou", "siou", "steps", 0.0),
            ("ciou-ca", "ciou", "cosine", 0.0),
            ("ciou-ca-m", "ciou", "cosine", 0.5),
        ],
    )
    @pytest.mark.parametrize("preset", ["fast", "seed"])
    def test_differ_in_their_flags_only(self, flags, name, box_loss, schedule, mosaic, preset):
        given = [*flags, "--preset", preset]
        row = next(row for row in ROWS if row.name == name)
        config = make_run(row, None, Path("runs"), given).config
        assert config.loss.box_loss == box_loss
        assert config.schedule == schedule
        assert config.augment.mosaic == mosaic
        if schedule == "steps":  # 1e-4, 5e-5, 1e-5
            assert config.steps == (0.3, 0.5)
            assert config.scales == (0.5, 0.2)
        first = make_run(ROWS[0], None, Path("runs"), given).config
        assert first == replace(
            config,
            loss=replace(config.loss, box_loss="sse"),
            augment=replace(config.augment, mosaic=0.0),
            schedule="steps",
            steps=(0.3, 0.5),
            scales=(0.5, 0.2),
        )

    def test_all_of_the_seed_are_there_in_its_order(self):
        assert list(TITLES.values()) == [
            "CSP (SSE)", "CSP + GIoU", "CSP + DIoU", "CSP + CIoU", "CSP + SIoU",
            "CSP + CIoU + CA", "CSP + CIoU + CA + M",
        ]  # fmt: skip

    def test_flags_go_through_and_seeds_have_folders(self, flags):
        run = make_run(ROWS[1], 7, Path("runs"), [*flags, "--label-smoothing", "0.1"])
        assert run.config.loss.label_smoothing == 0.1
        assert run.config.seed == 7 and run.folder == Path("runs/giou-seed7")
        own = make_run(ROWS[1], None, Path("runs"), [*flags, "--seed", "4"])
        assert own.config.seed == 4 and own.folder == Path("runs/giou-seed4")


@pytest.mark.parametrize(
    ("width", "height", "sizes"),
    [
        (416, 416, [(320, 320), (416, 416), (512, 512)]),
        (160, 128, [(320, 256), (416, 320), (512, 416)]),  # 332.8 and 409.6 by proportion
        (608, 64, [(320, 32), (416, 32), (512, 64)]),  # 33.7, 43.8, 53.9
    ],
)
def test_sizes_keep_the_proportions_of_the_input(width, height, sizes):
    assert sizes_in_proportion((320, 416, 512), width, height) == sizes


SETTINGS = {
    "model": "some/yolov4-nano", "data": ["a/VOC2007", "a/VOC2012"], "split": "trainval",
    "val_split": "test", "weights": None, "epochs": 100, "max_batches": 0, "batch_size": 32,
    "width": 416, "height": 416, "optimizer": "adam", "learning_rate": 1e-4, "confidence": 0.05,
    "nms_iou": 0.45, "ema_decay": 0.998, "sizes": [[320, 320], [416, 416]], "checkpoint": "last",
}  # fmt: skip


def record(row: str, seed: int, **values: float | None) -> dict[str, object]:
    """values: mAP50 in % by kind of NMS and width, such as iou320."""
    return {
        "row": row,
        "seed": seed,
        "evaluations": [
            {
                "width": int(name[-3:]), "height": int(name[-3:]), "nms": name[:-3],
                "mAP50": value and value / 100, "images": 4952,
            }
            for name, value in values.items()
        ],
    }  # fmt: skip


class TestTables:
    def test_are_those_of_the_seed(self):
        records = [
            record("sse", 0, iou320=40.04, iou416=43.5, diou320=40.06, diou416=43.6),
            record("ciou", 0, iou320=44.0, iou416=46.4, diou320=44.1, diou416=46.449),
        ]
        expected = """### NMS

|Detection|320 x 320|416 x 416|
|--|--|--|
|CSP (SSE)|40.0|43.5|
|CSP + GIoU|?|?|
|CSP + DIoU|?|?|
|CSP + CIoU|44.0|46.4|
|CSP + SIoU|?|?|
|CSP + CIoU + CA|?|?|
|CSP + CIoU + CA + M|?|?|

### DIoU-NMS

|Detection|320 x 320|416 x 416|
|--|--|--|
|CSP + CIoU|44.1|46.4|
|CSP + CIoU + CA|?|?|
|CSP (SSE) \\*|40.1|43.6|
|CSP + GIoU \\*|?|?|
|CSP + DIoU \\*|?|?|
|CSP + SIoU \\*|?|?|
|CSP + CIoU + CA + M \\*|?|?|

\\* not in the seed's table
"""
        told, tables = markdown(SETTINGS, records, TITLES).split("\n\n", 1)
        assert tables == expected
        assert told == (
            "yolov4-nano from scratch on VOC2007 + VOC2012, trainval; 100 epochs of batches of 32 "
            "at 416x416, adam 0.0001; seed 0. mAP50 in % on test (4952 images): area under the "
            "curve, IoU 0.5, confidence 0.05, NMS at 0.45; averaged weights after the last epoch."
        )

    def test_several_seeds_are_a_mean_and_a_deviation(self):
        records = [
            record("sse", 0, iou320=40.0), record("sse", 1, iou320=42.0),
            record("sse", 2, iou320=44.0), record("giou", 0, iou320=50.0),
        ]  # fmt: skip
        found = cell(records, "sse", (320, 320), "iou")
        assert found is not None
        assert (found.mean, found.spread, found.seeds) == pytest.approx((42.0, 2.0, 3))
        text = markdown(SETTINGS, records, TITLES)
        assert "|CSP (SSE)|42.0 ± 2.0|?|" in text
        assert "|CSP + GIoU|50.0 (1 of 3 seeds)|?|" in text
        assert "seeds 0, 1, 2 (mean ± standard deviation)" in text

    def test_the_caption_tells_what_is_not_as_usual(self):
        changed = SETTINGS | {"max_batches": 5000, "checkpoint": "best", "weights": "a/b.conv.137"}
        changed["ema_decay"] = 0.0
        text = caption(changed, [])
        assert "from b.conv.137 on" in text and "5000 steps of batches" in text
        assert "seed none yet" in text
        assert text.endswith("0.45; weights of the best epoch on these very images.")

    def test_a_set_without_objects_has_no_figure(self):
        assert cell([record("sse", 0, iou320=None)], "sse", (320, 320), "iou") is None
        assert cell([record("sse", 0, iou320=0.0)], "sse", (320, 320), "iou") == (0.0, None, 1)


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of Python: a shell script, to be written by the test; a training is then `sh`."""
    path = tmp_path / "python"
    monkeypatch.setattr(subprocesses.sys, "executable", str(path))
    return path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class TestTrainings:
    def test_side_by_side_lines_have_labels_and_cores_are_shared(
        self, fake_python, tmp_path, monkeypatch, capfd
    ):
        script(fake_python, 'echo "$OMP_NUM_THREADS threads: $@"; echo oh >&2; exit 3')
        monkeypatch.setattr(subprocesses.os, "cpu_count", lambda: 6)
        folder = tmp_path / "run"
        assert Trainings(2).run("sse, seed 0", folder, ["--epochs", "1"]) == 3
        out = capfd.readouterr().out.splitlines()
        flags = f"--epochs 1 --output {folder}"
        assert out[1:] == [
            f"[sse, seed 0] 3 threads: -m training.train {flags}", "[sse, seed 0] oh",
        ]  # fmt: skip

    def test_one_alone_has_the_terminal_and_all_cores(
        self, fake_python, tmp_path, monkeypatch, capfd
    ):
        script(fake_python, 'echo "threads: $OMP_NUM_THREADS"; echo oh >&2')
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        assert Trainings(1).run("sse", tmp_path / "run", []) == 0
        captured = capfd.readouterr()
        assert captured.out.splitlines()[1:] == ["threads: 5"] and captured.err == "oh\n"

    def test_stopping_reaches_each_once_and_starts_no_other(self, fake_python, tmp_path):
        from threading import Thread

        script(
            fake_python,
            "trap 'echo stopped >>\"$4.log\"; sleep 0.3; exit 0' INT\n"
            'touch "$4.on"; while :; do sleep 0.05; done',
        )
        trainings, folders = Trainings(2), [tmp_path / "a", tmp_path / "b"]
        statuses: list[int] = []
        threads = [
            Thread(target=lambda f=folder: statuses.append(trainings.run(f.name, f, [])))
            for folder in folders
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: all(folder.with_suffix(".on").exists() for folder in folders))
        trainings.stop()
        for thread in threads:
            thread.join(20)
        assert statuses == [INTERRUPTED, INTERRUPTED] and trainings.stopped()
        assert all(folder.with_suffix(".log").read_text() == "stopped\n" for folder in folders)
        assert trainings.run("c", tmp_path / "c", []) == INTERRUPTED
        assert not (tmp_path / "c.on").exists()

    def test_a_training_keeps_its_folder_when_its_parent_is_killed(self, fake_python, tmp_path):
        folder = tmp_path / "run"
        script(fake_python, "exec sleep 60")
        code = (
            "import sys; from pathlib import Path; from training.subprocesses import Trainings; "
            f"sys.executable = {str(fake_python)!r}; "
            f"Trainings(1).run('sse', Path({str(folder)!r}), [])"
        )
        parent = subprocess.Popen(
            [subprocesses_python(), "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        lock = folder / "lock"
        wait_for(lambda: lock.exists() and lock.read_text().endswith("\n"))
        pid = int(lock.read_text())
        parent.kill()
        parent.wait()
        with pytest.raises(ValueError, match=rf"training there \({pid}\); wait"):
            with held(folder, patience=0.2):
                pass
        os.kill(pid, signal.SIGKILL)
        with held(folder, patience=10) as descriptors:
            assert len(descriptors) == 1


REAL_PYTHON = sys.executable


def subprocesses_python() -> str:
    """Python itself, also where a test has put a script in its place."""
    return REAL_PYTHON


def wait_for(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class TestRefused:
    @pytest.mark.parametrize(
        ("option", "words"),
        [
            (["--box-loss", "ciou"], "--box-loss is what the rows differ in"),
            (["--mosaic=1"], "--mosaic is what the rows differ in"),
            (["--resume"], "--resume cannot be given here"),
            (["--rows", "sse,gious"], "'gious' is not a row; rows: sse, giou"),
            (["--sizes", "320,400"], "widths must be multiples of 32"),
            (["--seeds", "1,1"], "is not a list of different numbers"),
            (["--model", "yolov9"], "yolov9"),
            (["--epochs", "0"], "epochs must be at least 1"),
            (["--split", "nothing"], "nothing"),
        ],
    )
    def test_before_anything_is_trained(self, command, tmp_path, capsys, option, words):
        try:
            status = main([*command, *option])
        except SystemExit as exit:  # argparse's own
            status = exit.code
        assert status == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()

    def test_no_data(self, tmp_path, capsys):
        assert main(["--output", str(tmp_path / "runs")]) == 2
        assert "--data is missing" in capsys.readouterr().err

    def test_a_table_of_nothing(self, tmp_path, capsys):
        assert main(["--output", str(tmp_path), "--table-only"]) == 2
        assert f"{tmp_path}: holds no experiments" in capsys.readouterr().err


def test_a_mosaic_that_no_epoch_sees_is_told(fake_python, command, capfd):
    script(fake_python, "exit 2")
    told = "note: no epoch sees a mosaic"
    assert main(command) == 2 and told not in capfd.readouterr().out
    command[command.index("--output") + 1] += "-other"
    assert main([*command, "--mosaic-off-epochs", "1"]) == 2 and told in capfd.readouterr().out


def test_a_row_that_fails_does_not_keep_the_others(fake_python, command, tmp_path, capfd):
    script(fake_python, "exit 2")
    assert main(command) == 2
    captured = capfd.readouterr()
    for row in ("sse", "ciou"):
        assert f"error: {row}, seed 0: its training ended with status 2" in captured.err
    assert "|CSP (SSE)|?|?|" in captured.out  # the tables of what there is, none of it


def test_settings_hold_from_the_first_checkpoint_on(fake_python, command, tmp_path, capfd):
    script(fake_python, "exit 2")  # as for a mistake in the flags, which is then put right
    assert main(command) == 2
    assert main([*command, "--epochs", "2"]) == 2
    assert "other settings" not in capfd.readouterr().err
    (tmp_path / "runs/ciou-seed0/last.safetensors").touch()
    assert main([*command, "--epochs", "3"]) == 2
    told = "was begun with other settings: epochs was 2 and is now 3"
    assert told in capfd.readouterr().err


@pytest.mark.slow
class TestFromEndToEnd:
    def test_rows_are_trained_measured_and_kept(self, command, data, tmp_path, monkeypatch, capfd):
        output = tmp_path / "runs"
        assert main([*command, "--jobs", "2"]) == 0
        shown = capfd.readouterr().out
        assert "[sse, seed 0] " in shown and "[ciou, seed 0] " in shown
        assert (output / "tables.md").read_text() in shown
        results = json.loads((output / "results.json").read_text())
        assert [r["row"] for r in results["records"]] == ["ciou", "sse"]
        assert cv2.imread(str(output / "tables.png")) is not None

        row = json.loads((output / "ciou-seed0/row.json").read_text())
        assert row["command"][:3] == ["python", "-m", "training.train"]
        assert [(e["width"], e["height"], e["nms"]) for e in row["evaluations"]] == [
            (96, 64, "iou"), (96, 64, "diou"), (160, 128, "iou"), (160, 128, "diou"),
        ]  # fmt: skip
        checkpoint = read_checkpoint(output / "ciou-seed0/last.safetensors")
        assert checkpoint.metadata["config"]["loss"]["box_loss"] == "ciou"
        engine = build_engine(
            checkpoint.network,
            checkpoint.state,
            checkpoint.class_names,
            engine="torch",
            size=(96, 64),
        )
        for beta, measured in ((None, row["evaluations"][0]), (1.0, row["evaluations"][1])):
            detector = Detector(engine, confidence=0.001, iou=0.45, beta=beta)
            result = evaluate(detector, open_dataset(data, "val"), progress=False).to_json()
            assert measured["mAP50"] == pytest.approx(result["mAP50"])
            assert measured["classes"] == result["classes"]
        plain, diou = (sum(c["detections"] for c in e["classes"]) for e in row["evaluations"][:2])
        assert plain < diou  # DIoU-NMS keeps boxes whose centres are apart

        monkeypatch.setattr(experiments, "complete_all", None)  # nothing is left to do
        assert main(command) == 0
        assert main(["--output", str(output), "--table-only"]) == 0
        assert capfd.readouterr().out.count((output / "tables.md").read_text()) == 2
        for other, words in (
            (["--epochs", "2"], "epochs was 1 and is now 2"),
            (["--label-smoothing", "0.1"], "label_smoothing was 0.0 and is now 0.1"),
            (["--sizes", "96"], "sizes was [[96, 64], [160, 128]] and is now [[96, 64]]"),
            (["--checkpoint", "best"], "checkpoint was 'last' and is now 'best'"),
        ):
            assert main([*command, *other]) == 2
            assert words in capfd.readouterr().err

    def test_what_was_broken_off_goes_on(self, command, tmp_path, capfd):
        """Ctrl-C within the first row, then SIGKILL of its training, then to the end."""
        output = tmp_path / "runs"
        epochs = 16
        command += ["--epochs", str(epochs), "--rows", "sse", "--sizes", "96"]
        last = output / "sse-seed0" / "last.safetensors"
        process = started(command)
        wait_for(last.exists)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=180)[0]
        assert process.returncode == 130
        assert "interrupted; the same command goes on where this one stopped" in told
        assert 1 <= epoch_of(last) < epochs
        with held(output / "sse-seed0", patience=0):  # its training has ended too
            pass

        before = epoch_of(last)
        process = started(command)
        wait_for(lambda: epoch_of(last) > before)
        os.kill(int((output / "sse-seed0/lock").read_text()), signal.SIGKILL)
        told = process.communicate(timeout=180)[0]
        assert process.returncode == 2
        assert "error: sse, seed 0: its training ended with status -9" in told
        assert epoch_of(last) < epochs and not list(output.glob("*/row.json"))

        assert main(command) == 0
        assert epoch_of(last) == epochs
        rows = (output / "sse-seed0/log.jsonl").read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [*range(1, epochs + 1)]
        assert (output / "sse-seed0/row.json").exists()


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training.experiments", *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def epoch_of(checkpoint: Path) -> int:
    return read_checkpoint(checkpoint).metadata["progress"]["epoch"]
