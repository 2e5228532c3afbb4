"""`python -m training.train` on drawn pictures, with the small network of the Darknet reference."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.config import TrainConfig
from training.loader import Batch
from training.losses import Losses
from training.train import Log, main, open_data
from training.trainer import Trainer, TrainingError
from yolov4_fast.checkpoint import CheckpointError, read_checkpoint, read_resume, write_checkpoint
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.module import NetworkModule

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


@pytest.mark.parametrize(
    ("optimizer", "epoch", "moment"),
    [("adamw", 2, "after"), ("sgd", 2, "after"), ("adamw", 2, "between best and last")],
)
def test_a_resumed_run_ends_with_the_same_bits(
    command, tmp_path, monkeypatch, capsys, optimizer, epoch, moment
):
    command += ["--optimizer", optimizer]
    assert main(command) == 0
    command[command.index("--output") + 1] = str(tmp_path / "stopped")
    where, name = (Log, "epoch_ends") if moment == "after" else (Trainer, "save")
    original = getattr(where, name)

    def interrupted(self, *values, **options):
        trainer = self.trainer if moment == "after" else self
        stop = trainer.progress.epoch == epoch and options.get("resumable", True)
        if not (stop and moment != "after"):
            original(self, *values, **options)
        if stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupted)
    assert main(command) == 130
    assert "--resume" in capsys.readouterr().err
    written = read_checkpoint(tmp_path / "stopped/last.safetensors").metadata["progress"]["epoch"]
    assert written == (epoch if moment == "after" else epoch - 1)
    monkeypatch.setattr(where, name, original)
    assert main([*command, "--resume"]) == 0
    for file in ("last.safetensors", "best.safetensors"):
        straight, resumed = tensors(tmp_path / "run" / file), tensors(tmp_path / "stopped" / file)
        assert resumed.keys() == straight.keys()
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_resuming_without_the_best_checkpoint_writes_another(command, tmp_path, capsys):
    command += ["--epochs", "2", "--val-every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "epoch_ends", stop)
        assert main(command) == 130
    best = tmp_path / "run/best.safetensors"
    best.unlink()
    assert main([*command, "--resume"]) == 0
    assert f"{best} is gone" in capsys.readouterr().out
    assert read_checkpoint(best).metadata["progress"]["best_epoch"] == 2


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_is_not_resumed_with_a_network_that_has_changed(
    command, darknet_reference, tmp_path, capsys
):
    cfg = tmp_path / "mine.cfg"
    text = (darknet_reference / "mini.cfg").read_text()
    command[command.index("--model") + 1] = str(cfg)
    command += ["--epochs", "1"]
    cfg.write_text(text)
    assert main(command) == 0
    for old, new in (("scale_x_y=1.05", "scale_x_y=1.5"), ("filters=32", "filters=40")):
        assert old in text
        cfg.write_text(text.replace(old, new))
        assert main([*command, "--resume"]) == 2
        assert f"cannot be resumed: {cfg} has changed since" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--val-every", "0"], "'0' is not a whole number from 1 up"),
        (["--workers", "-1"], "'-1' is not a whole number from 0 up"),
        (["--device", "foo"], "torch has no 'foo' here"),
        (["--seed", "-1"], "seed must be at least 0 and finite, not -1"),
        (["--warmup-epochs", "inf"], "warmup_epochs must be at least 0 and finite, not inf"),
        (["--warmup-epochs", "-3"], "warmup_epochs must be at least 0"),
        (["--weight-decay", "nan"], "weight_decay must be at least 0"),
        (["--learning-rate", "nan"], "a learning rate of nan is not positive and finite"),
    ],
)
def test_settings_that_cannot_be_are_one_error(command, tmp_path, capsys, option, words):
    try:
        status = main([*command, *option])
    except SystemExit as exit:  # argparse's own
        status = exit.code
    assert status == 2 and not (tmp_path / "run").exists()
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--split", "--val-split"])
def test_a_split_without_objects_is_refused(scenes, command, capsys, option):
    (scenes / "Annotations/bare.xml").write_text("<annotation></annotation>")
    shutil.copy(scenes / "JPEGImages/scene00.jpg", scenes / "JPEGImages/bare.jpg")
    (scenes / "ImageSets/Main/bare.txt").write_text("bare\n")
    assert main([*command, option, "bare"]) == 2
    assert "split 'bare' has no objects to find" in capsys.readouterr().err


def test_a_coco_file_is_not_both_splits(command, tmp_path, capsys):
    assert main([*command, "--data", str(tmp_path / "all.json")]) == 2
    assert "one COCO file is one split; give the folder" in capsys.readouterr().err


def test_both_splits_have_the_classes_of_the_first(tmp_path):
    image = np.zeros((128, 160, 3), np.uint8)
    (tmp_path / "annotations").mkdir()
    for split, names in (("train", ["a", "b"]), ("val", ["b", "a"])):
        (tmp_path / split).mkdir()
        cv2.imwrite(str(tmp_path / split / "x.png"), image)
        content = {
            "images": [{"id": 1, "file_name": "x.png", "width": 160, "height": 128}],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": 1, "category_id": 0, "bbox": [10, 10, 50, 50]}],
        }
        (tmp_path / f"annotations/{split}.json").write_text(json.dumps(content))
    training, validation = open_data(str(tmp_path), "train", "val")
    assert training.class_names == validation.class_names == ("a", "b")
    assert training.annotation(0).class_ids.tolist() == [0]
    assert validation.annotation(0).class_ids.tolist() == [1]


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(mini, monkeypatch):
    trainer = Trainer(TrainConfig(), mini.network, mini.class_names, 1, torch.device("cpu"))
    before = {name: value.clone() for name, value in trainer.module.named_parameters()}
    monkeypatch.setattr("training.trainer.detection_loss", exploding)
    images = torch.zeros(1, 3, 128, 160, dtype=torch.uint8)
    with pytest.raises(TrainingError, match=r"the gradient became (inf|nan) at step 0"):
        list(trainer.run_epoch([Batch(images, torch.zeros(0, 6))]))
    assert all(torch.equal(v, before[k]) for k, v in trainer.module.named_parameters())


def exploding(heads: object, maps: tuple[torch.Tensor, ...], *_: object) -> Losses:
    """A finite loss whose gradient is infinite: the square root at 0."""
    term = sum((raw * 0).sum() for raw in maps).sqrt()
    return Losses(term, term.detach(), term.detach(), term.detach())


def test_a_diverging_loss_stops_with_advice(command, capsys):
    assert main([*command, "--learning-rate", "1e30"]) == 2
    assert "lower learning rate than 1e+30" in capsys.readouterr().err


def test_too_few_images_for_a_batch(command, capsys):
    assert main([*command, "--batch", "99"]) == 2
    assert "24 images do not fill one batch of 99" in capsys.readouterr().err


def test_a_cfg_of_one_channel_is_refused(command, darknet_reference, tmp_path, capsys):
    cfg = tmp_path / "grey.cfg"
    text = (darknet_reference / "mini.cfg").read_text()
    cfg.write_text(text.replace("channels=3", "channels=1"))
    command[command.index("--model") + 1] = str(cfg)
    assert main(command) == 2
    assert "takes 1 channels; pictures are read with 3" in capsys.readouterr().err


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


def test_training_starts_from_checkpoints_and_partial_weights(
    command, darknet_reference, mini, tmp_path, capsys
):
    command += ["--epochs", "1", "--learning-rate", "1e-12", "--ema-decay", "0"]
    key = "layers.0.conv.weight"
    checkpoint = tmp_path / "start.safetensors"
    write_checkpoint(checkpoint, mini.network, mini.state, CLASSES)
    partial = tmp_path / "mini.conv.1"
    size = sum(v.numel() for k, v in mini.state.items() if k.startswith("layers.0."))
    content = (darknet_reference / "mini.weights").read_bytes()
    partial.write_bytes(content[: 20 + 4 * size])
    for number, file in enumerate((checkpoint, partial)):
        output = tmp_path / str(number)
        assert main([*command, "--weights", str(file), "--output", str(output)]) == 0
        assert f"{file}: took" in capsys.readouterr().out
        state = read_checkpoint(output / "last.safetensors").state
        torch.testing.assert_close(state[key], mini.state[key], atol=1e-6, rtol=1e-6)
        last = "layers.31.conv.weight"
        assert torch.allclose(state[last], mini.state[last], atol=1e-6) == (file == checkpoint)


def test_weights_that_cannot_be_used_are_refused(command, darknet_reference, tmp_path, capsys):
    content = (darknet_reference / "mini.weights").read_bytes()
    truncated = tmp_path / "mini.weights"
    truncated.write_bytes(content[:-100])
    assert main([*command, "--weights", str(truncated)]) == 2
    assert "which end before layer 31 is complete" in capsys.readouterr().err
    other = by_name("yolov4-tiny", num_classes=7, width=64, height=64, width_multiple=0.25)
    foreign = tmp_path / "foreign.safetensors"
    state = {k: v for k, v in NetworkModule(other).state_dict().items() if v.ndim}
    write_checkpoint(foreign, other, state, tuple("abcdefg"))
    command[command.index("--model") + 1] = "yolov4-nano"
    assert main([*command, "--size", "64", "--weights", str(foreign)]) == 2
    assert (
        "is of another network: only 26 of 541 tensors fit yolov4-nano" in capsys.readouterr().err
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
