"""The YOLOv3 and YOLOv4 families, written out in readable Python.

Every function returns a `Network` whose layers stand in the order of the official cfg of that name,
so official weights fit layer by layer. Channel and repeat counts scale with `width_multiple` and
`depth_multiple` (channels are rounded to multiples of 8). Sources: the YOLOv4 paper (arXiv
2004.10934), Scaled-YOLOv4 (2011.08036), YOLOv3 (1804.02767) and the cfgs of AlexeyAB/darknet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from yolov4_fast.network.architectures.builder import Anchors, Builder
from yolov4_fast.network.architectures.scaled import yolov4_csp, yolov4x_mish
from yolov4_fast.network.architectures.switches import Switches
from yolov4_fast.network.architectures.tiny import (
    TINY_ANCHORS,
    yolov3_tiny,
    yolov4_tiny,
    yolov4_tiny_3l,
)
from yolov4_fast.network.architectures.yolov3 import YOLOV3_ANCHORS, yolov3, yolov3_spp
from yolov4_fast.network.architectures.yolov4 import (
    YOLOV4_ANCHORS,
    YOLOV4_TRAINING,
    yolov4,
    yolov4_nano,
    yolov4_seed_leaky,
    yolov4_seed_mish,
)
from yolov4_fast.network.layers import Network

__all__ = [
    "ARCHITECTURES",
    "NAMES",
    "TINY_ANCHORS",
    "YOLOV3_ANCHORS",
    "YOLOV4_ANCHORS",
    "YOLOV4_TRAINING",
    "Anchors",
    "Builder",
    "Switches",
    "by_name",
    "settings_of",
    "yolov3",
    "yolov3_spp",
    "yolov3_tiny",
    "yolov4",
    "yolov4_csp",
    "yolov4_nano",
    "yolov4_seed_leaky",
    "yolov4_seed_mish",
    "yolov4_tiny",
    "yolov4_tiny_3l",
    "yolov4x_mish",
]

ARCHITECTURES: dict[str, Callable[..., Network]] = {
    "yolov4": yolov4,
    "yolov4-tiny": yolov4_tiny,
    "yolov4-tiny-3l": yolov4_tiny_3l,
    "yolov4-csp": yolov4_csp,
    "yolov4x-mish": yolov4x_mish,
    "yolov4-nano": yolov4_nano,
    "yolov4-seed-leaky": yolov4_seed_leaky,
    "yolov4-seed-mish": yolov4_seed_mish,
    "yolov3": yolov3,
    "yolov3-spp": yolov3_spp,
    "yolov3-tiny": yolov3_tiny,
}
NAMES = tuple(ARCHITECTURES)


def by_name(name: str, **settings: Any) -> Network:
    """The architecture of that name; settings (num_classes, width, height, ...) go to its function,
    in the YOLOv4 family those of `Switches` too.

    Raises ValueError for a name or a setting that does not exist.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture is called {name!r}; there are {', '.join(NAMES)}")
    known = settings_of(name)
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} takes no {setting!r}, but {', '.join(known)}")
    return ARCHITECTURES[name](**settings)


def settings_of(name: str) -> tuple[str, ...]:
    """The settings that the architecture of that name takes."""
    parameters = inspect.signature(ARCHITECTURES[name]).parameters.values()
    plain = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    switches = tuple(field.name for field in fields(Switches))
    return plain + (switches if len(plain) < len(parameters) else ())
