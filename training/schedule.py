"""Learning-rate schedules as pure functions of the step.

Warm-up rises linearly from 0; then a cosine falls to `final` of the base rate (arXiv 1608.03983,
equation 5).
"""

from __future__ import annotations

from math import cos, pi


def cosine(step: int, total: int, warmup: int, final: float) -> float:
    """Factor on the base learning rate at `step` of `total` (both in optimiser steps)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + cos(pi * min(1.0, progress)))
