"""`python -m training.train` on drawn pictures, with the small network of the Darknet reference."""

import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from run_results import CLASSES, rows

from training.loader import batches
from training.train import main, open_data
from training.trainer import Trainer
from yolov4_fast.checkpoint import read_checkpoint, read_resume, write_checkpoint
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.weights import read_weights
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.module import NetworkModule


def test_a_run_writes_checkpoints_and_a_log(command, tmp_path, capsys):
    assert main(command) == 0
    best = read_checkpoint(tmp_path / "run/best.safetensors")
    assert best.class_names == CLASSES
    assert (best.network.width, best.network.height) == (80, 64)
    assert not read_resume(tmp_path / "run/best.safetensors")
    found = rows(tmp_path / "run")
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    assert [row["step"] for row in found] == [3, 6, 9, 12]
    assert "mAP50" in found[1] and "mAP50" not in found[0]
    assert list((tmp_path / "run/tensorboard").iterdir())
    told = capsys.readouterr().out
    assert "best mAP50" in told and "24 images" in told and "6 images" in told
    assert told.count("epoch ") == 4 + 1  # a line each, and the last line of all


def test_the_run_ends_after_max_batches(command, tmp_path):
    """In the middle of an epoch, validated all the same."""
    assert main([*command, "--max-batches", "5", "--val-every", "100"]) == 0
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [3, 5]
    assert "mAP50" in found[1]
    progress = read_checkpoint(tmp_path / "run/last.safetensors").metadata["progress"]
    assert (progress["epoch"], progress["step"]) == (2, 5)


def test_sizes_change_every_few_steps(command, monkeypatch):
    sizes = []
    step = Trainer.train_step

    def watched(self, batch):
        sizes.append(tuple(batch.images.shape[2:]))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", watched)
    scales = ["--multi-scale", "48-160", "--multi-scale-every", "2", "--epochs", "8"]
    assert main([*command, *scales]) == 0
    assert len(sizes) == 24 and sizes[::2] == sizes[1::2]
    assert len(set(sizes)) > 3
    assert all(width % 16 == height % 16 == 0 and 48 <= width <= 160 for height, width in sizes)


def test_the_last_epochs_see_whole_pictures(command, monkeypatch):
    seen = []

    def watched(examples, *values, **options):
        seen.append((examples.config.mosaic, examples.config.mixup, examples.config.flip))
        return batches(examples, *values, **options)

    monkeypatch.setattr("training.run.batches", watched)
    assert main([*command, "--mixup", "0.25", "--mosaic-off-epochs", "2"]) == 0
    assert seen == [(0.5, 0.25, 0.5)] * 2 + [(0, 0, 0.5)] * 2


def test_several_data_sets_are_joined(scenes, command, tmp_path, capsys):
    more = tmp_path / "more"
    shutil.copytree(scenes, more)
    assert main([*command, "--data", str(more), "--epochs", "1"]) == 0
    told = capsys.readouterr().out
    assert "train: 48 images" in told and "val: 12 images" in told
    assert [row["step"] for row in rows(tmp_path / "run")] == [6]


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_caches_change_nothing_but_speed(command, tmp_path, cache):
    assert main([*command, "--epochs", "1"]) == 0
    output = tmp_path / cache
    assert main([*command, "--epochs", "1", "--cache", cache, "--output", str(output)]) == 0
    assert rows(output) == rows(tmp_path / "run")
    assert bool(list(output.glob("*.cache"))) == (cache == "disk")


def test_a_long_warmup_is_told(command, capsys):
    assert main([*command, "--epochs", "1", "--warmup-steps", "1000"]) == 0
    assert "the learning rate rises in the first 3 of 3 steps" in capsys.readouterr().out


def test_what_a_cfg_does_not_get_is_told(mini_command, darknet_reference, tmp_path, capsys):
    cfg = tmp_path / "mine.cfg"
    text = (darknet_reference / "mini.cfg").read_text().replace("burn_in=10", "burn_in=10\nblur=1")
    cfg.write_text(text.replace("max_batches=100", "max_batches=4"))
    mini_command += ["--model", str(cfg)]
    del mini_command[mini_command.index("--epochs") : mini_command.index("--epochs") + 2]
    assert main([*mini_command, "--preset", "cfg", "--size", "80x64"]) == 0
    assert "note: not honoured: [net] blur=1" in capsys.readouterr().out
    config = read_checkpoint(tmp_path / "run/last.safetensors").metadata["config"]
    assert (config["momentum"], config["max_batches"], config["batch_size"]) == (0.949, 4, 8)


@pytest.mark.slow
def test_the_module_is_a_program(command, tmp_path):
    program = [sys.executable, "-m", "training.train", *command, "--epochs", "1"]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "epoch 1/1" in run.stdout and "best mAP50" in run.stdout
    curves = cv2.imread(str(tmp_path / "run/curves.png"))
    assert curves.shape[1] > 1000 and curves.std() > 10
    again = subprocess.run(program, capture_output=True, text=True)
    assert again.returncode == 2 and "already holds a run" in again.stderr


@pytest.mark.slow
def test_a_run_learns(mini_command, tmp_path):
    mini_command[mini_command.index("--epochs") + 1] = "40"
    mini_command[mini_command.index("--val-every") + 1] = "40"
    settings = ["--learning-rate", "4e-3", "--ema-decay", "0.9", "--mosaic", "0"]
    assert main([*mini_command, *settings, "--size", "160x128"]) == 0
    found = rows(tmp_path / "run")
    assert found[-1]["total"] < 0.6 * found[0]["total"]
    assert found[-1]["mAP50"] > 0.35  # 0.57 where it was written; 24 pictures teach no more


def test_a_run_is_not_resumed_with_a_network_that_has_changed(
    mini_command, darknet_reference, tmp_path, capsys
):
    cfg = tmp_path / "mine.cfg"
    text = (darknet_reference / "mini.cfg").read_text()
    mini_command += ["--model", str(cfg)]
    mini_command += ["--epochs", "1"]
    cfg.write_text(text)
    assert main(mini_command) == 0
    for old, new in (("scale_x_y=1.05", "scale_x_y=1.5"), ("filters=32", "filters=40")):
        assert old in text
        cfg.write_text(text.replace(old, new))
        assert main([*mini_command, "--resume"]) == 2
        assert f"cannot be resumed: {cfg} has changed since" in capsys.readouterr().err


def test_an_occupied_output_and_other_settings_are_refused(command, tmp_path, capsys):
    command[command.index("--epochs") + 1] = "1"
    command[command.index("--mosaic-off-epochs") + 1] = "0"
    assert main(command) == 0
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*command, "--resume", "--learning-rate", "0.5"]) == 2
    assert "learning_rate was 0.001 and is now 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--split", "--val-split"])
def test_a_split_without_objects_is_refused(scenes, command, capsys, option):
    (scenes / "Annotations/bare.xml").write_text("<annotation></annotation>")
    shutil.copy(scenes / "JPEGImages/scene00.jpg", scenes / "JPEGImages/bare.jpg")
    (scenes / "ImageSets/Main/bare.txt").write_text("bare\n")
    assert main([*command, option, "bare"]) == 2
    assert "split 'bare' has no objects to find" in capsys.readouterr().err


def test_a_coco_file_is_not_both_splits(command, tmp_path, capsys):
    command[command.index("--data") + 1] = str(tmp_path / "all.json")
    assert main(command) == 2
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
    training, validation = open_data([str(tmp_path)], "train", "val")
    assert training.class_names == validation.class_names == ("a", "b")
    assert training.annotation(0).class_ids.tolist() == [0]
    assert validation.annotation(0).class_ids.tolist() == [1]


def test_validation_on_a_set_of_its_own(scenes, tmp_path):
    """As VOC 07+12: what is trained on has no split of the name that is validated on."""
    later = tmp_path / "later"
    shutil.copytree(scenes, later)
    (later / "ImageSets/Main/val.txt").unlink()
    given = [str(scenes), str(later)]
    with pytest.raises(ValueError, match="val"):
        open_data(given, "train", "val")
    training, validation = open_data(given, "train", "val", [str(scenes)])
    assert (len(training), len(validation)) == (48, 6)
    assert training.class_names == validation.class_names


def test_pictures_of_another_size_than_annotated_are_told(scenes, command, tmp_path, capsys):
    turned = tmp_path / "turned"
    shutil.copytree(scenes, turned)
    path = turned / "JPEGImages/scene03.jpg"
    cv2.imwrite(str(path), cv2.rotate(cv2.imread(str(path)), cv2.ROTATE_90_CLOCKWISE))
    command[command.index("--data") + 1] = str(turned)
    assert main([*command, "--epochs", "1", "--mosaic-off-epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "pictures are not of the size that was annotated: 1" in out and "scene03.jpg" in out
    assert "note: pictures are joined in no epoch" in out


def test_a_folder_that_cannot_be_written_to_is_told_before_the_pictures_are_read(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("training.train.open_data", lambda *_: pytest.fail("data were opened"))
    (tmp_path / "file").write_text("")
    command[command.index("--output") + 1] = str(tmp_path / "file" / "run")
    assert main(command) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_too_few_images_for_a_batch(command, capsys):
    assert main([*command, "--batch", "99"]) == 2
    assert "24 images do not fill one batch of 99" in capsys.readouterr().err


def test_a_cfg_of_one_channel_is_refused(mini_command, darknet_reference, tmp_path, capsys):
    cfg = tmp_path / "grey.cfg"
    text = (darknet_reference / "mini.cfg").read_text()
    cfg.write_text(text.replace("channels=3", "channels=1"))
    mini_command += ["--model", str(cfg)]
    assert main(mini_command) == 2
    assert "takes 1 channels; pictures are read with 3" in capsys.readouterr().err


def test_classes_of_a_cfg_must_be_those_of_the_data(
    mini_command, darknet_reference, tmp_path, capsys
):
    text = (darknet_reference / "mini.cfg").read_text()
    cfg = tmp_path / "two.cfg"
    cfg.write_text(
        text.replace("classes=3", "classes=2").replace("filters=24\nact", "filters=21\nact")
    )
    mini_command += ["--model", str(cfg)]
    assert main(mini_command) == 2
    assert "is for 2 classes, the data have 3" in capsys.readouterr().err


def test_training_starts_from_darknet_weights(mini_command, darknet_reference, tmp_path, capsys):
    mini_command[mini_command.index("--epochs") + 1] = "1"
    mini_command[mini_command.index("--mosaic-off-epochs") + 1] = "0"
    weights = str(darknet_reference / "mini.weights")
    assert main([*mini_command, "--weights", weights, "--learning-rate", "1e-12"]) == 0
    assert "mini.weights: took" in capsys.readouterr().out
    trained = read_checkpoint(tmp_path / "run/last.safetensors").state
    network = read_cfg(darknet_reference / "mini.cfg")
    given = read_weights(weights, network)
    torch.testing.assert_close(
        trained["layers.0.conv.weight"], given["layers.0.conv.weight"], atol=1e-6, rtol=1e-6
    )


def test_training_starts_from_checkpoints_and_partial_weights(
    mini_command, darknet_reference, mini, tmp_path, capsys
):
    mini_command += ["--epochs", "1", "--learning-rate", "1e-12", "--ema-decay", "0"]
    key = "layers.0.conv.weight"
    checkpoint = tmp_path / "start.safetensors"
    write_checkpoint(checkpoint, mini.network, mini.state, CLASSES)
    partial = tmp_path / "mini.conv.1"
    size = sum(v.numel() for k, v in mini.state.items() if k.startswith("layers.0."))
    content = (darknet_reference / "mini.weights").read_bytes()
    partial.write_bytes(content[: 20 + 4 * size])
    for number, file in enumerate((checkpoint, partial)):
        output = tmp_path / str(number)
        assert main([*mini_command, "--weights", str(file), "--output", str(output)]) == 0
        assert f"{file}: took" in capsys.readouterr().out
        state = read_checkpoint(output / "last.safetensors").state
        torch.testing.assert_close(state[key], mini.state[key], atol=1e-6, rtol=1e-6)
        last = "layers.31.conv.weight"
        assert torch.allclose(state[last], mini.state[last], atol=1e-6) == (file == checkpoint)


def test_weights_that_cannot_be_used_are_refused(mini_command, darknet_reference, tmp_path, capsys):
    content = (darknet_reference / "mini.weights").read_bytes()
    truncated = tmp_path / "mini.weights"
    truncated.write_bytes(content[:-100])
    assert main([*mini_command, "--weights", str(truncated)]) == 2
    assert "which end before layer 31 is complete" in capsys.readouterr().err
    other = by_name("yolov4-tiny", num_classes=7, width=64, height=64, width_multiple=0.25)
    foreign = tmp_path / "foreign.safetensors"
    state = {k: v for k, v in NetworkModule(other).state_dict().items() if v.ndim}
    write_checkpoint(foreign, other, state, tuple("abcdefg"))
    mini_command += ["--model", "yolov4-nano", "--size", "64"]
    assert main([*mini_command, "--weights", str(foreign)]) == 2
    assert (
        "is of another network: only 26 of 541 tensors fit yolov4-nano" in capsys.readouterr().err
    )
