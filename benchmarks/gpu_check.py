"""All that only a GPU can tell, in one run: `make gpu-check`, or

    python -m benchmarks.gpu_check [--section NAME ...] [--output DIR] [--minutes 9]

Sections, each a process of its own with a time limit, so that one that fails or hangs costs only
itself; what is found goes to benchmarks/results/<gpu>/ as it comes, and at the end a summary.md.

    build      the C++ and CUDA operators, for this GPU alone
    tests      pytest -m gpu: every kernel against its reference, the engine, the pipeline
    layers     every step of yolov4 416 against float32 on the same inputs, and its time and floor
    fps        detect end to end beside PyTorch eager, and its stages (fp16)
    agreement  detections of the sample model on pictures in every precision against float32
    fp8        the same in FP8
    kernels    each op beside its references
    training   the fused normalisation and activation beside torch's, and a whole training step
    compiled   detect beside PyTorch eager and compiled: the last, as compiling takes long

It needs torch, triton, numpy, opencv, onnx, safetensors and pytest; nvidia-cudnn-frontend where it
is installed. What is not there is named and left out.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_summary import summary
from yolov4_fast.files import replacing

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, "-u"]
GRACE = 8.0  # seconds for a section that is stopped to write what it has


@dataclass(frozen=True)
class Section:
    """One process: its command, where DIR stands for the folder of results, and its limit."""

    name: str
    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()  # packages


SECTIONS = (
    Section("build", ("setup.py", "build_ext", "--inplace"), 120, ("setuptools",)),
    Section("tests", ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu"), 180, ("pytest",)),
    Section("layers", ("-m", "benchmarks.layers", "--output", "DIR/layers-yolov4-416.json"), 200),
    Section(
        "fps",
        ("-m", "benchmarks.fps_gpu", "--no-compile", "--output", "DIR/fps-yolov4-416-fp16.json"),
        120,
    ),
    Section("agreement", ("-m", "benchmarks.gpu_agreement", "--output", "DIR/agreement.json"), 90),
    Section(
        "fp8",
        (
            *("-m", "benchmarks.fps_gpu", "--precision", "fp8", "--batch", "32", "--no-compile"),
            *("--output", "DIR/fps-yolov4-416-fp8.json"),
        ),
        120,
        ("cudnn",),
    ),
    Section("kernels", ("-m", "benchmarks.gpu_kernels", "--output", "DIR/kernels.txt"), 90),
    Section(
        "training",
        ("-m", "benchmarks.training_gpu", "--output", "DIR/training-yolov4-416.json"),
        150,
    ),
    Section(
        "compiled",
        ("-m", "benchmarks.fps_gpu", "--output", "DIR/fps-yolov4-416-fp16-compiled.json"),
        300,
    ),
)


def run(section: Section, folder: Path, limit: float) -> dict[str, object]:
    """Run one section, its output shown and kept in DIR/NAME.log; how it ended."""
    missing = [name for name in section.needs if not find_spec(name)]
    if missing:
        return {"section": section.name, "result": f"left out: {', '.join(missing)} is missing"}
    command = [part.replace("DIR", str(folder)) for part in section.command]
    for part in section.command:
        if part.startswith("DIR/"):  # what an earlier run found is not this one's
            (folder / part.removeprefix("DIR/")).unlink(missing_ok=True)
    print(f"\n== {section.name}: python {' '.join(command)}", flush=True)
    started = time.monotonic()
    log = folder / f"{section.name}.log"
    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    if section.name == "build":
        major, minor = torch.cuda.get_device_capability()
        variables |= {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "YOLOV4_FAST_CUDA": "1"}
    with log.open("w") as sink, log.open(errors="replace") as shown:
        child = subprocess.Popen(
            [*PYTHON, *command],
            cwd=ROOT,
            env=variables,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while child.poll() is None and time.monotonic() - started < limit:
                time.sleep(0.2)
                print(shown.read(), end="", flush=True)
        finally:  # also where Ctrl-C ends the wait
            running = child.poll() is None
            if running:
                code = stop(child)
            else:
                code = child.wait()
            print(shown.read(), end="", flush=True)
    result = "passed" if code == 0 else f"FAILED with exit status {code}"
    if running:
        result = f"FAILED: stopped after {limit:.0f} s"
    seconds = time.monotonic() - started
    print(f"== {section.name}: {result}, {seconds:.0f} s", flush=True)
    return {"section": section.name, "result": result, "seconds": round(seconds, 1)}


def stop(child: subprocess.Popen[bytes]) -> int:
    """End a section: politely, so that it keeps what it learnt, then at once."""
    os.killpg(child.pid, signal.SIGINT)
    try:
        code = child.wait(GRACE)
    except subprocess.TimeoutExpired:
        code = None
    try:
        os.killpg(child.pid, signal.SIGKILL)  # what the section itself started may live on
    except ProcessLookupError:
        pass
    return child.wait() if code is None else code


def main(argv: Sequence[str] | None = None) -> int:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description="Everything that only a GPU can tell.")
    parser.add_argument("--section", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything together")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU, and torch sees none here", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = (arguments.output or ROOT / "benchmarks" / "results" / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes = []
    for section in SECTIONS:
        if section.name not in arguments.section:
            continue
        left = deadline - time.monotonic()
        if left < 10:
            outcomes.append({"section": section.name, "result": "left out: no time was left"})
            continue
        outcomes.append(run(section, folder, min(section.seconds, left)))
    text = summary(folder, outcomes)
    with replacing(folder / "summary.md") as temporary:
        temporary.write_text(text)
    print(f"\n{text}")
    return int(any("FAILED" in str(outcome["result"]) for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
