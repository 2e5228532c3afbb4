"""The times that TensorRT measured for its kernels, kept between builds.

One file for each version of TensorRT and each kind of GPU, as times of another tell nothing here. A
cache that cannot be read or written costs time, never the plan: one warning says so.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from yolov4_fast.engines.tensorrt.options import TensorRtOptions
from yolov4_fast.files import replacing
from yolov4_fast.zoo import cache_folder

logger = logging.getLogger(__name__)


class TimingCache:
    """The cache of one build: `attach` it before, `store` it after."""

    def __init__(self, path: Path, config: Any) -> None:
        self.path: Path | None = path
        self._config = config
        self._before = b""

    def attach(self) -> None:
        """Give the build what is known; what cannot be used is left out, with a warning."""
        self._before = self._read()
        cache = self._config.create_timing_cache(self._before)
        if cache is None or not self._config.set_timing_cache(cache, False):
            self._tell("is damaged or of another GPU or TensorRT; kernels are timed anew")
            self._config.set_timing_cache(self._config.create_timing_cache(b""), False)

    def store(self) -> None:
        """Keep what is known now, with what other builds added meanwhile."""
        cache = self._config.get_timing_cache()
        if self.path is None or cache is None:
            return
        now = self._read()
        if now != self._before:
            others = self._config.create_timing_cache(now)
            if others is not None:
                cache.combine(others, False)
        content = cache.serialize()
        if self.path is None or content is None or bytes(content) == now:
            return
        try:
            with replacing(self.path) as temporary:
                temporary.write_bytes(bytes(content))
        except OSError as error:
            self._tell(f"cannot keep the timings of kernels ({error.strerror or error})")

    def _read(self) -> bytes:
        if self.path is None:
            return b""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._tell(f"cannot be read ({error.strerror or error}); kernels are timed anew")
            self.path = None  # nor is it written, or told of again
            return b""

    def _tell(self, what: str) -> None:
        logger.warning("%s: %s", self.path, what)


def cache_path(options: TensorRtOptions, version: str, gpu_name: str, sm: int) -> Path | None:
    """The file of the options' cache; None where there is to be none."""
    if options.timing_cache is None or isinstance(options.timing_cache, Path):
        return options.timing_cache
    name = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    try:
        return cache_folder() / "tensorrt" / f"{name}-sm{sm}-{version}.timings"
    except RuntimeError as error:  # a user without a home
        logger.warning("no cache folder to keep the timings of kernels in (%s)", error)
        return None
