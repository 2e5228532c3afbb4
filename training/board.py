"""TensorBoard: scalars of every step and validation, pictures, precision-recall curves."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import numpy as np

from training.loader import Batch
from training.losses import Losses
from training.pictures import batch_sheet, class_curves, sheet, validation_picture
from training.trainer import TrainingError
from yolov4_fast.datasets import Dataset
from yolov4_fast.detector import Detector
from yolov4_fast.evaluation import Evaluation

SHOWN = 4  # validation pictures
SHOWN_CONFIDENCE = 0.25  # of the detections drawn in them
POINTS = 101  # of a precision-recall curve


class Board:
    """Writes to a folder that `tensorboard --logdir` shows.

    step: of the checkpoint that the run goes on from; what was written after it is dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            import matplotlib  # noqa: F401  which draws the curves at the end
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                f"training needs {error.name}: pip install 'yolov4_fast[train]'"
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def step(self, losses: Losses, rate: float, images_per_second: float, step: int) -> None:
        for name, value in zip(Losses._fields, losses, strict=True):
            self.writer.add_scalar(f"loss/{name}", float(value), step)
        self.writer.add_scalar("learning_rate", rate, step)
        self.writer.add_scalar("images_per_second", images_per_second, step)

    def batch(self, batch: Batch, class_names: tuple[str, ...], step: int) -> None:
        """Pictures as they are trained on, with their objects."""
        picture = batch_sheet(batch, class_names)
        self.writer.add_image("batch", picture, step, dataformats="HWC")

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        numbers = {
            name: getattr(evaluation, name) for name in ("mAP50", "precision", "recall", "f1")
        }
        numbers = {f"val/{name}": value for name, value in numbers.items()}
        for name, ap in zip(evaluation.class_names, evaluation.ap, strict=True):
            numbers[f"AP50/{name}"] = ap
        for name, value in numbers.items():
            if isfinite(value):
                self.writer.add_scalar(name, value, step)
        for name, (precision, recall, scores) in class_curves(evaluation).items():
            self._curve(f"precision-recall/{name}", precision, recall, scores, step)

    def _curve(
        self, tag: str, precision: np.ndarray, recall: np.ndarray, scores: np.ndarray, step: int
    ) -> None:
        """The curve at thresholds 0, 0.01 .. 1, as TensorBoard wants it: by rising threshold."""
        thresholds = np.linspace(0, 1, POINTS)
        made = np.searchsorted(-scores, -thresholds, side="right")  # detections at each threshold
        at = np.maximum(made - 1, 0)
        none = np.zeros(POINTS) if not len(scores) else None
        shown_precision = np.where(made > 0, precision[at], 1.0) if none is None else none
        shown_recall = np.where(made > 0, recall[at], 0.0) if none is None else none
        hits = shown_precision * made
        positives = hits / np.maximum(shown_recall, 1e-12)
        self.writer.add_pr_curve_raw(
            tag,
            true_positive_counts=hits,
            false_positive_counts=made - hits,
            true_negative_counts=np.zeros(POINTS),  # a detector makes none
            false_negative_counts=positives - hits,
            precision=shown_precision,
            recall=shown_recall,
            global_step=step,
            num_thresholds=POINTS,
        )

    def detections(self, detector: Detector, dataset: Dataset, step: int) -> None:
        """The first validation pictures, with what is found in them and what there is."""
        indices = range(min(SHOWN, len(dataset)))
        confidence, detector.confidence = detector.confidence, SHOWN_CONFIDENCE
        found = detector.detect([dataset.image_path(index) for index in indices])
        detector.confidence = confidence
        pictures = [
            validation_picture(dataset.read_image(index), one, dataset.annotation(index))
            for index, one in zip(indices, found, strict=True)
        ]
        self.writer.add_image("detections", sheet(pictures), step, dataformats="HWC")

    def flush(self) -> None:
        """To disk, so that a checkpoint never knows of more than was written."""
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
