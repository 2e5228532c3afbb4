"""What INT8 costs convolution by convolution, and which of them stay in higher precision.

A convolution's sensitivity is the `distance` by which the network's findings move when it alone
reads and weighs rounded values, on a few of the calibration images. Only what depends on it is
computed again: half a network on average.

Kept are those whose sensitivity is far above the mean, the worst first, as long as all that are
kept have but a small share of the operations: INT8 stays as fast as it is. The convolutions that
make the raw maps are always kept: they are under 2 % of the operations, and what they round
goes straight into scores and boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from tqdm import tqdm

from yolov4_fast.engines.quantize.distance import distance
from yolov4_fast.engines.quantize.emulate import Emulation
from yolov4_fast.engines.quantize.regions import head_convolutions
from yolov4_fast.network.layers import Network

FAR = 2.5  # times the mean
SHARE = 0.15  # of the operations, at most


def sensitivities(
    emulation: Emulation, scales: Mapping[int, float], images: Sequence[Tensor], progress: bool
) -> dict[int, float]:
    """Of every convolution; images: each [1, 3, H, W] float32 in 0..1."""
    network = emulation.network
    convolutions = [index for index, _ in network.convolutions()]
    total = dict.fromkeys(convolutions, 0.0)
    steps = len(images) * len(convolutions)
    with tqdm(total=steps, desc="sensitivity", unit="layer", disable=not progress) as bar:
        for image in images:
            exact = emulation.outputs(image)
            maps = emulation.maps(exact)
            for index in convolutions:
                rounded = emulation.maps(emulation.changed(exact, scales, index))
                total[index] += distance(network, maps, rounded) / len(images)
                bar.update()
    return total


def kept(network: Network, found: Mapping[int, float]) -> frozenset[int]:
    """The convolutions to keep in higher precision, of their sensitivities."""
    shapes = network.input_shapes()
    work = {index: layer.operations(*shapes[index]) for index, layer in network.convolutions()}
    chosen = set(head_convolutions(network))
    mean = sum(found.values()) / len(found)
    left = SHARE * sum(work.values())
    for index in sorted(set(found) - chosen, key=lambda each: -found[each]):
        if found[index] <= FAR * mean:
            break
        if work[index] <= left:
            chosen.add(index)
            left -= work[index]
    return frozenset(chosen)
