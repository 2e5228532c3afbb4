"""The arena of one batch size: a plan's views as tensors over one block of bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from yolov4_fast.engines.cuda.place import Placement
from yolov4_fast.engines.cuda.plan import Plan, View
from yolov4_fast.engines.engine import EngineError

NAN_BYTE = 0xFF  # repeated it is NaN in float32, float16, bfloat16 and float8_e4m3fn alike


class Memory:
    """Views of a plan for `batch` images of `dtype` elements.

    storage: uint8, of at least placement.bytes(batch, dtype.itemsize); memories of several batch
    sizes may share one, and then only one of them may be in use at a time. A new one on `device` by
    default. dtypes: of buffers that have another type, by number; each must fit in the space that
    was placed for it. Raises EngineError for a storage that does not do.

    Buffers share memory over time: an image written before a run is gone after it, and only the
    maps may be read then.
    """

    def __init__(
        self,
        plan: Plan,
        placement: Placement,
        batch: int,
        dtype: torch.dtype,
        storage: Tensor | None = None,
        device: str | torch.device = "cpu",
        dtypes: Mapping[int, torch.dtype] | None = None,
    ) -> None:
        needed = placement.bytes(batch, dtype.itemsize)
        if storage is None:
            storage = torch.empty(needed, dtype=torch.uint8, device=device)
        if storage.dtype != torch.uint8 or storage.ndim != 1 or not storage.is_contiguous():
            raise EngineError(
                f"storage must be contiguous [bytes] torch.uint8, not {list(storage.shape)} "
                f"{storage.dtype}"
            )
        if storage.numel() < needed:
            raise EngineError(
                f"a batch of {batch} needs {needed:,} bytes, the storage has {storage.numel():,}"
            )
        self.plan = plan
        self.batch = batch
        self.dtype = dtype
        self.storage = storage
        self._buffers = tuple(
            self._buffer(placement, number, (dtypes or {}).get(number, dtype))
            for number in range(len(plan.buffers))
        )

    def _buffer(self, placement: Placement, number: int, dtype: torch.dtype) -> Tensor:
        buffer = self.plan.buffers[number]
        unit = placement.unit(self.dtype.itemsize) * self.batch
        begin, space = placement.offsets[number] * unit, placement.sizes[number] * unit
        shape = (self.batch, buffer.height, buffer.width, buffer.channels)
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > space:
            raise EngineError(
                f"buffer {number} as {dtype} needs {size:,} bytes, but {space:,} were placed"
            )
        return self.storage[begin : begin + size].view(dtype).view(shape)

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def tensor(self, view: View) -> Tensor:
        """[B, height, width, channels], channels-last: a slice of its buffer's rows."""
        return self._buffers[view.buffer][..., view.offset : view.end]

    @property
    def image(self) -> Tensor:
        """[B, height, width, 3], to be written before a run."""
        return self.tensor(self.plan.image)

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """[B, height, width, A * (5 + classes)] of each head, to be read after a run."""
        return tuple(self.tensor(view) for view in self.plan.maps)

    def poison(self) -> None:
        """Fill the storage with NaN, so that whatever reads what nothing wrote is found out."""
        self.storage.fill_(NAN_BYTE)
