"""Learning-rate schedules as a pure function of the step.

The rate rises over the first steps as ((step + 1) / warm-up)^power, Darknet's burn-in. Then

    cosine    falls to `final_learning_rate` of itself along half a cosine (arXiv 1608.03983,
              equation 5), which begins where the warm-up ends
    steps     is multiplied by each of `scales` at its share `steps` of the whole run
    constant  stays
"""

from __future__ import annotations

from math import cos, pi, prod

from training.stepping import SteppingConfig


def warmup_steps(config: SteppingConfig, total_steps: int, steps_per_epoch: int) -> int:
    """Optimiser steps in which the learning rate rises; never more than there are."""
    asked = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    return min(asked, total_steps)


def factor(config: SteppingConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Factor on the learning rate at `step` (from 0) of `total_steps`, both in optimiser steps."""
    warmup = warmup_steps(config, total_steps, steps_per_epoch)
    if step < warmup:
        return ((step + 1) / warmup) ** config.warmup_power
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "steps":
        pairs = zip(config.steps, config.scales, strict=True)
        return prod(scale for share, scale in pairs if step >= round(share * total_steps))
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    final = config.final_learning_rate
    return final + (1 - final) * 0.5 * (1 + cos(pi * progress))
