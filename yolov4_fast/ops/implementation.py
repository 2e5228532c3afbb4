"""Which implementation runs of an op that has a compiled one for the CPU and a Triton kernel."""

from typing import Literal, get_args

from torch import Tensor

from yolov4_fast.ops.views import uses_kernel

Implementation = Literal["extension", "kernel", "reference"]


def choose(x: Tensor, asked: Implementation | None) -> Implementation:
    """What was asked for, or else the kernel for a CUDA tensor and the extension for any other.

    Raises ValueError where that cannot run on x.
    """
    chosen = asked or ("kernel" if x.is_cuda else "extension")
    if chosen not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {', '.join(get_args(Implementation))}, not {chosen!r}"
        )
    if chosen == "kernel":
        uses_kernel(x, chosen)
    if chosen == "extension" and x.device.type != "cpu":
        raise ValueError(
            f"the extension runs on CPU tensors, not on {x.device}; leave implementation out, or "
            "ask for 'kernel' or 'reference'"
        )
    return chosen
