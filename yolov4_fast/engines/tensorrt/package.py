"""The installed TensorRT: its module, imported only when an engine asks for it, and its version."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from yolov4_fast.engines.engine import EngineError

OLDEST = (10, 13)
INSTALL = "pip install tensorrt"


def load_tensorrt() -> Any:
    """The module `tensorrt`. Raises EngineError where it is absent, cannot be loaded or is too old.

    Version 10 and version 11 are both served by what they have in common.
    """
    try:
        trt = import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name not in ("tensorrt", "tensorrt_bindings"):
            raise
        raise EngineError(f"the tensorrt engine needs TensorRT: {INSTALL}") from None
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(
            f"TensorRT is installed but cannot be loaded ({' '.join(str(error).split())}): its "
            f"libraries come with: {INSTALL}"
        ) from None
    if not hasattr(trt, "__version__"):  # a folder of that name on sys.path
        raise EngineError(f"the tensorrt engine needs TensorRT: {INSTALL}")
    if version_of(trt) < OLDEST:
        raise EngineError(
            f"TensorRT {trt.__version__} is too old: the tensorrt engine needs "
            f"{'.'.join(map(str, OLDEST))} or newer: {INSTALL}"
        )
    return trt


def version_of(trt: Any) -> tuple[int, ...]:
    """(10, 16, 1, 11) of "10.16.1.11"; what follows a letter is left out."""
    numbers = re.match(r"\d+(?:\.\d+)*", trt.__version__)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
