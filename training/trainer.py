"""The state of a training run and what is done with it: epochs, validation, checkpoints, resuming.

Everything random is derived from (seed, epoch, index) by the loader, so a run that is resumed at
an epoch's end goes on as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.ema import ExponentialMovingAverage
from training.loader import Batch
from training.losses import Losses, detection_loss
from training.schedule import cosine
from yolov4_fast.checkpoint import read_checkpoint, read_resume, write_checkpoint
from yolov4_fast.datasets import Dataset
from yolov4_fast.detector import Detector
from yolov4_fast.engines.build import build_engine
from yolov4_fast.evaluation import Evaluation, evaluate
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule

VALIDATION_CONFIDENCE = 0.001
VALIDATION_BATCH = 16


class TrainingError(ValueError):
    """Training cannot go on; the message says why and what to do."""


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0  # epochs completed
    step: int = 0  # optimiser steps taken
    best: float = -1.0  # highest validation mAP50 so far
    best_epoch: int = 0


class Trainer:
    """Holds the network, its optimiser and its averaged copy.

    network: what to train; class_names: one per class; steps_per_epoch: optimiser steps the loader
    gives.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: Network,
        class_names: tuple[str, ...],
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.config, self.network, self.class_names = config, network, class_names
        self.device, self.steps_per_epoch = device, steps_per_epoch
        torch.manual_seed(config.seed)
        self.module = NetworkModule(network).to(device).to(memory_format=torch.channels_last)
        self.average = ExponentialMovingAverage(self.module, config.ema_decay)
        self.optimizer = make_optimizer(self.module, config)
        self.progress = Progress()

    def initialise(self, state: dict[str, Tensor]) -> tuple[int, int]:
        """Start from given weights where name and shape fit. -> (tensors taken, of how many)."""
        own = self.module.state_dict()
        fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        self.module.load_state_dict(fitting, strict=False)
        self.average = ExponentialMovingAverage(self.module, self.config.ema_decay)
        return len(fitting), sum(value.dtype.is_floating_point for value in own.values())

    def learning_rate(self, step: int) -> float:
        total = self.config.epochs * self.steps_per_epoch
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)
        return self.config.learning_rate * cosine(
            step, total, min(warmup, total), self.config.final_learning_rate
        )

    def run_epoch(self, batches: Iterable[Batch]) -> Iterator[Losses]:
        """Train on every batch, yielding its losses as plain numbers on the CPU."""
        self.module.train()
        for batch in batches:
            yield self._step(batch)
        self.progress.epoch += 1

    def _step(self, batch: Batch) -> Losses:
        images = batch.images.to(self.device, non_blocking=True)
        images = images.to(memory_format=torch.channels_last).float().div_(255)
        targets = batch.targets.to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.progress.step)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            maps = self.module(images)
        losses = detection_loss(self.network.heads, maps, targets, self.config.loss)
        self._check_finite("loss", losses.total)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_gradient)
        self._check_finite("gradient", norm)  # before it reaches the weights that are saved
        self.optimizer.step()
        self.average.update(self.module)
        self.progress.step += 1
        return Losses(*(term.detach().cpu() for term in losses))

    def _check_finite(self, name: str, value: Tensor) -> None:
        if not math.isfinite(value.item()):
            raise TrainingError(
                f"the {name} became {value.item()} at step {self.progress.step}; a lower "
                f"learning rate than {self.config.learning_rate} is the usual remedy"
            )

    def validate(self, dataset: Dataset) -> Evaluation:
        """VOC AP at IoU 0.5 of the averaged weights, through the detector that users run."""
        engine = build_engine(
            self.network,
            self.average.state,
            self.class_names,
            engine="torch",
            max_batch=VALIDATION_BATCH,
        )
        detector = Detector(engine, confidence=VALIDATION_CONFIDENCE)
        return evaluate(detector, dataset, metric="voc", progress=False)

    def save(self, path: Path, evaluation: Evaluation | None, *, resumable: bool) -> None:
        """Write the averaged weights; with `resumable`, all that is needed to go on."""
        metadata: dict[str, Any] = {
            "config": self.config.to_json(),
            "progress": vars(self.progress),
            "mAP50": evaluation.mAP50 if evaluation else None,
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
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
        return tensors

    def resume(self, path: Path) -> None:
        """Go on from what `save(resumable=True)` wrote for the same configuration and data."""
        checkpoint, tensors = read_checkpoint(path), read_resume(path)
        metadata = checkpoint.metadata
        if not tensors:
            raise TrainingError(f"{path}: holds no optimiser state; give it as --weights instead")
        differences = self.config.differences(metadata["config"])
        if differences:
            raise TrainingError(f"{path}: cannot be resumed with other settings: {differences[0]}")
        if checkpoint.network != self.network:
            raise TrainingError(f"{path}: cannot be resumed: {self.config.model} has changed since")
        if checkpoint.class_names != self.class_names:
            raise TrainingError(
                f"{path}: was trained on classes {checkpoint.class_names}, not {self.class_names}"
            )
        if metadata["steps_per_epoch"] != self.steps_per_epoch:
            raise TrainingError(
                f"{path}: had {metadata['steps_per_epoch']} steps per epoch, the data give "
                f"{self.steps_per_epoch} now; resume needs the same data and batch size"
            )
        self.module.load_state_dict(_below(tensors, "model."))
        self.average.updates = metadata["ema_updates"]
        for name, value in self.average.state.items():
            value.copy_(
                checkpoint.state[name] if name in checkpoint.state else tensors[f"model.{name}"]
            )
        self.optimizer.load_state_dict(
            {
                "state": _nested(_below(tensors, "optimizer.")),
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        self.progress = Progress(**metadata["progress"])


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay for convolution weights only, as in Darknet."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    plain = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.learning_rate, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=True)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    nested: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        nested.setdefault(int(index), {})[name] = value
    return nested
