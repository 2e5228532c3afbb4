"""What the slots of a pipeline have in common: the engine, the lanes, the sizes of buffers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from yolov4_fast.engines.cuda.runtime import Lane, Runtime
from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.engines.pipeline import Settings
from yolov4_fast.network.layers import Network
from yolov4_fast.ops.diou_nms import MAX_CANDIDATES

logger = logging.getLogger(__name__)

CANDIDATES = 2 * MAX_CANDIDATES  # of an image, at first
ROWS = 256  # detections of an image that are copied to the host, at first


class Runs(Protocol):
    """The network for one batch size; see `cuda.executor.Executor`."""

    @property
    def image(self) -> Tensor: ...

    @property
    def maps(self) -> tuple[Tensor, ...]: ...

    def run(self) -> None: ...


class Runner(Protocol):
    """What a pipeline needs of its engine; see `cuda.engine.CudaEngine`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def network(self) -> Network: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def max_batch(self) -> int: ...

    def executor(self, batch: int) -> Runs: ...

    def exclusive(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Limits:
    """How much the buffers of a slot take for each image."""

    candidates: int
    rows: int  # detections

    def beyond(self, packed: np.ndarray, most: int) -> Limits | None:
        """What would do for a result [B, rows + 1, 6] that these cut short; None where they did.

        most: detections that NMS can keep.
        """
        kept, found = packed[:, 0, :2].max(0).astype(int).tolist()
        if found > self.candidates:
            return replace(self, candidates=1 << (found - 1).bit_length())
        if kept == self.rows < most:  # there may have been more
            return replace(self, rows=min(4 * self.rows, most))
        return None


class Line:
    """lanes: `inward` copies to the device, `compute` runs there, `outward` copies back."""

    def __init__(self, engine: Runner, settings: Settings, runtime: Runtime) -> None:
        self.engine = engine
        self.settings = settings
        self.runtime = runtime
        self.inward, self.compute, self.outward = (runtime.lane() for _ in range(3))
        self.most = min(settings.max_detections or MAX_CANDIDATES, MAX_CANDIDATES)
        self.limits = Limits(CANDIDATES, min(ROWS, self.most))
        self._guard = threading.Lock()
        self._told = False

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.inward, self.compute, self.outward

    def widen(self, limits: Limits) -> None:
        with self._guard:
            self.limits = Limits(
                max(self.limits.candidates, limits.candidates), max(self.limits.rows, limits.rows)
            )

    @contextmanager
    def memory_for(self, batch: int) -> Iterator[None]:
        """Says what to do where the device's memory does not suffice."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.engine.device} has too little free memory to detect in {batch} images at "
                f"once: give fewer, or build the engine with a smaller max_batch ({error})"
            ) from None

    def tell(self, found: int) -> None:
        """Warn, once, of candidates that NMS did not look at."""
        with self._guard:
            told, self._told = self._told, True
        if not told:
            logger.warning(
                "an image has %d candidates over the confidence of %g: NMS looks at the best %d of "
                "each image, and leaves out the others; a higher confidence finds fewer",
                found, self.settings.confidence, MAX_CANDIDATES,
            )  # fmt: skip
