"""The profile of a training step, on a tiny network and few scenes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import cv2
import pytest
import torch

import training.trainer
from benchmarks.harness import Timing
from benchmarks.step_parts import PARTS, Observer, observed, unobserved
from benchmarks.training import main, results_of, time_loader
from benchmarks.training_figure import draw
from training.config import TrainConfig
from training.distributed import Processes
from training.loader import Batch, TrainingSet
from training.shapes import write_dataset
from training.trainer import Trainer
from yolov4_fast.datasets import open_dataset


@pytest.fixture
def trainer(mini) -> Trainer:
    config = TrainConfig(width=160, height=128, batch_size=4, warmup_epochs=0)
    return Trainer(config, mini.network, 10, Processes(torch.device("cpu")))


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 128, 160), dtype=torch.uint8, generator=generator)
    targets = torch.tensor([[i, i % 3, 0.5, 0.5, 0.3, 0.4] for i in range(4)])
    return Batch(images, targets)


def slowed(function, seconds: float):
    def slow(*values, **named):
        time.sleep(seconds)
        return function(*values, **named)

    return slow


class TestParts:
    def test_add_up_to_the_step_and_each_was_seen(self, trainer, batch):
        start = time.perf_counter()
        steps = observed(trainer, [batch] * 3)
        whole = time.perf_counter() - start
        assert len(steps) == 3 and trainer.step == 3
        assert sum(sum(step.values()) for step in steps) == pytest.approx(whole, rel=0.1)
        for step in steps:
            assert tuple(step) == PARTS
            assert all(step[part] > 0 for part in PARTS if part != "attack")
            assert step["attack"] == 0

    @pytest.mark.parametrize(
        ("owner", "name", "part"),
        [
            (training.trainer, "detection_loss", "loss"),
            (training.trainer, "count_positives", "loss"),
            (torch.nn.utils, "clip_grad_norm_", "clip"),
            ("average", "update", "average"),
            ("optimizer", "_init_group", "optimiser"),
            ("module", "forward", "forward"),
        ],
    )
    def test_what_takes_longer_is_told_apart(self, trainer, batch, monkeypatch, owner, name, part):
        observed(trainer, [batch])
        if isinstance(owner, str):
            owner = getattr(trainer, owner)
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name), 0.4))
        (step,) = observed(trainer, [batch])
        assert step[part] > 0.4
        assert max(step, key=step.__getitem__) == part

    def test_gradients_of_the_loss_and_of_the_network_are_told_apart(self, trainer, batch):
        """A slow gradient beside the loss, and one within the network."""

        def slow(gradient):
            time.sleep(0.4)

        for place, part in (("maps", "loss"), ("stem", "backward")):
            handles = []
            if place == "maps":  # called after `detection_loss` began: the hook is the loss's own

                def hook(_module, _images, maps):
                    maps[0].register_hook(slow)

                handles.append(trainer.module.register_forward_hook(hook))
            else:
                weight = next(trainer.module.parameters())
                handles.append(weight.register_hook(slow))
            (step,) = observed(trainer, [batch])
            for handle in handles:
                handle.remove()
            assert max(step, key=step.__getitem__) == part, step

    def test_an_attack_is_a_part_of_its_own(self, mini, batch):
        config = TrainConfig(width=160, height=128, batch_size=4, adversarial=1.0)
        trainer = Trainer(config, mini.network, 10, Processes(torch.device("cpu")))
        (step,) = observed(trainer, [batch])
        assert step["attack"] > 0.5 * step["forward"]

    def test_the_trainer_is_left_as_it_was(self, trainer, batch):
        before = (
            training.trainer.detection_loss,
            training.trainer.count_positives,
            torch.nn.utils.clip_grad_norm_,
        )
        with pytest.raises(RuntimeError, match="stop"), Observer(trainer):
            raise RuntimeError("stop")
        assert before == (
            training.trainer.detection_loss,
            training.trainer.count_positives,
            torch.nn.utils.clip_grad_norm_,
        )
        assert not trainer.module._forward_hooks and not trainer.module._forward_pre_hooks
        assert "update" not in vars(trainer.average)
        assert len(unobserved(trainer, [batch])) == 1

    def test_watching_does_not_change_the_weights(self, mini, batch):
        states = []
        for watch in (observed, unobserved):
            config = TrainConfig(width=160, height=128, batch_size=4)
            trainer = Trainer(config, mini.network, 10, Processes(torch.device("cpu")))
            watch(trainer, [batch] * 2)
            states.append(trainer.module.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def timing(seconds: float) -> Timing:
    return Timing.of([seconds, seconds])


def test_results_by_hand():
    parts = dict.fromkeys(PARTS, timing(0.0)) | {
        "forward": timing(0.03), "loss": timing(0.01), "backward": timing(0.06),
    }  # fmt: skip
    loaders = {0: timing(1 / 100), 1: timing(1 / 250), 2: timing(1 / 400)}
    config = TrainConfig(batch_size=8)
    results = results_of(parts, timing(0.08), loaders, config, 2_500_000)
    assert results["images/s consumed"] == pytest.approx(100)
    assert results["images/s of the loader alone, by workers"]["1"] == pytest.approx(250)
    assert results["loader / network"] == pytest.approx(4)
    assert results["assignment and loss / step"] == pytest.approx(0.1)
    assert results["share of the step"]["backward"] == pytest.approx(0.6)
    assert results["peak memory, MB"] == 2.5


def test_the_loader_alone_is_timed_by_the_image(tmp_path: Path, monkeypatch):
    write_dataset(tmp_path / "data", {"train": 8}, 64, 64, seed=0)
    examples = TrainingSet(open_dataset(tmp_path / "data", "train"), 64, 64)
    monkeypatch.setattr(TrainingSet, "read", slowed(TrainingSet.read, 0.02))
    times = time_loader(examples, 4, 0, seconds=0.1)
    assert len(times) >= 2
    assert all(seconds > 0.02 for seconds in times)


def test_the_benchmark_writes_its_figures(darknet_reference: Path, tmp_path: Path, capsys):
    cfg = tmp_path / "mini8.cfg"
    text = (darknet_reference / "mini.cfg").read_text()
    cfg.write_text(text.replace("classes=3", "classes=8").replace("filters=24\na", "filters=39\na"))
    write_dataset(tmp_path / "data", {"train": 8}, 128, 160, seed=0)
    main(
        [
            "--data", str(tmp_path / "data"), "--model", str(cfg), "--size", "160x128",
            "--batch", "4", "--device", "cpu", "--repeats", "3", "--seconds", "0.1",
            "--loader-workers", "0,1", "--output", str(tmp_path / "step.json"),
            "--figure", str(tmp_path / "step.png"),
        ]
    )  # fmt: skip
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["benchmark"] == "training mini8.cfg 160x128, batch 4, f32, data"
    assert record["command"].startswith("python -m benchmarks.training --data ")
    assert record["environment"]["torch"] == torch.__version__
    assert record["config"]["augment"]["mosaic"] > 0
    assert set(record["timings"]) == {
        "step", *(f"step: {part}" for part in PARTS),
        "loader, 0 workers, an image", "loader, 1 worker, an image",
    }  # fmt: skip
    assert sum(record["results"]["share of the step"].values()) == pytest.approx(1)
    assert record["results"]["peak memory, MB"] > 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert told["loader / network"] == record["results"]["loader / network"]
    assert told["share of the step: loss"] == record["results"]["share of the step"]["loss"]
    image = cv2.imread(str(tmp_path / "step.png"))
    assert image is not None and image.shape[1] == 1200
    record["environment"]["gpu"] = "NVIDIA H200"
    draw(tmp_path / "gpu.png", record)
    assert not (cv2.imread(str(tmp_path / "gpu.png")) == image).all()
