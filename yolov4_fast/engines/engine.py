"""What an engine is: something that maps a batch of images to the raw maps of a network's heads.

Everything before (`ops.resize`) and after (`ops.decode`, `ops.diou_nms`) is the same behind every
engine, so the engines differ in nothing but how the network itself is run. `Manifest` is what is
known about an engine without running it; the engine file carries it as JSON.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self, get_args

import numpy as np
import torch
from torch import Tensor

from yolov4_fast.network.layers import Network
from yolov4_fast.ops.resize import Mode

if TYPE_CHECKING:
    from yolov4_fast.engines.pipeline import Pipeline, Settings
    from yolov4_fast.engines.tensorrt.options import TensorRtOptions

RESIZE_MODES: tuple[Mode, ...] = get_args(Mode)


class EngineError(ValueError):
    """An engine asked for what it cannot do; the message says what it can."""


class DeviceError(EngineError):
    """A device that is not there, or that the engine does not run on."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an engine is made for and made of.

    Raises EngineError when the parts do not fit together.
    """

    kind: str  # "torch" | "openvino" | "cuda" | "tensorrt"
    network: Network  # batch normalisation folded; its width and height are the input's
    class_names: tuple[str, ...]
    resize: Mode
    precision: str  # "f32" | "bf16" | "fp16" | "fp8" | "int8"
    max_batch: int
    confidence: float = 0.25  # thresholds for detection where the caller names none
    iou: float = 0.45
    versions: Mapping[str, str] = field(default_factory=dict)  # of what built it
    gpu: Mapping[str, str] | None = None  # name and SM of the GPU it is bound to

    def __post_init__(self) -> None:
        if not self.network.heads:
            raise EngineError("the network has no detection head: an engine needs at least one")
        if self.network.channels != 3:
            raise EngineError(
                f"the network reads {self.network.channels} channels: images are RGB, it must be 3"
            )
        if len(self.class_names) != self.network.num_classes:
            raise EngineError(
                f"{len(self.class_names)} class names for a network of "
                f"{self.network.num_classes} classes: give one name per class"
            )
        if self.resize not in RESIZE_MODES:
            raise EngineError(f"resize {self.resize!r} is not one of {', '.join(RESIZE_MODES)}")
        if self.max_batch < 1:
            raise EngineError(f"max_batch {self.max_batch}: it must be at least 1")
        for name, value in (("confidence", self.confidence), ("iou", self.iou)):
            if not 0 <= value <= 1:
                raise EngineError(f"{name} {value}: it must lie in 0..1")


Payload = dict[str, bytes]  # the named members of an engine file


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an engine is to be made with, beside its network and weights.

    images: to calibrate with, [B, 3, height, width] float32 in 0..1. progress: whether to show how
    far a long build has come.
    """

    images: Iterable[Tensor] | None = None
    calibration_method: str | None = None
    device: str | None = None
    tensorrt: TensorRtOptions | None = None
    progress: bool = False


class Engine(ABC):
    """Runs a network on batches of up to `max_batch` images. Several threads may use one engine at
    once.

    A kind of engine is built from its payload, the named members that its file holds beside the
    manifest; `payload` makes them of a folded network and its weights.
    """

    kind: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    members: ClassVar[tuple[str, ...]]  # names in the payload

    @abstractmethod
    def __init__(
        self, manifest: Manifest, payload: Mapping[str, bytes], device: str | None = None
    ) -> None:
        """Make ready to run. Raises DeviceError for a device that will not do, else EngineError."""

    manifest: Manifest
    device: torch.device  # where `run` takes its images and leaves its maps

    @staticmethod
    @abstractmethod
    def default_precision() -> str:
        """The fastest precision that this machine runs and that keeps the detections."""

    @staticmethod
    def payload(network: Network, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Members of the engine file for a folded network and its state dict, of a kind whose
        `make` needs to know no more.
        """
        raise NotImplementedError

    @classmethod  # noqa: B027
    def check_device(cls, device: str | None) -> None:
        """Raise DeviceError where the engine cannot run on this device, or on this machine at all:
        as far as that can be told before there is a network. Most kinds run everywhere.
        """

    @classmethod
    def calibrate(
        cls,
        manifest: Manifest,
        state: Mapping[str, Tensor],
        images: Iterable[Tensor],
        device: str | None = None,
        method: str | None = None,
    ) -> dict[str, bytes]:
        """Members of the engine file that a precision of 8 bits needs beside its weights, or in
        place of those of `payload`.

        state: of the manifest's folded network. images: [B, 3, height, width] float32 in 0..1.
        device: what the engine will be made for. method: how the scales are found, of those that
        the engine has.
        """
        raise EngineError(f"the {cls.kind} engine needs no calibration images")

    @classmethod
    def make(cls, manifest: Manifest, state: Mapping[str, Tensor], request: Request) -> Payload:
        """All members of the engine file for the manifest's folded network."""
        payload = cls.payload(manifest.network, state)
        if request.images is not None:
            payload |= cls.calibrate(
                manifest, state, request.images, request.device, request.calibration_method
            )
        return payload

    def learnt(self) -> dict[str, bytes]:
        """Members of the engine file that came to be while the engine was made ready to run: the
        next start is then faster.
        """
        return {}

    def pipeline(self, settings: Settings) -> Pipeline | None:
        """A way of the engine's own from images to what is found in them; None where the stages,
        one after the other, are the best there is.
        """
        return None

    @abstractmethod
    def _run(self, images: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards."""

    def run(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raw maps, one [B, A * (5 + classes), h, w] float32 per head in the network's order.

        images: [B, 3, height, width] float32 in 0..1 on the engine's device, 1 <= B <= max_batch.
        The maps belong to the caller: later runs leave them alone. Raises EngineError.
        """
        shape = (3, self.height, self.width)
        if images.ndim != 4 or images.shape[1:] != shape or images.dtype != torch.float32:
            raise EngineError(
                f"the engine runs [B, {', '.join(map(str, shape))}] torch.float32, "
                f"not {list(images.shape)} {images.dtype}"
            )
        if not 1 <= images.shape[0] <= self.max_batch:
            raise EngineError(
                f"a batch of {images.shape[0]} images: this engine runs 1 to {self.max_batch}"
            )
        return self._run(images)

    @property
    def network(self) -> Network:
        return self.manifest.network

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    @property
    def height(self) -> int:
        return self.manifest.network.height

    @property
    def width(self) -> int:
        return self.manifest.network.width

    @property
    def resize(self) -> Mode:
        return self.manifest.resize

    @property
    def max_batch(self) -> int:
        return self.manifest.max_batch

    @property
    def precision(self) -> str:
        return self.manifest.precision

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.width}x{self.height}, {self.precision} on {self.device}, "
            f"max_batch={self.max_batch})"
        )


def check_finite(name: str, values: Tensor | np.ndarray) -> None:
    """Raise EngineError where weights hold NaN or infinity."""
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    with np.errstate(all="ignore"):
        # One cheap pass for the usual case: a sum is finite only if its terms are.
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return
    bad = values.size - int(np.isfinite(values).sum())
    raise EngineError(
        f"the weights hold NaN or infinity: {name}, {bad} of {values.size} values; "
        "train or convert the model again"
    )
