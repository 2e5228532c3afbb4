"""A network that sees eight pictures again and again learns them by heart."""

import time

import pytest
from run_results import rows

from training.shapes import write_dataset
from training.train import main

PLAIN = (
    "--mosaic", "0", "--flip", "0", "--jitter", "0", "--hue", "0", "--saturation", "1",
    "--exposure", "1", "--weight-decay", "0", "--mosaic-off-epochs", "0",
)  # fmt: skip


@pytest.mark.slow
def test_yolov4_nano_overfits_eight_pictures(tmp_path):
    """To mAP50 1.0: every object found, nothing else found before them. It takes 160 steps."""
    write_dataset(tmp_path / "eight", {"train": 8}, height=160, width=160, seed=0)
    began = time.monotonic()
    status = main([
        "--data", str(tmp_path / "eight"), "--val-split", "train", "--size", "160", "--batch", "8",
        "--epochs", "200", "--val-every", "100", "--warmup-epochs", "5", "--learning-rate", "3e-3",
        "--ema-decay", "0", "--workers", "0", "--device", "cpu", "--output", str(tmp_path / "run"),
        *PLAIN,
    ])  # fmt: skip
    print(f"{time.monotonic() - began:.0f} s")
    assert status == 0
    assert rows(tmp_path / "run")[-1]["mAP50"] == 1.0
