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
