"""Images of a chunk on their way to the device: one pinned block, one block of the device, one copy
between them.

Both blocks hold, for a chunk run as a batch of B:

    table       [B, 12] int64, where each image lies and where it goes: `ops.kernels.resize`
    placement   [B, 4] float32, how boxes return to the image: `ops.resize.placement`
    pixels      of the images that lie in host memory, as they lie there, each on a line of 256

Images that lie on the device are not copied: the table points to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.runtime import Lane, Runtime
from yolov4_fast.ops.resize import Mode, placement, region

COLUMNS = 12  # of the table
ROW = COLUMNS * 8 + 4 * 4  # bytes of the table and of the placement for one image
LINE = 256  # bytes; what the pixels of an image are aligned to
FULL_HD = 1920 * 1080 * 3  # bytes of a usual large picture, uint8

Region = tuple[int, int, int, int]  # top, left, height, width on the canvas


class Staging:
    """Grows with the largest chunk; `fill` then says that the tensors of before are gone."""

    def __init__(self, runtime: Runtime, lane: Lane, canvas: tuple[int, int, Mode]) -> None:
        """lane: does the copies. canvas: height and width of the network's input, resize mode."""
        self._runtime = runtime
        self._lane = lane
        self._canvas = canvas
        self._host = torch.empty(0, dtype=torch.uint8)
        self._device = self._host

    def fill(self, images: Sequence[Tensor], batch: int) -> bool:
        """Take in images, each [H, W, 3] uint8 or float32, and enqueue the copy; host memory is not
        read after. Returns whether both blocks are new.

        batch: at least as many; the last image stands in the remaining rows too. The lane's last
        copy and what read the block must be done, as far as the host knows.
        """
        layouts = [None if self._runtime.holds(image) else dense(image) for image in images]
        begin = _lines(batch * ROW)
        begins = []
        for layout in layouts:
            begins.append(begin)
            begin += 0 if layout is None else _lines(layout.nbytes)
        moved = self._reserve(begin)
        rows, ways = [], []
        for image, layout, start in zip(images, layouts, begins, strict=True):
            size = (image.shape[0], image.shape[1])
            where, way = fit(size, *self._canvas)
            if layout is not None:
                pixels = slice(start, start + layout.nbytes)
                self._host[pixels].view(layout.dtype).view(layout.shape).copy_(layout)
                there = self._device[pixels].view(layout.dtype).view(layout.shape)
                image = there if layout is image else there.permute(1, 2, 0)
            rows.append(self._runtime.table_row(image, where))
            ways.append(way)
        spare = batch - len(images)
        self._table(self._host, batch).numpy()[:] = rows + rows[-1:] * spare
        self._placement(self._host, batch).numpy()[:] = ways + ways[-1:] * spare
        self._lane.copy(self._device[:begin], self._host[:begin])
        return moved

    def table(self, batch: int) -> Tensor:
        """On the device, [B, 12] int64."""
        return self._table(self._device, batch)

    def placement(self, batch: int) -> Tensor:
        """On the device, [B, 4] float32."""
        return self._placement(self._device, batch)

    def _reserve(self, size: int) -> bool:
        if size <= len(self._host):
            return False
        size = max(size, len(self._host) * 3 // 2)  # else each larger picture would be a new block
        self._host = self._runtime.host(size, dtype=torch.uint8)
        self._device = self._runtime.memory(size, dtype=torch.uint8, lane=self._lane)
        return True

    @staticmethod
    def _table(block: Tensor, batch: int) -> Tensor:
        return block[: batch * COLUMNS * 8].view(torch.int64).view(batch, COLUMNS)

    @staticmethod
    def _placement(block: Tensor, batch: int) -> Tensor:
        return block[batch * COLUMNS * 8 : batch * ROW].view(torch.float32).view(batch, 4)


def dense(image: Tensor) -> Tensor:
    """The image as it lies in memory, so that copying it is one run: [H, W, 3] or [3, H, W], where
    it has gaps in neither order.
    """
    planes = image.permute(2, 0, 1)
    return planes if planes.is_contiguous() and not image.is_contiguous() else image


@lru_cache(maxsize=1024)
def fit(
    size: tuple[int, int], height: int, width: int, mode: Mode
) -> tuple[Region, tuple[float, ...]]:
    """Where an image of size (height, width) goes, and how its boxes return."""
    way = placement([size], height, width, mode)[0]
    return region(size, height, width, mode), tuple(way.tolist())


def image_bytes() -> int:
    """That each image of a chunk takes in a block, if it is a picture of full HD."""
    return _lines(ROW) + _lines(FULL_HD)


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
