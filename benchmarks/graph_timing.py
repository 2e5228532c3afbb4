"""Times of kernels on a GPU without what it takes to launch them: several launches in one CUDA
graph, timed by the device's own events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.harness import Timing

LAUNCHES = 10  # in a graph
REPEATS = 50  # of a graph


def compare_kernels(functions: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Time functions that enqueue work on the current device and never wait for it, in turn, round
    after round; seconds of one call. Inputs stay in the device's cache where they fit.
    """
    graphs = {name: _graph(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / LAUNCHES)
    return {name: Timing.of(values) for name, values in times.items()}


def _graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates before the capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            function()
    return graph
