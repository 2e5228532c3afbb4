"""The figures of training on a GPU, on the CPU in a small form: that they can be taken at all."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import training_gpu
from benchmarks.gpu_summary import training_lines
from benchmarks.training_gpu import Pair, Settings, Shape, error, fitting, layers, main, shapes
from yolov4_fast.network.architectures import by_name

CPU = Settings(torch.device("cpu"), "f32", 0.001)


def test_the_shapes_of_a_network():
    network = by_name("yolov4", num_classes=80, width=416, height=416)
    found = shapes(network)
    assert sum(found.values()) == 72
    assert found[Shape(32, 416, 416)] == 1 and found[Shape(1024, 13, 13)] == 2
    assert sum(shapes(network, "leaky").values()) == 35


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys):
    path = tmp_path / "training.json"
    arguments = ["--device", "cpu", "--model", "yolov4-nano", "--size", "32", "--batch", "2"]
    arguments += ["--precision", "bf16", "--seconds", "0.001", "--output", str(path)]
    assert main(arguments) == 0
    record = json.loads(path.read_text())
    rows = record["layers"]["rows"]
    network = by_name("yolov4-nano", num_classes=80, width=32, height=32)
    assert Counter({Shape(*row["shape"]): row["count"] for row in rows}) == shapes(network)
    assert all(row["errors"]["fused"] <= 8e-3 and row["ratio"] > 0 for row in rows)
    step = record["step"]
    assert step["batch"] == 2 and set(step["timings"]) == {"fused", "torch"}
    assert step["peak"] == {"fused": None, "torch": None}
    printed = capsys.readouterr().out
    assert "all layers: fused" in printed and "step of 2:" in printed
    assert len(training_lines(record)) > len(rows)


def test_a_third_less_is_kept_of_activations():
    """By the difference of two batches, as what does not grow with the batch is kept by both."""
    network = by_name("yolov4-nano", num_classes=80, width=64, height=64)
    kept = {
        fused: [training_gpu.Step(network, batch, CPU, fused).kept() for batch in (1, 3)]
        for fused in (True, False)
    }
    fused, plain = (kept[name][1] - kept[name][0] for name in (True, False))
    assert 0.6 < fused / plain < 0.7


@pytest.mark.parametrize("precision", ["f32", "bf16", "fp16"])
def test_both_programs_compute_the_same(precision):
    pair = Pair(Shape(24, 9, 7), 2, CPU._replace(precision=precision))
    exact = pair.exact()
    assert error(pair.fused(), exact) <= training_gpu.LIMITS[precision]
    assert error(pair.plain(), exact) <= 4 * training_gpu.LIMITS[precision]


def test_no_time_is_shown_of_what_is_not_right(monkeypatch):
    network = by_name("yolov4-nano", num_classes=80, width=32, height=32)
    monkeypatch.setattr(
        training_gpu.BatchNorm, "forward", lambda self, x: x * (self.weight + self.bias).sum()
    )
    with pytest.raises(SystemExit, match="no time is shown"):
        layers(network, 1, CPU)


def test_nan_is_an_infinite_error():
    one = [torch.ones(3)]
    assert error([torch.tensor([1.0, torch.nan, 1.0])], one) == torch.inf
    assert error(one, one) == 0


def test_what_does_not_fit_is_tried_with_half_the_batch():
    tried = []

    def function(network, batch, settings):
        tried.append(batch)
        if batch > 16:
            raise torch.cuda.OutOfMemoryError
        return batch

    assert fitting(function, None, 64, CPU) == 16 and tried == [64, 32, 16]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fitting(lambda network, batch, settings: function(network, 99, settings), None, 8, CPU)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
