"""Compiling Triton's kernels before they are launched: many at once, in processes of their own.

Triton compiles a kernel at its first launch, one after the other, about a second each; a network
that is tuned needs a hundred. `compile_ahead` starts processes that fill Triton's cache on disk, by
the same way that a launch takes, so that the launches find all there. It needs no GPU, and nothing
depends on it: what it does not compile is compiled later.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[3]  # of the package: where it is imported from
MOST_PROCESSES = 16
PATIENCE = 600  # seconds for all


@dataclass(frozen=True)
class Binary:
    """A kernel with the types of its arguments and its constants.

    module, function: where the kernel is. arguments: for each that is no constant, in order, the
    dtype of a tensor that begins at a multiple of 16 bytes ("float16"), a whole number of the kind
    that it is specialised for, or None. options: constants, num_warps and num_stages by name.
    """

    module: str
    function: str
    arguments: tuple[str | int | None, ...]
    options: tuple[tuple[str, int], ...]


def argument(value: Tensor | int | None) -> str | int | None:
    """An argument of a launch as `Binary` describes it."""
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else value


def compile_ahead(
    binaries: Iterable[Binary], sm: int, processes: int | None = None, *, progress: bool = True
) -> None:
    """Compile each binary that Triton's cache does not hold for a GPU of compute capability `sm`.

    Waits until all are there. What fails is logged and left to the launch, which raises.
    """
    todo = sorted(set(binaries), key=repr)
    processes = min(len(todo), processes or os.cpu_count() or 1, MOST_PROCESSES)
    if not processes:
        return
    shares = [todo[first::processes] for first in range(processes)]
    bar = tqdm(
        total=len(todo),
        desc="compiling kernels",
        unit="kernel",
        leave=False,
        disable=None if progress else True,  # None: shown only on a terminal
    )
    with bar, ThreadPoolExecutor(processes) as pool:
        for problem in pool.map(lambda share: _in_process(share, sm, bar.update), shares):
            if problem:
                LOGGER.warning("kernels were not compiled ahead: %s", problem)


def _in_process(binaries: Sequence[Binary], sm: int, done: Callable[[], object]) -> str:
    """What went wrong, in a line. done: called for each that is compiled."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        except OSError as error:
            return str(error)
        timer = Timer(PATIENCE, child.kill)
        timer.daemon = True
        timer.start()
        with child:
            assert child.stdin and child.stdout
            try:
                job = {"sm": sm, "binaries": [astuple(binary) for binary in binaries]}
                child.stdin.write(json.dumps(job))
                child.stdin.close()
            except BrokenPipeError:
                pass  # it has ended, and its exit status says so
            for _ in child.stdout:
                done()
        timer.cancel()
        errors.seek(0)
        lines = errors.read().strip().splitlines() or [f"exit status {child.returncode}"]
    return lines[-1] if child.returncode else ""


class _Target:
    """A driver of Triton's that names a GPU, which need not be there."""

    def __init__(self, sm: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", sm, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> int:
    """Compile what standard input tells."""
    from triton.runtime.driver import driver

    job = json.load(sys.stdin)
    driver.set_active(_Target(job["sm"]))
    failed = 0
    for module, function, arguments, options in job["binaries"]:
        kernel = getattr(importlib.import_module(module), function)
        types = (getattr(torch, one) if isinstance(one, str) else one for one in arguments)
        try:
            kernel.warmup(*types, grid=(1,), **dict(options))
        except Exception as error:  # of any kind: a compiler's errors have no common class
            failed += 1
            print(
                f"{function}: {type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr
            )
        print(function, flush=True)  # a line for each: how far it is
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
