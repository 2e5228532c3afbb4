"""Input sizes that change during training, so that the network serves several.

Darknet (random=1) draws a new size every 10 iterations; so does this.
"""

from __future__ import annotations

import numpy as np


def multi_scale_size(
    seed: int, step: int, every: int, low: int, high: int, height: int, width: int, stride: int
) -> tuple[int, int]:
    """Height and width of the pictures of optimiser step `step`, the same for `every` steps.

    The width is a multiple of `stride` from `low` to `high`, all equally likely; the height has the
    proportion to it that `height` has to `width`, rounded to a multiple of `stride`. ValueError if
    there is no such multiple.
    """
    first, last = _multiples(low, high, stride)
    draw = np.random.default_rng((seed, step // every)).integers(first, last + 1)
    return _shaped(int(draw) * stride, height, width, stride)


def largest_size(low: int, high: int, height: int, width: int, stride: int) -> tuple[int, int]:
    """The largest of them: what cached pictures must be large enough for."""
    return _shaped(_multiples(low, high, stride)[1] * stride, height, width, stride)


def smallest_size(low: int, high: int, height: int, width: int, stride: int) -> tuple[int, int]:
    """The smallest of them."""
    return _shaped(_multiples(low, high, stride)[0] * stride, height, width, stride)


def _multiples(low: int, high: int, stride: int) -> tuple[int, int]:
    first, last = -(-low // stride), high // stride
    if not 1 <= first <= last:
        raise ValueError(f"no multiple of {stride} lies between the sizes {low} and {high}")
    return first, last


def _shaped(chosen: int, height: int, width: int, stride: int) -> tuple[int, int]:
    return max(round(chosen * height / width / stride), 1) * stride, chosen
