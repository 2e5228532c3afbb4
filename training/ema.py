"""Exponential moving average of weights: the copy that is evaluated and shipped.

    average <- decay_t * average + (1 - decay_t) * weight,  decay_t = decay * (1 - exp(-t / ramp))

The ramp lets the average follow quickly while the weights still move far. Buffers (running
statistics) are averaged alike; integers are copied. With a decay of 0 the average is the weights.
"""

from __future__ import annotations

from math import exp

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps `state`, the averaged state dict of a module, on its device."""

    def __init__(self, module: nn.Module, decay: float = 0.999, ramp: float = 200.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"an EMA decay of {decay} is not in [0, 1)")
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self.state: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = self.decay * (1 - exp(-self.updates / self.ramp))
        averages, weights = [], []
        for name, value in module.state_dict().items():
            average = self.state[name]
            if decay and average.dtype.is_floating_point:
                averages.append(average)
                weights.append(value)
            else:
                average.copy_(value)
        if averages:
            torch._foreach_lerp_(averages, weights, 1 - decay)  # one kernel for many on a GPU
