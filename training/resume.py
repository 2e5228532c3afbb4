"""A run's state as a checkpoint, and back: after `restore` a run goes on as if it had never
stopped, bit for bit on a CPU.

Beside the averaged weights a resumable checkpoint holds the weights that are trained (`model.*`)
and what the optimiser remembers (`optimizer.*`). Data order, schedule and all chance follow from
the step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from training.optimizer import restore as restore_optimizer
from training.optimizer import tensors_of
from training.progress import Progress
from training.trainer import Trainer, TrainingError
from yolov4_fast.checkpoint import read_checkpoint, read_resume, write_checkpoint
from yolov4_fast.evaluation import Evaluation

MODEL, OPTIMIZER = "model.", "optimizer."


def save(
    path: Path,
    trainer: Trainer,
    class_names: tuple[str, ...],
    progress: Progress,
    evaluation: Evaluation | None,
    *,
    resumable: bool,
) -> None:
    """Write the averaged weights atomically; with `resumable`, all that is needed to go on."""
    metadata: dict[str, Any] = {
        "config": trainer.config.to_json(),
        "progress": progress.to_json(),
        "mAP50": evaluation.mAP50 if evaluation else None,
        "steps_per_epoch": trainer.steps_per_epoch,
        "ema_updates": trainer.average.updates,
    }
    tensors: dict[str, Tensor] = {}
    if resumable:
        state = trainer.module.state_dict()
        tensors |= {f"{MODEL}{name}": value for name, value in state.items()}
        remembered = tensors_of(trainer.optimizer)
        tensors |= {f"{OPTIMIZER}{name}": value for name, value in remembered.items()}
    write_checkpoint(
        path, trainer.network, trainer.average.state, class_names, metadata, resume=tensors
    )


def restore(path: Path, trainer: Trainer, class_names: tuple[str, ...]) -> Progress:
    """Go on from what `save(resumable=True)` wrote for the same configuration and data.

    Raises TrainingError where they are not the same.
    """
    checkpoint, tensors = read_checkpoint(path), read_resume(path)
    metadata = checkpoint.metadata
    if not tensors:
        raise TrainingError(f"{path}: holds no optimiser state; give it as --weights instead")
    differences = trainer.config.differences(metadata["config"])
    if differences:
        raise TrainingError(f"{path}: cannot be resumed with other settings: {differences[0]}")
    if checkpoint.network != trainer.network:
        raise TrainingError(f"{path}: cannot be resumed: {trainer.config.model} has changed since")
    if checkpoint.class_names != class_names:
        raise TrainingError(
            f"{path}: was trained on classes {checkpoint.class_names}, not {class_names}"
        )
    if metadata["steps_per_epoch"] != trainer.steps_per_epoch:
        raise TrainingError(
            f"{path}: had {metadata['steps_per_epoch']} steps per epoch, the data give "
            f"{trainer.steps_per_epoch} now; resume needs the same data and batch size"
        )
    trainer.module.load_state_dict(_below(tensors, MODEL))
    restore_optimizer(trainer.optimizer, _below(tensors, OPTIMIZER))
    trainer.average.updates = metadata["ema_updates"]
    for name, value in trainer.average.state.items():
        value.copy_(
            checkpoint.state[name] if name in checkpoint.state else tensors[f"{MODEL}{name}"]
        )
    progress = Progress(**metadata["progress"])
    trainer.step = progress.step
    return progress


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
