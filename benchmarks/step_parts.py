"""Where the time of a training step goes, observed on the trainer's own steps.

Nothing of the step is written anew: the time is read where one part hands over to the next (hooks
of the module, of its maps and of the optimiser, and the functions that the trainer calls). On a GPU
the host waits there, so parts add up to a little more than an unobserved step.

    transfer   to the device, layout, float, / 255
    attack     the first pass of self-adversarial training, where it is on
    forward    of the network, weights' conversions of autocast included
    loss       assignment and loss, and its own backward pass down to the maps
    backward   of the network
    clip       the norm of the gradient, and its limit
    optimiser  the update of the weights
    average    the averaged weights
    other      all else: checks for NaN, learning rates, clearing gradients, losses to the host
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import wraps
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import training.trainer
from training.loader import Batch
from training.trainer import Trainer

PARTS = (
    "transfer", "attack", "forward", "loss", "backward", "clip", "optimiser", "average", "other",
)  # fmt: skip


def now(trainer: Trainer) -> float:
    """Seconds, when all that was asked of the device so far is done."""
    if trainer.processes.device.type == "cuda":
        torch.cuda.synchronize(trainer.processes.device)
    return time.perf_counter()


class Observer:
    """Within `with`: `steps` gets the seconds of each part of every step between begin and end."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []
        self._stack = ExitStack()
        self._attacking = False

    def step(self, batch: Batch) -> None:
        """Have the trainer take a step, and note its parts."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = now(self.trainer)
        self.trainer.train_step(batch)
        self._mark("other")
        self.steps.append(self._seconds)

    def _mark(self, part: str) -> None:
        """All since the last mark was `part`, or of the attack where one is under way."""
        if self._attacking:
            part = "attack"
        since, self._last = self._last, now(self.trainer)
        self._seconds[part] += self._last - since

    def __enter__(self) -> Observer:
        module, optimizer = self.trainer.module, self.trainer.optimizer
        for handle in (
            module.register_forward_pre_hook(lambda *_: self._mark("transfer")),
            module.register_forward_hook(self._after_forward),
            optimizer.register_step_pre_hook(lambda *_: self._mark("other")),
            optimizer.register_step_post_hook(lambda *_: self._mark("optimiser")),
        ):
            self._stack.callback(handle.remove)
        self._watch(self.trainer, "_prepare", "other", "other")
        self._watch(training.trainer, "count_positives", "transfer", "loss")
        self._watch(training.trainer, "attack", "transfer", "attack")
        self._watch(training.trainer, "detection_loss", "other", "loss")
        self._watch(torch.nn.utils, "clip_grad_norm_", "backward", "clip")
        self._watch(self.trainer.average, "update", "other", "average")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _after_forward(self, _module: object, _images: object, maps: Sequence[Tensor]) -> None:
        self._mark("forward")
        for raw in maps:
            if raw.requires_grad:  # its gradient is the last that the loss's backward pass makes
                raw.register_hook(lambda _: self._mark("loss"))

    def _watch(self, owner: Any, name: str, before: str, during: str) -> None:
        """Time a function: what comes before it since the last mark, and itself."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*values: Any, **named: Any) -> Any:
            self._mark(before)
            self._attacking = during == "attack"
            result = function(*values, **named)
            self._attacking = False
            total = getattr(result, "total", None)
            if isinstance(total, Tensor) and total.requires_grad:  # here its backward pass begins
                total.register_hook(lambda _: self._mark("other"))
            self._mark(during)
            return result

        self._stack.enter_context(patch.object(owner, name, timed))


def observed(trainer: Trainer, batches: Iterable[Batch]) -> list[dict[str, float]]:
    """Train on batches that are in memory. -> the seconds of each part of each step."""
    with Observer(trainer) as observer:
        for batch in batches:
            observer.step(batch)
    return observer.steps


def unobserved(trainer: Trainer, batches: Iterable[Batch]) -> list[float]:
    """Train on batches that are in memory. -> the seconds of each step."""
    seconds = []
    for batch in batches:
        start = now(trainer)
        trainer.train_step(batch)
        seconds.append(now(trainer) - start)
    return seconds
