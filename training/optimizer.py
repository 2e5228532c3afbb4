"""Optimisers, and their state as tensors for a checkpoint.

SGD is that of Darknet: its update  v <- momentum v + gradient + decay w,  w <- w - rate v  is
torch's without Nesterov's look-ahead, and as its gradients are sums divided by the images of the
batch, its learning rates hold here as they are for a loss that is normalised in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.stepping import SteppingConfig

BETA2 = 0.999  # of Adam and AdamW


def make_optimizer(module: nn.Module, config: SteppingConfig) -> torch.optim.Optimizer:
    """The configuration's optimiser; weight decay for convolution (and linear) weights only, as in
    Darknet: not for biases, normalisation, slopes and the weights of shortcuts.

    AdamW's decay is apart from the gradient, Adam's and SGD's is part of it.
    """
    named = list(module.named_parameters())
    weights = {name for name, p in named if p.ndim > 1 and name.endswith("weight")}
    decayed = [p for name, p in named if name in weights]
    plain = [p for name, p in named if name not in weights]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    rate, momentum = config.learning_rate, config.momentum
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, rate, betas=(momentum, BETA2))
        case "adam":
            return torch.optim.Adam(groups, rate, betas=(momentum, BETA2))
        case "sgd":
            nesterov = config.nesterov and momentum > 0  # torch refuses it without momentum
            return torch.optim.SGD(groups, rate, momentum, nesterov=nesterov)
    raise ValueError(f"optimizer {config.optimizer!r} is not one of adamw, adam, sgd")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser remembers, as `{parameter's number}.{name}`."""
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give back what `tensors_of` took from an optimiser of the same kind and parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
