"""The arena of a plan: where views lie, what they look like, what storage is refused."""

from __future__ import annotations

import pytest
import torch

from yolov4_fast.engines.cuda.memory import Memory
from yolov4_fast.engines.cuda.place import place
from yolov4_fast.engines.cuda.plan import Buffer, Plan, Upsample, View
from yolov4_fast.engines.engine import EngineError

IMAGE, SLICE, MAP = View(0, 0, 3), View(1, 8, 5), View(2, 0, 6)
PLAN = Plan(
    (Buffer(4, 6, 3), Buffer(4, 6, 16), Buffer(2, 3, 8)),
    (
        Upsample(layers=(), source=IMAGE, out=View(1, 8, 3), factor=1),
        Upsample(layers=(), source=SLICE, out=MAP, factor=1),
    ),
    IMAGE,
    (MAP,),
)
PLACEMENT = place(PLAN)
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_views(dtype: torch.dtype, batch: int) -> None:
    memory = Memory(PLAN, PLACEMENT, batch, dtype)
    assert memory.image.shape == (batch, 4, 6, 3) and memory.image.is_contiguous()
    view = memory.tensor(SLICE)
    assert view.shape == (batch, 4, 6, 5) and view.dtype == dtype
    assert view.stride() == (4 * 6 * 16, 6 * 16, 16, 1)
    begin = view.data_ptr() - memory.storage.data_ptr()
    assert begin == (PLACEMENT.offsets[1] * batch + 8) * dtype.itemsize
    (raw,) = memory.maps
    assert raw.shape == (batch, 2, 3, 6) and raw.stride() == (48, 24, 8, 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_poison_is_nan_in_every_type(dtype: torch.dtype) -> None:
    memory = Memory(PLAN, PLACEMENT, 2, dtype)
    memory.storage.zero_()
    memory.poison()
    for tensor in (memory.image, memory.tensor(SLICE), *memory.maps):
        assert tensor.float().isnan().all()


def test_batch_sizes_share_a_storage() -> None:
    storage = torch.empty(PLACEMENT.bytes(4, 2), dtype=torch.uint8)
    pointers = {
        Memory(PLAN, PLACEMENT, batch, torch.float16, storage).storage.data_ptr()
        for batch in (1, 2, 4)
    }
    assert pointers == {storage.data_ptr()}
    with pytest.raises(EngineError, match=r"a batch of 5 needs [\d,]+ bytes, the storage has"):
        Memory(PLAN, PLACEMENT, 5, torch.float16, storage)


def test_views_of_different_buffers_alive_together_are_apart() -> None:
    memory = Memory(PLAN, PLACEMENT, 2, torch.float32)
    memory.tensor(View(1, 0, 16)).fill_(1)
    memory.maps[0].fill_(2)
    assert (memory.tensor(View(1, 0, 16)) == 1).all() and (memory.maps[0] == 2).all()


def test_buffers_of_other_types() -> None:
    half = {0: torch.float16, 2: torch.float16}
    placement = place(PLAN, (2, 1, 2))
    memory = Memory(PLAN, placement, 3, torch.float8_e4m3fn, dtypes=half)
    assert memory.storage.numel() == 3 * placement.peak
    assert memory.image.dtype == memory.maps[0].dtype == torch.float16
    assert memory.tensor(SLICE).dtype == torch.float8_e4m3fn
    memory.poison()
    assert memory.maps[0].isnan().all() and memory.tensor(SLICE).float().isnan().all()
    with pytest.raises(EngineError, match=r"buffer 1 as torch.float32 needs .* were placed"):
        Memory(PLAN, placement, 3, torch.float8_e4m3fn, dtypes={1: torch.float32})


@pytest.mark.parametrize(
    "storage",
    [
        torch.empty(9999, dtype=torch.float32),
        torch.empty(99, 99, dtype=torch.uint8),
        torch.empty(9999, dtype=torch.uint8)[::2],
    ],
)
def test_storage_must_be_bytes(storage: torch.Tensor) -> None:
    with pytest.raises(EngineError, match=r"storage must be contiguous \[bytes\] torch.uint8"):
        Memory(PLAN, PLACEMENT, 1, torch.float16, storage)
