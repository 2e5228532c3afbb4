"""The shapes that a plan is built for: least, usual and largest of each open side of an input."""

from __future__ import annotations

from yolov4_fast.engines.engine import EngineError
from yolov4_fast.engines.tensorrt.options import TensorRtOptions

OPEN = -1
CHANNELS = 3

Shape = tuple[int, ...]


def profile_shapes(
    name: str, shape: Shape, options: TensorRtOptions, max_batch: int
) -> tuple[Shape, Shape, Shape] | None:
    """Least, usual and largest shape of an input of the network; None where no side is open.

    shape: [N, 3, H, W] or [N, H, W, 3], -1 where a side is open. Raises EngineError where what is
    open and what is asked for do not fit.
    """
    if len(shape) != 4 or CHANNELS not in (shape[1], shape[3]):
        raise EngineError(
            f"the input {name} is {list(shape)}: images are [N, 3, height, width] or "
            "[N, height, width, 3]"
        )
    height, width = (2, 3) if shape[1] == CHANNELS else (1, 2)
    _check_sizes(name, shape, options, (height, width))
    if shape[0] not in (OPEN, max_batch):
        raise EngineError(
            f"the model runs batches of {shape[0]} only, not of up to {max_batch}: set max_batch "
            f"{shape[0]}, or export it with an open batch"
        )
    if OPEN not in shape:
        return None
    least, usual, largest = (list(shape) for _ in range(3))
    for sides, batch in zip((least, usual, largest), options.batches(max_batch), strict=True):
        if shape[0] == OPEN:
            sides[0] = batch
    if options.sizes is not None:
        for sides, size in zip((least, usual, largest), options.sizes, strict=True):
            sides[width], sides[height] = size
    return tuple(least), tuple(usual), tuple(largest)


def _check_sizes(name: str, shape: Shape, options: TensorRtOptions, sides: tuple[int, int]) -> None:
    open_sides = [shape[side] == OPEN for side in sides]
    if any(open_sides) and options.sizes is None:
        raise EngineError(
            f"height and width of the input {name} are open: give min_size, opt_size and max_size"
        )
    if options.sizes is not None and not all(open_sides):
        raise EngineError(
            f"the input {name} is {list(shape)}, of a fixed height and width: leave out min_size, "
            "opt_size and max_size, or export it with open ones"
        )
