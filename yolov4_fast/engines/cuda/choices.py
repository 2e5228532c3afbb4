"""Which kernel was the fastest for which step: a table, kept in the user's cache folder and in the
engine file.

A table holds for one environment: the GPU, its driver, the libraries, and our kernels themselves.
Any other is not looked at, so an update measures anew and a file from elsewhere misleads nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from yolov4_fast.engines.cuda.device import Device
from yolov4_fast.files import replacing
from yolov4_fast.zoo import cache_folder

logger = logging.getLogger(__name__)

FORMAT = "yolov4_fast.tuning"
KERNEL_SOURCES = (
    "ops/kernels/*.py",
    *(f"ops/{op}*.py" for op in ("convolution", "mish_bn", "pool", "upsample", "combine")),
    *(f"engines/cuda/{part}*.py" for part in ("kernels", "cudnn")),
)


@dataclass(frozen=True)
class Key:
    """What a choice is for. shape: all of a step that its speed depends on but the batch."""

    shape: str
    batch: int


@dataclass(frozen=True)
class Choice:
    """seconds: as measured; None where it was measured at another batch and here only checked."""

    kernel: str
    seconds: float | None = None


@dataclass
class Choices:
    """The table. environment: what it holds for."""

    environment: Mapping[str, str]
    table: dict[Key, Choice] = field(default_factory=dict)

    def settled(self, key: Key, measure: bool) -> bool:
        """Whether the choice stands. measure: only if it was measured at this very batch."""
        known = self.table.get(key)
        return known is not None and not (measure and known.seconds is None)

    def nearest(self, key: Key) -> Choice | None:
        """What was measured for the same step at the batch that is the nearest by ratio."""
        measured = [
            (abs(math.log(other.batch / key.batch)), other.batch, choice)
            for other, choice in self.table.items()
            if other.shape == key.shape and choice.seconds is not None
        ]
        return min(measured, key=lambda row: row[:2])[2] if measured else None

    def update(self, other: Choices | None) -> None:
        """Take over what another table knows, if it is of the same environment."""
        if other is not None and other.environment == self.environment:
            self.table |= other.table

    def only(self, keys: set[Key]) -> Choices:
        """The part for some keys: what an engine file needs."""
        return Choices(self.environment, {k: c for k, c in self.table.items() if k in keys})

    def to_json(self) -> bytes:
        rows = sorted(self.table.items(), key=lambda item: (item[0].shape, item[0].batch))
        value = {
            "format": FORMAT,
            "environment": dict(self.environment),
            "choices": [[k.shape, k.batch, c.kernel, c.seconds] for k, c in rows],
        }
        return json.dumps(value, indent=0).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Choices:
        """Raises ValueError where the text is none of ours."""
        try:
            value: Any = json.loads(text)
        except ValueError as error:
            raise ValueError(f"is damaged: {error}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("is not a table of choices")
        try:
            table = {
                Key(str(shape), int(batch)): Choice(
                    str(kernel), None if seconds is None else float(seconds)
                )
                for shape, batch, kernel, seconds in value["choices"]
            }
            environment = {str(k): str(v) for k, v in value["environment"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"is damaged: {error!r}") from None
        if any(key.batch < 1 for key in table):
            raise ValueError("is damaged: it holds a batch of less than 1")
        return cls(environment, table)


def environment(device: Device) -> dict[str, str]:
    """All that makes one kernel faster than another on a device."""
    found = device.properties
    return {
        "gpu": found.name,
        "sm": str(found.sm),
        "driver": found.driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
        "cudnn_frontend": _version("nvidia-cudnn-frontend"),
        "kernels": _sources(),
    }


def cache_file(environment: Mapping[str, str], folder: Path | None = None) -> Path:
    """Where the choices of an environment are kept, in the user's cache folder by default."""
    text = json.dumps(dict(environment), sort_keys=True)
    name = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return (folder or cache_folder() / "tuning") / f"{name}-{digest}.json"


def read_choices(environment: Mapping[str, str], folder: Path | None = None) -> Choices:
    """What the cache knows of an environment; empty where it knows nothing. A damaged file is
    named in a warning and measured anew.
    """
    choices = Choices(environment)
    path = cache_file(environment, folder)
    if path.is_file():
        try:
            choices.update(Choices.from_json(path.read_bytes()))
        except (OSError, ValueError) as error:
            logger.warning("%s: %s; the kernels are measured anew", path, error)
    return choices


def write_choices(choices: Choices, folder: Path | None = None) -> None:
    """Add to the cache, keeping what others added meanwhile. Where it cannot be written to, a
    warning says so: the next start measures again.
    """
    merged = read_choices(choices.environment, folder)
    merged.update(choices)
    path = cache_file(choices.environment, folder)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(merged.to_json())
    except OSError as error:
        logger.warning("%s: cannot keep the choice of kernels (%s)", path, error.strerror or error)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _sources() -> str:
    """A digest of the kernels and of what launches them."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for pattern in KERNEL_SOURCES:
        for file in sorted(package.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
