"""The summary of a run of GPU checks."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_summary import bars, summary


def entry(batch: int, streamed: float, **medians: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "timings": {name.replace("_", " "): {"median": value} for name, value in medians.items()},
        "streamed": streamed,
        "rates": {"copy": 4e12, "matrix": 7e14},
        "stages": {
            "seconds": {"network": 0.005, "NMS": 0.0002},
            "floors": {"network": 0.003, "NMS": 0.00001},
            "share of resize, decode and NMS": 0.05,
        },
    }


def write(folder: Path, name: str, *entries: dict[str, Any]) -> None:
    record = {"benchmark": name, "runs": entries}
    (folder / f"fps-yolov4-416-{name}.json").write_text(json.dumps(record))


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "fp16",
        entry(1, 0.001, detect=0.0011, torch_eager=0.01),
        entry(32, 0.006, detect=0.007, torch_eager=0.02),
    )
    write(tmp_path, "fp8", entry(32, 0.004, detect=0.005))
    return tmp_path


def test_the_bars(measured: Path):
    found = {bar.what.split(",")[0]: bar for bar in bars(measured) if "batch 1," not in bar.what}
    assert found["times torch eager"].value == pytest.approx(20 / 7)
    assert found["times torch eager"].holds is False
    assert found["batch 32"].value == pytest.approx(32 / 0.006) and found["batch 32"].holds
    assert found["times torch.compile"].value is None and found["times torch.compile"].holds is None
    assert found["share of resize"].holds and found["NMS"].holds is False
    assert found["FP8 times fp16"].value == pytest.approx(1.5) and found["FP8 times fp16"].holds
    single = bars(measured)[0]
    assert single.value == pytest.approx(1.1) and single.holds


def training(step_batch: int = 64) -> dict[str, Any]:
    return {
        "benchmark": "training yolov4 416x416, bf16",
        "copy": 4e12,
        "layers": {
            "batch": 64,
            "rows": [
                {
                    "shape": [64, 104, 104],
                    "count": 7,
                    "timings": {"fused": {"median": 1e-4}, "torch": {"median": 2.5e-4}},
                    "ratio": 2.5,
                    "rate": 3e12,
                }
            ],
            "total": {"fused": 7e-4, "torch": 1.75e-3, "ratio": 2.5},
        },
        "step": {
            "batch": step_batch,
            "timings": {"fused": {"median": 0.08}, "torch": {"median": 0.1}},
            "ratio": 1.25,
            "kept": {"fused": 7 * 2**30, "torch": 10 * 2**30},
            "peak": {"fused": 7 * 2**30, "torch": 11 * 2**30},
        },
    }


def test_the_bars_of_training(tmp_path: Path):
    path = tmp_path / "training-yolov4-416.json"
    path.write_text(json.dumps(training()))
    layers, step, memory = bars(tmp_path)[-3:]
    assert layers.value == 2.5 and layers.holds
    assert step.value == 1.25 and step.holds is False
    assert memory.value == pytest.approx(7 / 11) and memory.holds
    path.write_text(json.dumps(training(step_batch=32)))  # what did not fit was not measured
    assert [bar.value for bar in bars(tmp_path)[-3:]] == [2.5, None, None]
    text = summary(tmp_path, [])
    assert "| 64x104x104 | 7 | 0.1000 | 0.2500 | 2.50 | 0.75 |" in text
    assert "| all, batch 64 | | 0.7000 | 1.7500 | 2.50 | |" in text
    assert "Step of 32, fused: 80.0 ms, 7 GiB kept for the backward pass, at most 7.00 GiB" in text
    path.write_text(json.dumps({k: v for k, v in training().items() if k != "step"}))
    assert [bar.value for bar in bars(tmp_path)[-3:]] == [2.5, None, None]
    assert "Step of" not in summary(tmp_path, [])


def test_nothing_measured_holds_nothing(tmp_path: Path):
    assert all(bar.value is None and bar.holds is None for bar in bars(tmp_path))


def test_the_words(measured: Path):
    (measured / "agreement.json").write_text(
        json.dumps(
            {
                "precisions": [
                    {
                        "precision": "fp8", "boxes": 9, "matched": 8, "worst_overlap": 0.96,
                        "worst_score": 0.05, "mAP50 loss": 0.0035, "holds": False,
                    }
                ]
            }
        )
    )  # fmt: skip
    rows = [{"seconds": 0.001, "floor": 0.0005, "error": 1e-4}] * 2
    (measured / "layers-x.json").write_text(
        json.dumps({"benchmark": "layers of x", "batches": {"32": rows}})
    )
    text = summary(measured, [{"section": "fps", "result": "passed", "seconds": 3.0}])
    assert "| fps | passed | 3.0 |" in text
    assert "| 32 | torch eager | 20.000 | 1600 |" in text
    assert "| 32 | stream, overlapped | 6.000 | 5333 |" in text
    assert "| 32 | network, floor 3.0000 ms | 5.0000 | |" in text
    assert "4.00 TB/s and 700 TFLOP/s" in text
    assert "| fp8 | 9 | 8 | 0.9600 | 0.0500 | +0.0035 | NO |" in text
    assert "Batch 32: 2 steps, 2.000 ms, floor 1.000 ms, largest error 1.0e-04" in text
    assert "| times torch.compile, batch 32, at least 1.5 | not measured |  |" in text
