"""One optimiser step: the network, its optimiser and its averaged copy, and how they move.

A batch is split into `subdivisions` mini-batches, and among the processes; their gradients are
added and normalised by the positives of the whole batch, so that the step is that of the whole
batch in one go, but for rounding and for what statistics of normalisation are set to. All chance
is derived from (seed, step, rank), so that nothing but the step and the weights is state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.adversarial import attack
from training.batch_norm import Mode, begin_batch, convert
from training.config import TrainConfig
from training.distributed import Processes
from training.ema import ExponentialMovingAverage
from training.loader import Batch
from training.losses import Losses, count_positives, detection_loss, linear_heads
from training.multi_scale import smallest_size
from training.optimizer import make_optimizer, set_learning_rate
from training.regularize import attach_dropblock
from training.schedule import factor
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule

ATTACKS = 0xA77C  # keeps the chance of an attack apart from the others that the seed gives


class TrainingError(ValueError):
    """Training cannot go on; the message says why and what to do."""


class Diverged(TrainingError):
    """The loss or its gradient is no longer finite; holds what the step was made from."""

    def __init__(self, message: str, step: int, batch: Batch, losses: Losses) -> None:
        super().__init__(message)
        self.step, self.batch, self.losses = step, batch, losses


def _check_values(config: TrainConfig, network: Network, parts: int) -> None:
    """Raise TrainingError where a normalisation would get one value a channel, which has no
    variance. parts: that statistics of a batch are taken in.
    """
    if config.multi_scale:
        low, high = config.multi_scale
        step = network.max_stride
        height, width = smallest_size(low, high, config.height, config.width, step)
        network = network.resized(width, height)
    shapes = network.shapes()
    cells = [
        shapes[index][1] * shapes[index][2]
        for index, layer in network.convolutions()
        if layer.batch_normalize
    ]
    if cells and min(cells) * config.batch_size // parts < 2:
        raise TrainingError(
            f"a mini-batch of {config.batch_size // parts} at {network.width}x{network.height} "
            "leaves a normalisation one value a channel: give a larger --size or --batch"
        )


def _joined(module: nn.Module) -> nn.Module:
    """With gradients averaged over all processes. Running statistics are left alone: where they
    are of all processes they are the same, and where not those of rank 0 are kept.
    """
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}  # the newer torch has the first
    return DistributedDataParallel(module, **options)


class Trainer:
    """Holds the network, its optimiser and its averaged copy; `step` counts optimiser steps taken.

    network: what to train; steps_per_epoch: optimiser steps an epoch has.
    """

    def __init__(
        self, config: TrainConfig, network: Network, steps_per_epoch: int, processes: Processes
    ) -> None:
        self.config, self.network, self.processes = config, network, processes
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.total_steps(steps_per_epoch)
        self.step = 0
        share = config.subdivisions * processes.world
        if config.batch_size % share:
            raise TrainingError(
                f"a batch of {config.batch_size} does not split into {config.subdivisions} "
                f"subdivisions on {processes.world} processes: {share} must divide it"
            )
        alone = config.batch_norm == "local"
        _check_values(config, network, share if alone else config.subdivisions)
        torch.manual_seed(config.seed)
        module = NetworkModule(network).to(processes.device).to(memory_format=torch.channels_last)
        linear_heads(module)
        convert(module, cast(Mode, config.batch_norm), config.subdivisions)
        self.module: NetworkModule = module.train()
        self.dropblocks = (
            attach_dropblock(module, config.dropblock_size) if config.dropblock else None
        )
        self.average = ExponentialMovingAverage(module, config.ema_decay)
        self.optimizer = make_optimizer(module, config)
        self.parallel: nn.Module = module
        if processes.world > 1:
            self.parallel = _joined(module)

    def initialise(self, state: dict[str, Tensor]) -> tuple[int, int]:
        """Start from given weights where name and shape fit. -> (tensors taken, of how many)."""
        own = self.module.state_dict()
        fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        self.module.load_state_dict(fitting, strict=False)
        self.average = ExponentialMovingAverage(self.module, self.config.ema_decay)
        return len(fitting), sum(value.dtype.is_floating_point for value in own.values())

    def learning_rate(self, step: int) -> float:
        config = self.config
        return config.learning_rate * factor(config, step, self.total_steps, self.steps_per_epoch)

    def attacked(self, step: int) -> bool:
        """Whether the batch of this step is attacked before it is trained on."""
        rng = np.random.default_rng((self.config.seed, ATTACKS, step))
        return bool(rng.random() < self.config.adversarial)

    def train_step(self, batch: Batch) -> Losses:
        """One optimiser step on this process's share of a batch.

        -> the losses of the whole batch, as plain numbers. Raises Diverged, with the weights as
        they were before the step.
        """
        self._prepare()
        images = batch.images.to(self.processes.device, non_blocking=True)
        positives = self._positives(batch.targets, *images.shape[2:])
        terms = images.new_zeros(4, dtype=torch.float32)
        for part, last in self._parts(Batch(images, batch.targets)):  # targets serve on the CPU
            terms += self._backward(part, positives, last)
        norm = self._gradient_norm()
        self.processes.sum_over(terms)
        *values, gradient = torch.cat([terms, norm.reshape(1)]).tolist()  # waits for the device
        self._check_finite("loss", values[0], batch, values)
        self._check_finite("gradient", gradient, batch, values)  # before it reaches the weights
        self.optimizer.step()
        if self.processes.main:
            self.average.update(self.module)
        self.step += 1
        return Losses(*torch.tensor(values))

    def _prepare(self) -> None:
        seeds = np.random.SeedSequence((self.config.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        set_learning_rate(self.optimizer, self.learning_rate(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        begin_batch(self.module)
        if self.dropblocks:
            self.dropblocks.probability = self.config.dropblock * self.step / self.total_steps

    def _positives(self, targets: Tensor, height: int, width: int) -> float:
        """What the losses of the whole batch, of all processes, are divided by."""
        if self.config.loss.normaliser == "images":
            return self.config.batch_size
        own = count_positives(self.network.heads, targets, width, height)
        if self.processes.world == 1:
            return own
        return self.processes.sum_over(torch.tensor(own, device=self.processes.device)).item()

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, bool]]:
        """The mini-batches, and whether each is the last."""
        count = self.config.subdivisions
        size = len(batch.images) // count
        for number in range(count):
            first = number * size
            mine = (batch.targets[:, 0] >= first) & (batch.targets[:, 0] < first + size)
            targets = batch.targets if count == 1 else batch.targets[mine]
            if first:
                targets = targets - targets.new_tensor([first, 0, 0, 0, 0, 0])
            yield Batch(batch.images[first : first + size], targets), number == count - 1

    def _backward(self, part: Batch, positives: float, last: bool) -> Tensor:
        """Add the gradients of a mini-batch. -> its losses, [4]."""
        config, heads = self.config, self.network.heads
        images = part.images.to(memory_format=torch.channels_last).float().div_(255)
        autocast = torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )
        if self.attacked(self.step):
            with autocast:
                images = attack(self.module, images, heads, part.targets, config.adversarial_step)
        wait = isinstance(self.parallel, DistributedDataParallel) and not last
        with self.parallel.no_sync() if wait else nullcontext():  # type: ignore[operator]
            with autocast:
                maps = self.parallel(images)
            losses = detection_loss(heads, maps, part.targets, config.loss, positives=positives)
            total = losses.total
            if self.processes.world > 1:  # whose gradients are averaged, not added
                total = total * self.processes.world
            total.backward()
        return torch.stack([term.detach() for term in losses])

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, which is clipped to the configuration's largest."""
        if self.config.clip_gradient:
            return nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_gradient)
        return nn.utils.get_total_norm(
            [p.grad for p in self.module.parameters() if p.grad is not None]
        )

    def _check_finite(self, name: str, value: float, batch: Batch, losses: list[float]) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"the {name} became {value} at step {self.step}; a lower learning rate than "
                f"{self.config.learning_rate} is the usual remedy, a longer warm-up or a lower "
                "clip_gradient others",
                self.step,
                batch,
                Losses(*torch.tensor(losses)),
            )
