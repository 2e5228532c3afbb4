"""`Detector`: images in, `Detections` out. The straight line of the package, each stage a method of
its own.

preprocess (resize) -> engine.run (the network) -> decode -> suppress (NMS) -> collect
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from yolov4_fast import ops
from yolov4_fast.detections import Detections
from yolov4_fast.engines.build import load_engine
from yolov4_fast.engines.engine import RESIZE_MODES, Engine
from yolov4_fast.ops.decode import Candidates
from yolov4_fast.ops.resize import Mode
from yolov4_fast.sources import to_batch, to_image


class Batch(NamedTuple):
    """Images ready for the engine, and how to get back from its coordinates to theirs."""

    images: Tensor  # [B, 3, height, width] float32 in 0..1
    placement: Tensor | None  # [B, 4] float32; None where the images were stretched
    sizes: list[tuple[int, int]]  # original (height, width) px


class Detector:
    """Finds objects in images with an engine. Several threads may use one detector at once.

    engine: an engine, or the path of an engine file.
    confidence: least score of a detection, iou: overlap at which the lesser of two boxes of a class
    is dropped; both as the engine was built by default (0.25 and 0.45 unless chosen otherwise).
    resize: "stretch" or "letterbox"; as the engine was built by default. beta: exponent of DIoU-
    NMS, or None for plain IoU; the network's own by default. max_detections: the most per image, 0
    for any number. Raises ValueError, FileNotFoundError.
    """

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        confidence: float | None = None,
        iou: float | None = None,
        resize: Mode | None = None,
        beta: float | Literal["network"] | None = "network",
        max_detections: int = 0,
    ) -> None:
        self.engine = engine if isinstance(engine, Engine) else load_engine(engine)
        manifest = self.engine.manifest
        self.confidence = manifest.confidence if confidence is None else confidence
        self.iou = manifest.iou if iou is None else iou
        self.resize: Mode = resize or self.engine.resize
        self.beta = self.engine.network.nms_beta if beta == "network" else beta
        self.max_detections = max_detections
        for name in ("confidence", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: it must lie in 0..1")
        if self.resize not in RESIZE_MODES:
            raise ValueError(f"resize {self.resize!r} is not one of {', '.join(RESIZE_MODES)}")
        if self.beta is not None and not self.beta >= 0:
            raise ValueError(f"beta {self.beta}: it must be at least 0, or None for plain IoU")
        if max_detections < 0:
            raise ValueError(f"max_detections {max_detections}: it must be 0 (any number) or more")
        heads = self.engine.network.heads
        self._anchors = [head.anchors for head in heads]
        self._scale_x_y = [head.scale_x_y for head in heads]
        self._new_coords = [head.new_coords for head in heads]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.engine.class_names

    def detect(self, batch: Any) -> list[Detections]:
        """Detections of every image, in order.

        batch: one image or a sequence, of mixed kinds and sizes: path, PIL image, numpy [H, W, 3]
        uint8 RGB, torch [3, H, W] uint8 or floating point in 0..1. More images than the engine's
        `max_batch` run in chunks; of files only one chunk is in memory at a time. Raises ValueError
        naming the image, FileNotFoundError.
        """
        items = to_batch(batch)
        results: list[Detections] = []
        with torch.inference_mode():
            for start in range(0, len(items), self.engine.max_batch):
                images = _load(items[start : start + self.engine.max_batch], start)
                results += self._detect(images)
        return results

    def _detect(self, images: list[Tensor]) -> list[Detections]:
        batch = self.preprocess(images)
        maps = self.engine.run(batch.images)
        candidates = self.decode(maps, batch.placement)
        keep, kept = self.suppress(candidates)
        return self.collect(candidates, keep, kept, batch.sizes)

    def preprocess(self, images: list[Tensor]) -> Batch:
        """Fit images, each [H, W, 3] uint8 or float32 in 0..1, to the engine's input."""
        height, width = self.engine.height, self.engine.width
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        on_device = [image.to(self.engine.device) for image in images]
        resized = ops.resize(on_device, height, width, self.resize)
        if self.resize == "stretch":
            return Batch(resized, None, sizes)
        return Batch(resized, ops.placement(sizes, height, width, self.resize), sizes)

    def decode(self, maps: tuple[Tensor, ...], placement: Tensor | None) -> Candidates:
        """Boxes and scores over the confidence, normalised to the original images."""
        return ops.decode(
            maps,
            self._anchors,
            self._scale_x_y,
            self._new_coords,
            self.engine.height,
            self.engine.width,
            self.confidence,
            placement,
        )

    def suppress(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Non-maximum suppression: indices of the survivors [B, D] by descending score, and their
        number [B].
        """
        return ops.diou_nms(*candidates, self.iou, self.beta, self.max_detections)

    def collect(
        self, candidates: Candidates, keep: Tensor, kept: Tensor, sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """The survivors of each image, boxes in pixels of the original and clipped to it."""
        results = []
        for index, ((height, width), count) in enumerate(zip(sizes, kept.tolist(), strict=True)):
            chosen = keep[index, :count]
            boxes = candidates.boxes[index, chosen].cpu().numpy()
            boxes = (boxes.clip(0, 1) * (width, height, width, height)).astype("float32")
            scores = candidates.scores[index, chosen].cpu().numpy()
            class_ids = candidates.class_ids[index, chosen].cpu().numpy()
            results.append(Detections(boxes, scores, class_ids, self.class_names, (height, width)))
        return results


def _load(items: list[Any], start: int) -> list[Tensor]:
    """Read a chunk of a batch; files are decoded in parallel.

    start: number of its first image in the batch.
    """
    names = [f"image {start + offset} of the batch" for offset in range(len(items))]
    files = [isinstance(item, str | Path) for item in items]
    if sum(files) < 2:
        return list(map(to_image, items, names))
    with ThreadPoolExecutor(min(sum(files), os.cpu_count() or 1)) as pool:
        pending = [
            pool.submit(to_image, item, name) if file else None
            for item, name, file in zip(items, names, files, strict=True)
        ]
        # The rest stays on this thread: one PIL image may stand in a batch twice, and loads once.
        return [
            future.result() if future else to_image(item, name)
            for item, name, future in zip(items, names, pending, strict=True)
        ]
