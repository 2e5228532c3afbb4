"""Schedule and moving average against values worked out by hand."""

from itertools import pairwise
from math import exp

import pytest
import torch
from torch import nn

from training.ema import ExponentialMovingAverage
from training.schedule import cosine


def test_cosine_with_warmup():
    values = [cosine(step, 110, 10, 0.1) for step in range(111)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert values[10] == pytest.approx(1.0)
    assert values[60] == pytest.approx(0.55)  # half-way: the middle of 1 and 0.1
    assert values[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_average_by_hand():
    module = nn.BatchNorm1d(1)
    average = ExponentialMovingAverage(module, decay=0.9, ramp=2.0)
    expected, weights = 1.0, [2.0, 3.0, 5.0]
    for t, weight in enumerate(weights, 1):
        with torch.no_grad():
            module.weight.fill_(weight)
            module.num_batches_tracked.fill_(t)
        average.update(module)
        decay = 0.9 * (1 - exp(-t / 2.0))
        expected = decay * expected + (1 - decay) * weight
    assert average.state["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert average.state["num_batches_tracked"].item() == 3


def test_average_is_a_copy():
    module = nn.Linear(2, 2)
    average = ExponentialMovingAverage(module)
    before = average.state["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(average.state["weight"], before)
