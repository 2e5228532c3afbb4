"""Timing for every benchmark: warm-up, many repeats, median and p20/p80, versions and device.

Functions that are compared are timed in turn within one run, so that a change in the machine's
load meets all of them alike; ratios are of medians.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    minimum: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarise the times of at least two calls."""
        tenths = quantiles(seconds, n=10, method="inclusive")
        return cls(tenths[4], tenths[1], tenths[7], min(seconds), len(seconds))

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3f} ms ({1e3 * self.p20:.3f} to {1e3 * self.p80:.3f})"


def measure(function: Function, *, seconds: float = 1.0, minimum_repeats: int = 10) -> Timing:
    """Time one function; see `compare`."""
    return compare({"": function}, seconds=seconds, minimum_repeats=minimum_repeats)[""]


def compare(
    functions: Mapping[str, Function], *, seconds: float = 1.0, minimum_repeats: int = 10
) -> dict[str, Timing]:
    """Time functions in turn, round after round, for about `seconds` each after a tenth of warm-up.

    In its turn a function runs twice and the second call counts: the first meets caches and thread
    pools as the function before left them. A function that uses a GPU must itself wait for it.
    """
    deadline = time.perf_counter() + 0.1 * seconds * len(functions)
    warm = False
    while not warm or time.perf_counter() < deadline:
        for function in functions.values():
            function()
        warm = True
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    rounds = 0
    while rounds < max(2, minimum_repeats) or time.perf_counter() < deadline:
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: Timing.of(values) for name, values in times.items()}


def environment() -> dict[str, object]:
    """What a figure depends on: processor, GPU, threads and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_extension": torch.backends.cpu.get_cpu_capability(),
        **gpu(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def gpu() -> dict[str, object]:
    """The GPU and what its kernels depend on; None where there is none."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    from yolov4_fast.engines.cuda.choices import environment as kernels
    from yolov4_fast.engines.cuda.device import Gpu

    return kernels(Gpu())


def processor() -> str:
    """The processor's name; Linux has it in /proc, elsewhere it may be only the architecture."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def report(
    title: str, timings: Mapping[str, Timing], results: Mapping[str, object] | None = None
) -> None:
    """Print a table for people and one JSON line for programs; results: ratios and counts."""
    where = environment()
    width = max((len(name) for name in timings), default=0)
    print(f"{title}\n{', '.join(f'{key} {value}' for key, value in where.items())}")
    for name, timing in timings.items():
        print(f"  {name:<{width}}  {timing}  minimum {1e3 * timing.minimum:.3f}")
    for name, value in (results or {}).items():
        print(f"  {name}: {value:.2f}" if isinstance(value, float) else f"  {name}: {value}")
    record = {
        "benchmark": title,
        "environment": where,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "results": dict(results or {}),
    }
    print(json.dumps(record))
    sys.stdout.flush()
