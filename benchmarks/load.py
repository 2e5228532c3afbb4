"""Time from an engine file to the first detection, in fresh processes.

    python -m benchmarks.load --model yolov4 --size 416

Each process imports the package, loads the file and detects on one 1280x720 picture. The import
(mostly of torch) is told apart, since a program pays it once whatever it does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Timing, report
from yolov4_fast import build_engine
from yolov4_fast.commands.arguments import size
from yolov4_fast.model import open_model

CHILD = """
import json, sys, time
started = time.perf_counter()
from yolov4_fast.commands.benchmark import drawn_image
from yolov4_fast.detector import Detector
import torch
picture = drawn_image(720, 1280)
imported = time.perf_counter()
detector = Detector(sys.argv[1])
loaded = time.perf_counter()
detector.detect(picture)
first = time.perf_counter()
detector.detect(picture)
print(json.dumps([imported - started, loaded - imported, first - loaded,
                  time.perf_counter() - first]))
"""
STEPS = ("import", "load", "first detection", "second detection")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="yolov4", help="an architecture's name")
    parser.add_argument("--size", type=size, default=(416, 416), metavar="N|WxH")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes")
    arguments = parser.parse_args(argv)
    model = open_model(arguments.model, size=arguments.size, random=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.engine")
        engine = build_engine(model.network, model.state, model.class_names, path=path)
        runs = []
        for _ in range(max(2, arguments.repeats)):
            child = subprocess.run(
                [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True
            )
            runs.append(json.loads(child.stdout))
        megabytes = path.stat().st_size / 1e6
    timings = {
        name: Timing.of(values) for name, values in zip(STEPS, zip(*runs, strict=True), strict=True)
    }
    timings["load and first detection"] = Timing.of([run[1] + run[2] for run in runs])
    title = (
        f"{arguments.model} {arguments.size[0]}x{arguments.size[1]}, {engine.kind} "
        f"{engine.precision}, {megabytes:.0f} MB"
    )
    report(title, timings)


if __name__ == "__main__":
    main()
