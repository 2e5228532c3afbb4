"""What FP8 costs in AP, without a GPU that has it: the plan of the CUDA engine run with the real
rounding of e4m3 in torch.

    python -m benchmarks.fp8_accuracy samples/shapes-nano.safetensors --data runs/more-scenes

Finds the scales with training images, then measures AP50 on those to evaluate on and, for the boxes
that float32 finds above a score of 0.3, how far they and their scores move. The GPU sums in another
order, which is far below e4m3's rounding. A table for people, one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from yolov4_fast import ops
from yolov4_fast.commands.calibration import open_calibration
from yolov4_fast.datasets import Dataset
from yolov4_fast.detections import Detections
from yolov4_fast.detector import Detector
from yolov4_fast.engines.cuda.fp8 import calibrate, quantise_weights, run_quantised
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.engine import Engine, Manifest
from yolov4_fast.evaluation import evaluate
from yolov4_fast.model import open_model
from yolov4_fast.network.fold import fold
from yolov4_fast.network.module import NetworkModule

LEAST_SCORE = 0.3  # of the boxes that are compared
Network = Callable[[Tensor], tuple[Tensor, ...]]


class Emulation(Engine):
    """A function from images to raw maps, as an engine."""

    kind = "torch"
    precisions = ("f32",)
    members = ()

    def __init__(self, manifest: Manifest, network: Network) -> None:
        self.manifest = manifest
        self.device = torch.device("cpu")
        self._network = network

    @staticmethod
    def default_precision() -> str:
        return "f32"

    @staticmethod
    def payload(network: object, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        return {}

    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return self._network(images)

    def close(self) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="as `yolov4-fast build` takes it")
    parser.add_argument("--data", required=True, help="a data set, as `yolov4-fast val` takes it")
    parser.add_argument("--images", type=int, help="of the data set; all by default")
    parser.add_argument("--output", type=Path, help="a file for the JSON line")
    options = parser.parse_args(arguments)

    model = open_model(options.model)
    network, state = fold(model.network, model.state)
    calibration = open_calibration(options.data)
    if calibration.dataset is None:
        parser.error(f"{options.data} has no annotations: AP needs some")
    plan = lower(network)
    scales = calibrate(plan, state, _batches(calibration.images(), network.height, network.width))
    weights = quantise_weights(plan, state, scales)
    module = NetworkModule(network)
    module.load_state_dict(state)
    module.eval()
    manifest = Manifest(
        kind="torch",
        network=network,
        class_names=model.class_names,
        resize="stretch",
        precision="f32",
        max_batch=4,
    )
    exact = Emulation(manifest, lambda images: tuple(module(images)))
    rounded = Emulation(manifest, lambda images: run_quantised(plan, weights, scales, images))
    result = compare(exact, rounded, calibration.dataset, options.images)
    result |= {
        "model": options.model,
        "data": options.data,
        "calibration_images": len(calibration.paths),
        "fp8_buffers": sum(value is not None for value in scales.values),
        "buffers": len(scales.values),
    }
    for name, value in result.items():
        print(f"{name:<20} {value:.4f}" if isinstance(value, float) else f"{name:<20} {value}")
    line = json.dumps(result)
    print(line)
    if options.output:
        options.output.write_text(line + "\n")


def compare(
    exact: Engine, rounded: Engine, dataset: Dataset, images: int | None = None
) -> dict[str, object]:
    """AP50 of both, and how the second's boxes differ from the first's."""
    if images is not None:
        dataset = replace(
            dataset,
            image_paths=dataset.image_paths[:images],
            annotations=dataset.annotations[:images],
            image_ids=dataset.image_ids[:images],
        )
    ap = [evaluate(Detector(e), dataset, progress=False).mAP50 for e in (exact, rounded)]
    moved = [
        difference
        for path in dataset.image_paths
        for difference in _differences(
            *(Detector(e, confidence=0.05).detect(path)[0] for e in (exact, rounded))
        )
    ]
    found = np.array([pair for pair in moved if pair is not None]).reshape(-1, 2)
    return {
        "images": len(dataset),
        "AP50_f32": ap[0],
        "AP50_fp8": ap[1],
        "loss": ap[0] - ap[1],
        "boxes": len(moved),
        "lost": len(moved) - len(found),
        "iou_median": float(np.median(found[:, 0])),
        "iou_below_0.95": float((found[:, 0] < 0.95).mean()),
        "score_median": float(np.median(found[:, 1])),
        "score_above_0.03": float((found[:, 1] > 0.03).mean()),
    }


def _differences(first: Detections, second: Detections) -> Iterator[tuple[float, float] | None]:
    """For each likely box of the first the IoU with the closest of its class in the second, and
    the difference of their scores; None where there is none of its class.
    """
    for box, score, label in zip(first.boxes, first.scores, first.class_ids, strict=True):
        if score <= LEAST_SCORE:
            continue
        others = second.class_ids == label
        if not others.any():
            yield None
            continue
        boxes = second.boxes[others]
        size = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
        common = size.clip(0).prod(1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
        iou = common / (areas - common)
        best = int(iou.argmax())
        yield float(iou[best]), float(abs(second.scores[others][best] - score))


def _batches(images: Iterator[Tensor], height: int, width: int, size: int = 4) -> Iterator[Tensor]:
    while chunk := list(islice(images, size)):
        yield ops.resize(chunk, height, width, "stretch")


if __name__ == "__main__":
    main()
