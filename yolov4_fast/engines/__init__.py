"""Engines: how a network is run.

`build_engine` makes one, `load_engine` reads one from its file.
"""

from yolov4_fast.engines.build import build_engine, load_engine
from yolov4_fast.engines.bundle import EngineFileError
from yolov4_fast.engines.engine import Engine, EngineError, Manifest

__all__ = [
    "Engine",
    "EngineError",
    "EngineFileError",
    "Manifest",
    "build_engine",
    "load_engine",
]
