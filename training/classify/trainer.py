"""The state of a classifier's training and what is done with it: epochs, validation, checkpoints.

All that is random comes from (seed, epoch, index) for the pictures and from (seed, step) for
DropBlock, so that a run resumed at an epoch's end goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.batch_norm import convert
from training.classify.classifier import Classifier, hits, mixed_cross_entropy
from training.classify.config import PretrainConfig
from training.classify.examples import Batch
from training.distributed import Processes
from training.ema import ExponentialMovingAverage
from training.optimizer import make_optimizer, restore, set_learning_rate, tensors_of
from training.regularize import attach_dropblock
from training.schedule import factor
from yolov4_fast.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_resume,
    write_checkpoint,
)
from yolov4_fast.network.layers import Network


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0  # epochs completed
    step: int = 0  # optimiser steps taken
    best: float = -1.0  # highest top-1 accuracy on the validation pictures so far
    best_epoch: int = 0


class Accuracy(NamedTuple):
    """Shares of validation pictures whose class is the likeliest, or among the five likeliest."""

    top1: float
    top5: float
    pictures: int


class ClassifierTrainer:
    """Holds the classifier, its optimiser and its averaged copy.

    network: a backbone, without heads. steps_per_epoch: optimiser steps that the pictures give.
    """

    def __init__(
        self,
        config: PretrainConfig,
        network: Network,
        class_names: tuple[str, ...],
        steps_per_epoch: int,
        processes: Processes,
    ) -> None:
        self.config, self.network, self.class_names = config, network, class_names
        self.processes, self.steps_per_epoch = processes, steps_per_epoch
        self.device = processes.device
        torch.manual_seed(config.seed)
        self.module = Classifier(network, len(class_names)).to(self.device)
        self.module.to(memory_format=torch.channels_last)
        convert(self.module, "sync")
        self.dropblock = (
            attach_dropblock(self.module, config.dropblock_size) if config.dropblock else None
        )
        self.average = ExponentialMovingAverage(self.module, config.ema_decay)
        self.optimizer = make_optimizer(self.module, config)
        self.progress = Progress()
        self._forward: nn.Module = self.module
        if processes.world > 1:
            # Buffers are equal already: the normalisation's sums are over all processes.
            self._forward = DistributedDataParallel(self.module, broadcast_buffers=False)

    def learning_rate(self, step: int) -> float:
        total = self.config.epochs * self.steps_per_epoch
        return self.config.learning_rate * factor(self.config, step, total, self.steps_per_epoch)

    def run_epoch(self, batches: Iterable[Batch]) -> Iterator[tuple[float, Batch]]:
        """Train on every batch, yielding its loss (the mean over all processes) and the batch."""
        self.module.train()
        for batch in batches:
            yield self._step(batch), batch
        self.progress.epoch += 1

    def _step(self, batch: Batch) -> float:
        config, step = self.config, self.progress.step
        seed = np.random.SeedSequence((config.seed, step, self.processes.rank))
        torch.manual_seed(int(seed.generate_state(1)[0]))
        set_learning_rate(self.optimizer, self.learning_rate(step))
        if self.dropblock is not None:
            last = config.epochs * self.steps_per_epoch - 1
            self.dropblock.probability = config.dropblock * step / max(last, 1)
        with self._autocast():
            (logits,) = self._forward(self._images(batch))
        classes, shares = batch.classes.to(self.device), batch.shares.to(self.device)
        loss = mixed_cross_entropy(logits, classes, shares, config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = config.clip_gradient or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        mean = float(self.processes.sum_over(loss.detach().clone())) / self.processes.world
        if not (math.isfinite(norm) and math.isfinite(mean)):  # the same in all processes
            raise ValueError(
                f"the loss became {mean} and its gradient {norm} at step {step}; a lower learning "
                f"rate than {config.learning_rate} is the usual remedy"
            )
        self.optimizer.step()
        self.average.update(self.module)
        self.progress.step += 1
        return mean

    def _images(self, batch: Batch) -> Tensor:
        images = batch.images.to(self.device, non_blocking=True)
        return images.to(memory_format=torch.channels_last).float().div_(255)

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Accuracy:
        """Accuracy of the averaged weights over the batches of all processes."""
        module = Classifier(self.network, len(self.class_names)).to(self.device)
        module.to(memory_format=torch.channels_last)
        module.load_state_dict(self.average.state)
        module.eval()
        found = torch.zeros(3, dtype=torch.int64, device=self.device)
        for batch in batches:
            with self._autocast():
                (logits,) = module(self._images(batch))
            shown = batch.shares[:, 0].to(self.device) > 0
            logits, classes = logits[shown], batch.classes[:, 0].to(self.device)[shown]
            counts = [hits(logits, classes, 1), hits(logits, classes, 5), len(classes)]
            found += torch.tensor(counts, device=self.device)
        top1, top5, count = self.processes.sum_over(found).tolist()
        if not count:
            raise ValueError("none of the validation pictures can be decoded")
        return Accuracy(top1 / count, top5 / count, count)

    def save(self, path: Path, accuracy: Accuracy, *, resumable: bool) -> None:
        """Write the averaged weights; with `resumable`, all that is needed to go on."""
        metadata: dict[str, Any] = {
            "pretrain": _plain(self.config),
            "progress": vars(self.progress),
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "steps_per_epoch": self.steps_per_epoch,
            "ema_updates": self.average.updates,
        }
        write_checkpoint(
            path,
            self.network,
            self.average.state,
            self.class_names,
            metadata,
            resume=self._resume_tensors() if resumable else None,
        )

    def _resume_tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"optimizer.{name}": v for name, v in tensors_of(self.optimizer).items()}
        return tensors

    def resume(self, path: Path) -> None:
        """Go on from what `save(resumable=True)` wrote for the same configuration and pictures."""
        checkpoint, tensors = read_checkpoint(path), read_resume(path)
        metadata = checkpoint.metadata
        if "pretrain" not in metadata or not tensors:
            raise CheckpointError(f"{path}: is not the last checkpoint of a classifier's training")
        self._check_same(path, checkpoint.network, checkpoint.class_names, metadata)
        self.module.load_state_dict(_below(tensors, "model."))
        restore(self.optimizer, _below(tensors, "optimizer."))
        self.average.updates = metadata["ema_updates"]
        for name, value in self.average.state.items():
            # What counts, and is no weight, is in the module's own state alone.
            kept = checkpoint.state.get(name)
            value.copy_(tensors[f"model.{name}"] if kept is None else kept)
        self.progress = Progress(**metadata["progress"])

    def _check_same(
        self, path: Path, network: Network, class_names: tuple[str, ...], metadata: dict[str, Any]
    ) -> None:
        then, now = metadata["pretrain"], _plain(self.config)
        changed = next((name for name in now if then.get(name) != now[name]), None)
        if changed is not None:
            raise CheckpointError(
                f"{path}: cannot be resumed with other settings: {changed} was "
                f"{then.get(changed)!r} and is now {now[changed]!r}"
            )
        if network != self.network:
            raise CheckpointError(
                f"{path}: cannot be resumed: {self.config.model} has changed since"
            )
        if class_names != self.class_names:
            raise CheckpointError(
                f"{path}: was trained on other classes: {len(class_names)} "
                f"({', '.join(class_names[:5])} ...), now {len(self.class_names)}"
            )
        if metadata["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{path}: had {metadata['steps_per_epoch']} steps per epoch, the pictures give "
                f"{self.steps_per_epoch} now; resume needs the same pictures"
            )


def _plain(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON gives it back: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
