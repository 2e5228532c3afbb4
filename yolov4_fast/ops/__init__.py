"""Operators on tensors and numbers, one per module with its definition, reference and dispatch.

Importing this needs the compiled operators; `library` says how to build them.
"""

from yolov4_fast.ops.decode import Candidates, decode
from yolov4_fast.ops.diou_nms import diou_nms
from yolov4_fast.ops.pack import pack
from yolov4_fast.ops.resize import placement, resize

__all__ = ["Candidates", "decode", "diou_nms", "pack", "placement", "resize"]
