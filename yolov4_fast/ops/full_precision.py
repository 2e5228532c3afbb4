"""full_precision: float32 convolutions on CUDA are not done in TF32, which keeps ten bits.

torch has one switch for the whole process. So that threads may be within at once, the first that
enters turns it and the last that leaves turns it back. (torch's own `cudnn.flags` may not be nested
in it: it refuses to read a switch that is turned for convolutions alone.)
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_guard = threading.Lock()
_within = 0
_before = ""


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 convolutions within it are full float32, of this thread and of all others."""
    global _within, _before
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with _guard:
        if not _within:
            _before, switch.fp32_precision = switch.fp32_precision, "ieee"
        _within += 1
    try:
        yield
    finally:
        with _guard:
            _within -= 1
            if not _within:
                switch.fp32_precision = _before
