"""`python -m training.train` on drawn pictures, with the small network of the Darknet reference."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.train import Log, main
from yolov4_fast.checkpoint import CheckpointError, read_checkpoint, read_resume, write_checkpoint
from yolov4_fast.darknet.cfg import read_cfg

CLASSES = ("disc", "frame", "square")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC folder of 24 training and 6 validation pictures of coloured shapes."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = [f"scene{i:02d}" for i in range(30)]
    for name in names:
        image = np.full((128, 160, 3), rng.integers(90, 160, 3), np.uint8)
        objects = []
        for slot in range(2):
            kind, size = int(rng.integers(3)), int(rng.integers(24, 48))
            x, y = int(rng.integers(4, 76 - size)) + 80 * slot, int(rng.integers(4, 124 - size))
            colour = tuple(int(c) for c in rng.integers(0, 80, 3))
            if kind == 0:
                cv2.circle(image, (x + size // 2, y + size // 2), size // 2, colour, -1)
            else:
                cv2.rectangle(image, (x, y), (x + size, y + size), colour, -1 if kind == 2 else 4)
            objects.append(
                f"<object><name>{CLASSES[kind]}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
                f"<xmax>{x + size}</xmax><ymax>{y + size}</ymax></bndbox></object>"
            )
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image)
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>160</width><height>128"
            f"</height><depth>3</depth></size>{''.join(objects)}</annotation>"
        )
    (root / "ImageSets/Main/train.txt").write_text("\n".join(names[:24]) + "\n")
    (root / "ImageSets/Main/val.txt").write_text("\n".join(names[24:]) + "\n")
    return root


@pytest.fixture
def command(scenes: Path, darknet_reference: Path, tmp_path: Path) -> list[str]:
    return [
        "--data", str(scenes), "--model", str(darknet_reference / "mini.cfg"), "--size", "160x128",
        "--epochs", "4", "--batch", "8", "--val-every", "2", "--warmup-epochs", "1",
        "--mosaic-off-epochs", "1", "--workers", "0", "--device", "cpu",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path).state | {f"resume {k}": v for k, v in read_resume(path).items()}


def test_a_run_writes_checkpoints_and_a_log(command, tmp_path, capsys):
    assert main(command) == 0
    best = read_checkpoint(tmp_path / "run/best.safetensors")
    assert best.class_names == CLASSES
    assert (best.network.width, best.network.height) == (160, 128)
    assert not read_resume(tmp_path / "run/best.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert "mAP50" in rows[1] and "mAP50" not in rows[0]
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert "best mAP50" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_learns(command, tmp_path):
    command[command.index("--epochs") + 1] = "40"
    command[command.index("--val-every") + 1] = "40"
    settings = ["--learning-rate", "4e-3", "--ema-decay", "0.9", "--mosaic", "0"]
    assert main([*command, *settings]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["total"] < 0.6 * rows[0]["total"]
    assert rows[-1]["mAP50"] > 0.35  # 0.57 where it was written; 24 pictures teach no more


def test_a_resumed_run_ends_with_the_same_bits(command, tmp_path, monkeypatch, capsys):
    assert main(command) == 0
    straight = tensors(tmp_path / "run/last.safetensors")

    command[-1] = str(tmp_path / "stopped")
    epoch_ends = Log.epoch_ends

    def interrupted(self, evaluation):
        epoch_ends(self, evaluation)
        if self.trainer.progress.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Log, "epoch_ends", interrupted)
    assert main(command) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(Log, "epoch_ends", epoch_ends)
    assert main([*command, "--resume"]) == 0
    resumed = tensors(tmp_path / "stopped/last.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.slow
def test_a_killed_run_leaves_a_whole_checkpoint(command, tmp_path):
    last = tmp_path / "run/last.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "training.train", *command], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_checkpoint(last).metadata["progress"]["epoch"] >= 1
    assert main([*command, "--resume"]) == 0
    assert read_checkpoint(last).metadata["progress"]["epoch"] == 4


def test_an_occupied_output_and_other_settings_are_refused(command, tmp_path, capsys):
    command[command.index("--epochs") + 1] = "1"
    command[command.index("--mosaic-off-epochs") + 1] = "0"
    assert main(command) == 0
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*command, "--resume", "--learning-rate", "0.5"]) == 2
    assert "learning_rate was 0.001 and is now 0.5" in capsys.readouterr().err


def test_a_diverging_loss_stops_with_advice(command, capsys):
    assert main([*command, "--learning-rate", "1e30"]) == 2
    assert "lower learning rate than 1e+30" in capsys.readouterr().err


def test_too_few_images_for_a_batch(command, capsys):
    assert main([*command, "--batch", "99"]) == 2
    assert "24 images do not fill one batch of 99" in capsys.readouterr().err


def test_classes_of_a_cfg_must_be_those_of_the_data(command, darknet_reference, tmp_path, capsys):
    text = (darknet_reference / "mini.cfg").read_text()
    cfg = tmp_path / "two.cfg"
    cfg.write_text(
        text.replace("classes=3", "classes=2").replace("filters=24\nact", "filters=21\nact")
    )
    command[command.index("--model") + 1] = str(cfg)
    assert main(command) == 2
    assert "is for 2 classes, the data have 3" in capsys.readouterr().err


def test_training_starts_from_darknet_weights(command, darknet_reference, tmp_path, capsys):
    command[command.index("--epochs") + 1] = "1"
    command[command.index("--mosaic-off-epochs") + 1] = "0"
    weights = str(darknet_reference / "mini.weights")
    assert main([*command, "--weights", weights, "--learning-rate", "1e-12"]) == 0
    assert "mini.weights: took" in capsys.readouterr().out
    trained = read_checkpoint(tmp_path / "run/last.safetensors").state
    from yolov4_fast.darknet.weights import read_weights

    network = read_cfg(darknet_reference / "mini.cfg")
    given = read_weights(weights, network)
    torch.testing.assert_close(
        trained["layers.0.conv.weight"], given["layers.0.conv.weight"], atol=1e-6, rtol=1e-6
    )


def test_checkpoints_say_what_is_wrong_with_them(darknet_reference, tmp_path):
    from yolov4_fast.network.module import NetworkModule

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
    state.pop("layers.0.bn.bias")
    write_checkpoint(path, network, state, CLASSES)
    with pytest.raises(CheckpointError, match=r"layers\.0\.bn\.bias should be of shape \(16,\)"):
        read_checkpoint(path)
