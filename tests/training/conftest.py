"""Small data to train on, the command line that does it, and processes that run it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from run_results import CLASSES, Child, two_heads

ROOT = Path(__file__).resolve().parents[2]


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
def command(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four epochs of three steps of a very small network. The curves, which take longer than that,
    are drawn by other processes only.
    """
    monkeypatch.setattr("training.run.write_curves", lambda *_: None)
    cfg = tmp_path / "small.cfg"
    cfg.write_text(two_heads(norm=True))
    return [
        "--data", str(scenes), "--model", str(cfg), "--size", "80x64",
        "--epochs", "4", "--batch", "8", "--val-every", "2", "--warmup-epochs", "1",
        "--mosaic-off-epochs", "1", "--workers", "0", "--device", "cpu",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def mini_command(command: list[str], darknet_reference: Path) -> list[str]:
    """The same with the network of the Darknet reference."""
    return [*command, "--model", str(darknet_reference / "mini.cfg")]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Child]]:
    """`start(argv, **environment)` runs `python -m training.train` in a process of its own."""
    folder = tmp_path_factory.mktemp("children")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert server.stdin and server.stdout and "ready" in server.stdout.readline()

    def ask(request: dict) -> dict:
        print(json.dumps(request), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    count = 0

    def start(argv: list[str], **environment: str) -> Child:
        nonlocal count
        count += 1
        log = folder / f"{count}.txt"
        request = {"argv": argv, "env": environment, "log": str(log)}
        return Child(ask(request)["pid"], log, ask)

    yield start
    server.stdin.close()
    server.wait(timeout=60)
