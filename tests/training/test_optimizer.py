"""Optimisers against their updates worked out by hand, and their state through a checkpoint."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import nn

from training.config import TrainConfig
from training.optimizer import make_optimizer, restore, set_learning_rate, tensors_of
from yolov4_fast.network.layers import IMAGE, Conv, Network, Shortcut
from yolov4_fast.network.module import NetworkModule


def convolution(weight: float = 1.0) -> nn.Conv2d:
    module = nn.Conv2d(1, 1, 1)
    nn.init.constant_(module.weight, weight)
    nn.init.constant_(module.bias, weight)
    return module


def stepped(config: TrainConfig, gradients: list[float]) -> tuple[float, float]:
    """Weight and bias, both 1 before, after steps with these gradients of both."""
    module = convolution()
    optimizer = make_optimizer(module, config)
    for gradient in gradients:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return module.weight.item(), module.bias.item()


BASE = TrainConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.5)


def test_darknets_momentum():
    """v <- 0.9 v + g + 0.5 w, w <- w - 0.1 v; the bias is not decayed."""
    weight, bias = stepped(replace(BASE, optimizer="sgd", nesterov=False), [1.0, 2.0])
    # v1 = 1.5, w1 = 0.85; v2 = 1.35 + 2 + 0.425 = 3.775, w2 = 0.4725
    assert weight == pytest.approx(0.4725)
    # v1 = 1, b1 = 0.9; v2 = 0.9 + 2 = 2.9, b2 = 0.61
    assert bias == pytest.approx(0.61)


def test_nesterov_looks_ahead():
    """w <- w - 0.1 (g + 0.9 v)."""
    _, bias = stepped(replace(BASE, optimizer="sgd"), [1.0, 2.0])
    # v1 = 1, b1 = 1 - 0.19 = 0.81; v2 = 2.9, b2 = 0.81 - 0.1 (2 + 2.61) = 0.349
    assert bias == pytest.approx(0.349)


def test_adam_decays_within_the_gradient_and_adamw_apart_from_it():
    adam, adam_bias = stepped(replace(BASE, optimizer="adam"), [1.0])
    adamw, adamw_bias = stepped(replace(BASE, optimizer="adamw"), [1.0])
    assert adam == pytest.approx(0.9, abs=1e-6)  # a first step is the rate, whatever the gradient
    assert adamw == pytest.approx(1 - 0.1 * 0.5 * 1 - 0.1, abs=1e-6)
    assert adam_bias == adamw_bias == pytest.approx(0.9, abs=1e-6)


def test_momentum_is_the_first_beta_of_adam():
    _, bias = stepped(replace(BASE, optimizer="adam", momentum=0.5), [1.0, 3.0])
    # m = (0.25 + 1.5) / 0.75, v = (0.999 * 0.001 + 0.009) / (1 - 0.999^2)
    second = (0.25 + 1.5) / 0.75 / sqrt((0.000999 + 0.009) / (1 - 0.999**2))
    assert bias == pytest.approx(0.9 - 0.1 * second, abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_restored_optimizer_goes_on_with_the_same_bits(name):
    config = replace(BASE, optimizer=name)
    module, other = convolution(), convolution()
    optimizer = make_optimizer(module, config)

    def step(module, optimizer, gradient):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()

    step(module, optimizer, 0.3)
    kept = {name: value.clone() for name, value in tensors_of(optimizer).items()}
    other.load_state_dict(module.state_dict())
    again = make_optimizer(other, config)
    restore(again, kept)
    for run in ((module, optimizer), (other, again)):
        set_learning_rate(run[1], 0.01)
        step(*run, 0.7)
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)


def test_an_optimizer_that_there_is_not():
    class Other:
        optimizer, learning_rate, momentum, nesterov, weight_decay = "lion", 0.1, 0.9, True, 0.0

    with pytest.raises(ValueError, match="'lion' is not one of adamw, adam, sgd"):
        make_optimizer(convolution(), Other())


def test_only_convolutions_are_decayed():
    """Not the weights of shortcuts, [inputs, channels] though they may be, nor slopes."""
    conv = Conv(inputs=(IMAGE,), filters=4, activation="prelu")
    again = replace(conv, inputs=(0,))
    sums = Shortcut(inputs=(1, 0), weights="per_channel", normalization="relu")
    module = NetworkModule(Network((conv, again, sums), 32, 32))
    decayed, plain = make_optimizer(module, BASE).param_groups
    assert [list(p.shape) for p in decayed["params"]] == [[4, 3, 1, 1], [4, 4, 1, 1]]
    assert [2, 4] in [list(p.shape) for p in plain["params"]]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
