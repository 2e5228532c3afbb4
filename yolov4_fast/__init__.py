"""YOLOv4 as an optimized inference engine.

>>> from yolov4_fast import Detector
>>> Detector("x.engine").detect("image.jpg")

Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolov4_fast.detections import Detections
    from yolov4_fast.detector import Detector
    from yolov4_fast.engines import build_engine, load_engine

__all__ = ["Detections", "Detector", "build_engine", "load_engine"]

_MODULES = {
    "Detections": "yolov4_fast.detections",
    "Detector": "yolov4_fast.detector",
    "build_engine": "yolov4_fast.engines",
    "load_engine": "yolov4_fast.engines",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
