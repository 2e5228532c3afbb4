"""How weights are stepped: what the trainings of a detector and of a classifier have in common."""

from __future__ import annotations

from dataclasses import dataclass

from training.settings import check, setting

OPTIMIZERS = {  # usual learning rate, weight decay
    "adamw": (1e-3, 0.05),
    "adam": (1e-4, 1e-4),
    "sgd": (1e-2, 5e-4),
}
PRECISIONS = ("f32", "bf16")
SCHEDULES = ("cosine", "steps", "constant")


@dataclass(frozen=True, kw_only=True)
class SteppingConfig:
    """Optimiser, schedule, averaging and precision."""

    optimizer: str = setting("adamw", "what takes the steps", choices=tuple(OPTIMIZERS))
    learning_rate: float = setting(1e-3, "largest learning rate", above=0)
    schedule: str = setting("cosine", "how the learning rate falls", choices=SCHEDULES)
    final_learning_rate: float = setting(
        0.02, "share of the learning rate at the end of the cosine", low=0, high=1
    )
    steps: tuple[float, ...] = setting(
        (0.8, 0.9), "shares of the run at which `steps` lowers the rate", low=0, high=1
    )
    scales: tuple[float, ...] = setting((0.1, 0.1), "factors of `steps`, one each", above=0)
    warmup_epochs: float = setting(3.0, "epochs in which the learning rate rises from 0", low=0)
    warmup_steps: int = setting(0, "the same in optimiser steps; 0: as --warmup-epochs says", low=0)
    warmup_power: float = setting(1.0, "exponent of that rise; Darknet's burn-in has 4", above=0)
    momentum: float = setting(0.9, "momentum of SGD, beta1 of Adam", low=0, below=1)
    nesterov: bool = setting(True, "Nesterov's momentum in SGD; Darknet has the plain one")
    weight_decay: float = setting(0.05, "decay of convolution and linear weights", low=0)
    clip_gradient: float = setting(10.0, "largest norm of the gradient; 0: not clipped", low=0)
    ema_decay: float = setting(
        0.998, "decay of the averaged weights, which are validated and kept; 0: not averaged",
        low=0, below=1,
    )  # fmt: skip
    dropblock_size: int = setting(7, "side of a dropped square, in cells", low=1)
    precision: str = setting(
        "f32", "of the network's maps; weights and loss stay in float32", choices=PRECISIONS
    )
    seed: int = setting(0, "seed of all chance", low=0)

    def __post_init__(self) -> None:
        check(self)
        if len(self.steps) != len(self.scales):
            raise ValueError(
                f"steps are {len(self.steps)} and scales {len(self.scales)}: give one scale a step"
            )
        if list(self.steps) != sorted(self.steps):
            raise ValueError(f"steps must ascend, not {listed(self.steps)}")


def listed(values: tuple[float, ...]) -> str:
    """As they are given on the command line."""
    return ",".join(map(str, values))
