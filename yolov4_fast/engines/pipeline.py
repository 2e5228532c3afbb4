"""A pipeline: the whole way from images to what was found in them, where an engine has one of its
own.

`Engine.pipeline(settings)` gives it. An engine without one returns None, and the `Detector` goes
through its stages (resize, network, decode, NMS) instead; both find the same. A pipeline works on
several chunks at once: `submit` starts one and returns before it is done, `Pending.result` waits
for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from yolov4_fast.ops.resize import Mode


@dataclass(frozen=True)
class Settings:
    """What a `Detector` asks of a pipeline; it has checked the values."""

    confidence: float  # least score of a candidate, in 0..1
    iou: float  # overlap at which the lesser of two boxes of a class is dropped, in 0..1
    beta: float | None  # exponent of DIoU-NMS, None for plain IoU
    max_detections: int  # the most per image, 0 for any number
    resize: Mode


class Found(NamedTuple):
    """What was found in one image, by descending score."""

    boxes: np.ndarray  # [n, 4] float32 xyxy relative to the image, not clipped to it
    scores: np.ndarray  # [n] float32
    class_ids: np.ndarray  # [n] int64
    dropped: int  # candidates, the lowest scored, that NMS did not look at: it takes so many


class Pending(ABC):
    """A chunk of images on its way."""

    @abstractmethod
    def result(self) -> list[Found]:
        """What was found in each image, in order; waits until it is known.

        Any thread may call it, and more than once. Raises what went wrong on the way.
        """


class Pipeline(ABC):
    """Several threads may use one pipeline at once."""

    depth: int  # chunks that can be under way at once; a further one waits for the oldest

    @abstractmethod
    def submit(self, images: Sequence[Tensor]) -> Pending:
        """Start on a chunk of 1 to `max_batch` images, each [H, W, 3] uint8 or float32 in 0..1 of
        any strides, on the CPU or on the engine's device.

        Images in host memory have been copied when it returns. Those on the device are read in
        place, after what the caller's current stream had been given by then, and maybe more than
        once: they must not be changed until `Pending.result` has returned, not even by work that
        is queued on that stream, which does not wait for the pipeline.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way and free what the pipeline holds. Pending results stay
        readable; `submit` raises EngineError from now on.
        """
