"""Compiling many of cuDNN's plans ahead, in processes of their own: `python -m` this module.

cuDNN compiles one plan at a time in a process, a quarter of a second each; a network tuned for the
first time tries hundreds. The processes work from the description of the GPU, which they do not
touch, and leave the plans in the store, where `FusedConvolution` finds them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from yolov4_fast.engines.cuda.cudnn_graphs import DescribedGpu, FusedConvolution
from yolov4_fast.engines.cuda.cudnn_plans import PlanStore
from yolov4_fast.engines.cuda.cudnn_problem import Problem

logger = logging.getLogger(__name__)

PROCESSES = 8  # at most; each takes almost 1 GB
ROOT = Path(__file__).resolve().parents[3]


def compile_plans(
    plans: Iterable[tuple[Problem, str]],
    cudnn: DescribedGpu,
    store: PlanStore,
    processes: int | None = None,
) -> int:
    """Compile what the store lacks; returns how many plans were added.

    plans: problems with names of `plan_names`. processes: by default one for two processors. What
    cannot be compiled is left out and logged; it is met again, with its error, when it is wanted.
    """
    missing = [
        plan for plan in dict.fromkeys(plans) if not store.path(cudnn.versions, *plan).exists()
    ]
    number = min(processes or max(1, (os.cpu_count() or 1) // 2), PROCESSES, len(missing))
    shares = [missing[first::number] for first in range(number)]
    running = [_start(share, cudnn, store) for share in shares]
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            logger.warning("compiling cuDNN's plans ahead failed: %s", errors.strip()[-500:])
    return sum(store.path(cudnn.versions, *plan).exists() for plan in missing)


def _start(
    plans: list[tuple[Problem, str]], cudnn: DescribedGpu, store: PlanStore
) -> subprocess.Popen[str]:
    value = {
        "properties": cudnn.properties,
        "gpu": {"name": cudnn.name, "sm": cudnn.sm, "processors": cudnn.processors},
        "folder": str(store.folder),
        "plans": [[to_json(problem), name] for problem, name in plans],
    }
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(value))
    process.stdin.close()
    process.stdin = None  # so that communicate does not flush it
    return process


def to_json(problem: Problem) -> dict[str, Any]:
    """The fields of a problem, types by their names."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in dataclasses.asdict(problem).items()
    }


def from_json(value: dict[str, Any]) -> Problem:
    """The problem that `to_json` told."""
    return Problem(
        **{
            name: getattr(torch, item) if name.endswith("dtype") and item is not None else item
            for name, item in value.items()
        }
    )


def main() -> None:
    """Compile what stdin names, in JSON."""
    logging.basicConfig(level=logging.INFO)
    value = json.load(sys.stdin)
    cudnn = DescribedGpu(value["properties"], **value["gpu"])
    store = PlanStore(Path(value["folder"]))
    for fields, name in value["plans"]:
        problem = from_json(fields)
        try:
            FusedConvolution(cudnn, problem, name, store)
        except (ValueError, RuntimeError) as error:
            logger.info("%s", error)


if __name__ == "__main__":
    main()
