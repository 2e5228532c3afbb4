"""`Detector`: images in, `Detections` out. The straight line of the package, each stage a method of
its own.

preprocess (resize) -> engine.run (the network) -> decode -> suppress (NMS) -> collect

An engine may have a way of its own for all of it (`engines.pipeline`): then several chunks are
under way at once, and the stages are there for whoever wants to look at one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from yolov4_fast import ops
from yolov4_fast.detections import Detections
from yolov4_fast.engines.build import load_engine
from yolov4_fast.engines.engine import RESIZE_MODES, Engine
from yolov4_fast.engines.pipeline import Pending, Pipeline, Settings
from yolov4_fast.loading import load
from yolov4_fast.ops.decode import Candidates
from yolov4_fast.ops.resize import Mode
from yolov4_fast.sources import to_batch


class Batch(NamedTuple):
    """Images ready for the engine, and how to get back from its coordinates to theirs."""

    images: Tensor  # [B, 3, height, width] float32 in 0..1
    placement: Tensor | None  # [B, 4] float32; None where the images were stretched
    sizes: list[tuple[int, int]]  # original (height, width) px


class _UnderWay(NamedTuple):
    """A chunk in the pipeline."""

    pending: Pending
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
        self._guard = threading.Lock()
        self._pipelines: tuple[Settings, Pipeline | None] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.engine.class_names

    @property
    def pipeline(self) -> Pipeline | None:
        """The engine's own way from images to what is found, if it has one."""
        settings = Settings(
            confidence=self.confidence,
            iou=self.iou,
            beta=self.beta,
            max_detections=self.max_detections,
            resize=self.resize,
        )
        with self._guard:
            if self._pipelines is None or self._pipelines[0] != settings:
                self._pipelines = settings, self.engine.pipeline(settings)
            return self._pipelines[1]

    def detect(self, batch: Any) -> list[Detections]:
        """Detections of every image, in order.

        batch: one image or several, of mixed kinds and sizes: path, PIL image, numpy [H, W, 3]
        uint8 RGB, torch [3, H, W] uint8 or floating point in 0..1. More images than the engine's
        `max_batch` run in chunks; of files, and of what a generator makes, only a few chunks are in
        memory at a time. CUDA tensors are read in place, so nothing may change them before this
        returns. The range of floating-point ones is checked, for which the host waits for the GPU;
        uint8 tensors avoid that. Raises ValueError naming the image, FileNotFoundError.
        """
        return list(self._detect(to_batch(batch), self.engine.max_batch, "batch"))

    def stream(self, images: Any, batch: int | None = None) -> Iterator[Detections]:
        """Detections of each image, in order, while later images are read, copied and looked at.

        images: as for `detect`; usually a generator. batch: images that run together, the engine's
        `max_batch` by default; smaller ones wait less for others. What is given out lags a chunk or
        two behind what was asked for: for each frame of a camera at once call `detect`. Arrays and
        tensors are read in place, so they must stay as they are until their detections are there:
        a generator gives out a new one each time. On a GPU, uint8 ones spare the host the waiting,
        as for `detect`.
        Where `images` or one of them raises, the detections of all before are given first. Raises
        ValueError.
        """
        size = self.engine.max_batch if batch is None else batch
        if not 1 <= size <= self.engine.max_batch:
            raise ValueError(f"batch {size}: this engine runs 1 to {self.engine.max_batch} images")
        return self._detect(to_batch(images), size, "stream")

    def _detect(self, items: Iterable[Any], size: int, whole: str) -> Iterator[Detections]:
        chunks = load(items, size, whole)
        pipeline = self.pipeline
        try:
            if pipeline is None:
                for images in chunks:
                    yield from self._in_stages(images)
            else:
                yield from self._overlapped(chunks, pipeline)
        finally:
            chunks.close()

    @torch.inference_mode()
    def _in_stages(self, images: list[Tensor]) -> list[Detections]:
        batch = self.preprocess(images)
        maps = self.engine.run(batch.images)
        candidates = self.decode(maps, batch.placement)
        keep, kept = self.suppress(candidates)
        return self.collect(candidates, keep, kept, batch.sizes)

    def _overlapped(
        self, chunks: Iterator[list[Tensor]], pipeline: Pipeline
    ) -> Iterator[Detections]:
        """As many chunks under way as the pipeline takes; while they are, the next is read."""
        under_way: deque[_UnderWay] = deque()
        failure: BaseException | None = None
        while True:
            try:
                images = next(chunks)
            except StopIteration:
                break
            except BaseException as error:  # of an image, or of the user's generator
                failure = error
                break
            # Before anybody looks at what is ready, the next chunk is on its way.
            ready = self._found(under_way.popleft()) if len(under_way) == pipeline.depth else []
            sizes = [(image.shape[0], image.shape[1]) for image in images]
            under_way.append(_UnderWay(pipeline.submit(images), sizes))
            yield from ready
        while under_way:
            yield from self._found(under_way.popleft())
        if failure is not None:
            raise failure

    def _found(self, chunk: _UnderWay) -> list[Detections]:
        return [
            self._detections(found.boxes, found.scores, found.class_ids, size)
            for found, size in zip(chunk.pending.result(), chunk.sizes, strict=True)
        ]

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
        for index, (size, count) in enumerate(zip(sizes, kept.tolist(), strict=True)):
            chosen = keep[index, :count]
            boxes, scores, class_ids = (
                values[index, chosen].cpu().numpy() for values in candidates[:3]
            )
            results.append(self._detections(boxes, scores, class_ids, size))
        return results

    def _detections(
        self, boxes: np.ndarray, scores: np.ndarray, class_ids: np.ndarray, size: tuple[int, int]
    ) -> Detections:
        """boxes: relative to the image of this size, [n, 4]."""
        height, width = size
        pixels = (boxes.clip(0, 1) * (width, height, width, height)).astype("float32")
        return Detections(pixels, scores, class_ids, self.class_names, size)
