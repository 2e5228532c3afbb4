"""Drawn pictures of three classes, the command line that learns them, and what a run leaves."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from yolov4_fast.checkpoint import read_checkpoint, read_resume

CLASSES = ("disc", "frame", "square")


def draw(kind: int, rng: np.random.Generator) -> np.ndarray:
    """A dark shape on a lighter ground, 64 x 72 px."""
    image = np.full((64, 72, 3), rng.integers(110, 200, 3), np.uint8)
    size = int(rng.integers(24, 48))
    x, y = int(rng.integers(2, 70 - size)), int(rng.integers(2, 62 - size))
    colour = tuple(int(c) for c in rng.integers(0, 70, 3))
    if kind == 0:
        cv2.circle(image, (x + size // 2, y + size // 2), size // 2, colour, -1)
    else:
        cv2.rectangle(image, (x, y), (x + size, y + size), colour, -1 if kind == 2 else 4)
    return image


def command_of(pictures: Path, output: Path) -> list[str]:
    return [
        "--data", str(pictures), "--model", "yolov4", "--width-multiple", "0.0625", "--size", "64",
        "--epochs", "3", "--batch", "24", "--warmup-epochs", "1", "--workers", "0",
        "--device", "cpu", "--output", str(output),
    ]  # fmt: skip


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path).state | {f"resume {k}": v for k, v in read_resume(path).items()}


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
