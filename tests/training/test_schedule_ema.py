"""Schedules and moving average against values worked out by hand."""

from itertools import pairwise
from math import exp

import pytest
import torch
from torch import nn

from training.config import TrainConfig
from training.ema import ExponentialMovingAverage
from training.schedule import factor, warmup_steps


def factors(total: int, steps_per_epoch: int = 10, **settings: object) -> list[float]:
    config = TrainConfig(**settings)  # type: ignore[arg-type]
    return [factor(config, step, total, steps_per_epoch) for step in range(total + 1)]


def test_cosine_with_warmup():
    values = factors(110, final_learning_rate=0.1, warmup_epochs=1)
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert values[10] == pytest.approx(1.0)
    assert values[60] == pytest.approx(0.55)  # half-way: the middle of 1 and 0.1
    assert values[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(values[10:]))


def test_the_seeds_cosine():
    """lr / 2 (1 + cos(pi t / T_max)) with T_max 100 epochs and no least rate."""
    values = factors(100, 1, final_learning_rate=0, warmup_epochs=0)
    assert values[0] == 1 and values[50] == pytest.approx(0.5)
    assert values[25] == pytest.approx(0.8535533905932737)  # (1 + sqrt(1/2)) / 2
    assert values[100] == pytest.approx(0)


def test_steps_and_burn_in_of_darknet():
    """Of a thousandth of its length: 500 batches, the rate a tenth from 400 and 450 on."""
    steps = {"schedule": "steps", "steps": (0.8, 0.9), "scales": (0.1, 0.1)}
    values = factors(500, warmup_steps=10, warmup_power=4, **steps)
    assert values[0] == pytest.approx(1e-4)  # (1 / 10)^4
    assert values[4] == pytest.approx(0.0625)  # (5 / 10)^4
    assert values[9] == values[10] == values[399] == 1
    assert values[400] == values[449] == pytest.approx(0.1)
    assert values[450] == values[499] == pytest.approx(0.01)


def test_the_seeds_steps():
    """1e-4 for 30 epochs, 5e-5 up to epoch 50, then 1e-5."""
    steps = {"schedule": "steps", "steps": (0.3, 0.5), "scales": (0.5, 0.2), "warmup_epochs": 0}
    values = factors(700, 7, **steps)
    rates = [1e-4 * values[7 * epoch] for epoch in (0, 29, 30, 49, 50, 99)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5])
    assert values[209] == 1 and values[210] == 0.5


def test_a_constant_rate_rises_only():
    assert factors(20, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 18


def test_warmup_in_epochs_or_steps_but_never_more_than_the_run():
    assert warmup_steps(TrainConfig(warmup_epochs=2.5), 1000, 10) == 25
    assert warmup_steps(TrainConfig(warmup_epochs=2.5, warmup_steps=7), 1000, 10) == 7
    assert warmup_steps(TrainConfig(warmup_steps=2000), 30, 10) == 30
    assert warmup_steps(TrainConfig(warmup_epochs=0), 30, 10) == 0


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


def test_average_without_decay_is_the_weights_bit_for_bit():
    module = nn.Linear(3, 3)
    average = ExponentialMovingAverage(module, decay=0)
    for _ in range(3):
        with torch.no_grad():
            module.weight.normal_()
        average.update(module)
        assert torch.equal(average.state["weight"], module.weight)


def test_average_is_a_copy():
    module = nn.Linear(2, 2)
    average = ExponentialMovingAverage(module)
    before = average.state["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(average.state["weight"], before)
