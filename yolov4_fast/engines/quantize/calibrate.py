"""Thresholds of activations from calibration images: the largest value that INT8 keeps, by layer.

    minmax      the largest absolute value met
    percentile  what 99.999 % of the absolute values lie under
    entropy     the one whose rounded histogram has the least Kullback-Leibler divergence from the
                true one (Migacz, "8-bit Inference with TensorRT", GTC 2017)

The images are run twice, once for the largest values and once for histograms of fixed width: so one
image's activations are in memory at a time, and no histogram grows. ONNX Runtime's calibrators keep
the activations of all images (324 MB each for yolov4 416), widen histograms by whatever comes, and
their entropy has 128 bins for 128 levels by default: no choice but the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.quantize.emulate import Emulation
from yolov4_fast.engines.quantize.regions import common_scales

METHODS = ("entropy", "percentile", "minmax")
PERCENTILE = 99.999
BINS = 2048
LEVELS = 128  # of the absolute value
STRIDE = 8  # bins between the thresholds that entropy tries

Thresholds = dict[int, float]  # by layer, IMAGE for the picture


@dataclass(frozen=True)
class Histograms:
    """Of absolute values, one for the layers that share a scale. counts: each [BINS] from 0 to the
    largest. first: for each layer the one that its histogram goes by.
    """

    largest: Mapping[int, float]
    counts: Mapping[int, np.ndarray]
    first: Mapping[int, int]

    def thresholds(self, method: str) -> Thresholds:
        """By one of METHODS."""
        found = {}
        for number, largest in self.largest.items():
            match method:
                case "minmax":
                    found[number] = largest
                case "percentile":
                    found[number] = largest * _percentile(self.counts[number])
                case "entropy":
                    found[number] = largest * _entropy(self.counts[number])
                case _:
                    raise EngineError(
                        f"no calibration method {method!r}; there are {', '.join(METHODS)}"
                    )
        return {layer: found[number] for layer, number in self.first.items() if number in found}


def histograms(emulation: Emulation, images: Sequence[Tensor], progress: bool) -> Histograms:
    """What the layers of a network give for images, each [1, 3, H, W] float32 in 0..1.

    Raises EngineError for no images and for activations that are not finite.
    """
    if not images:
        raise EngineError("no calibration images: INT8 needs some to find its scales")
    first = common_scales(emulation.network)
    largest: dict[int, float] = {}
    counts: dict[int, np.ndarray] = {}
    with tqdm(total=2 * len(images), desc="calibrating", unit="img", disable=not progress) as bar:
        for number, tensor in _activations(emulation, images, first, bar):
            found = float(tensor.abs().max())
            if not np.isfinite(found):
                raise EngineError("the activations of the calibration images are not finite")
            largest[number] = max(largest.get(number, 0.0), found)
        for number, tensor in _activations(emulation, images, first, bar):
            top = largest[number] or 1.0
            added = torch.histc(tensor.abs().flatten(), BINS, 0, top).double().numpy()
            counts[number] = counts.get(number, 0.0) + added
    return Histograms(largest, counts, first)


def _activations(
    emulation: Emulation, images: Sequence[Tensor], first: Mapping[int, int], bar: tqdm
) -> Iterator[tuple[int, Tensor]]:
    for image in images:
        for index, tensor in emulation.outputs(image).items():
            yield first[index], tensor
        bar.update()


def _percentile(counts: np.ndarray) -> float:
    """The threshold as a share of the largest value."""
    below = np.cumsum(counts)
    return (int(np.searchsorted(below, below[-1] * PERCENTILE / 100)) + 1) / len(counts)


def _entropy(counts: np.ndarray) -> float:
    """The threshold as a share of the largest value.

    For each number of bins that are kept: p, the histogram cut there, what is cut off added to its
    last bin; q, the same rounded to LEVELS, each spread evenly over its bins that hold something.
    """
    counts = counts.copy()
    counts[0] = counts[1]  # zeros are exact in any scale, and would outweigh the rest
    least, kept = np.inf, len(counts)
    for end in range(LEVELS, len(counts) + 1, STRIDE):
        p = counts[:end].copy()
        p[-1] += counts[end:].sum()
        level = np.arange(end) * LEVELS // end
        held = np.bincount(level, counts[:end], LEVELS)
        filled = np.bincount(level, p > 0, LEVELS)
        q = np.where(p > 0, (held / np.maximum(filled, 1))[level], 0.0)
        if not q.sum():
            continue
        p, q = p / p.sum(), q / q.sum()
        there = p > 0
        divergence = float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())
        if divergence < least:
            least, kept = divergence, end
    return kept / len(counts)
