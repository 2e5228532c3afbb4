"""Raw channels-last maps to candidates over a confidence; definition in ops/decode.py.

Two launches for up to three heads, because few cells hold an object:

1. `filter_kernel` reads only the objectness of every anchor of every cell, compares it raw with a
   bound that errs a little on the side of passing, and lists what passes, image by image.
2. `append_kernel` gives each listed anchor a warp with a class to a thread: exact scores in
   float64, and a box where one of them passes. Candidates are appended by one atomic per anchor.

Nothing depends on the data but the running time: fixed grids, no synchronisation, so both can be
captured in a CUDA graph. The order of an image's candidates is not defined; `numbers` is.

The constants of a network, float64, are compiled in: Triton passes float arguments in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from yolov4_fast.ops.kernels.candidates import append_kernel, filter_kernel
from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import FLOATS, check_dtype, check_same_device, row_stride

HEADS = 3  # of one launch
BLOCK = 256  # anchors of a program of filter_kernel
PROGRAMS = 2048  # of append_kernel, one warp each: about what an H200 holds at once
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Head:
    """One map and its constants. anchors: sizes relative to the input. bound: raw objectness up to
    here cannot pass.
    """

    raw: Tensor  # view [B, h, w, A * (5 + C)]
    anchors: tuple[tuple[float, float], ...]
    scale_x_y: float
    new_coords: bool
    bound: float

    @property
    def cells(self) -> int:
        return self.raw.shape[1] * self.raw.shape[2]

    @property
    def pairs(self) -> int:
        return self.cells * len(self.anchors)

    @property
    def classes(self) -> int:
        return self.raw.shape[3] // len(self.anchors) - 5


def raw_bound(confidence: float, new_coords: bool) -> float:
    """A raw value such that none up to it gives a probability over `confidence` (float32),
    whatever the roundings.
    """
    p = confidence * (1 - 1e-6)
    raw = p if new_coords else math.log(p / (1 - p)) if p > 0 else -math.inf
    return float(np.nextafter(np.float32(raw), np.float32(-np.inf)))


def append(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[tuple[float, float]]],
    scale_x_y: Sequence[float],
    new_coords: Sequence[bool],
    height: int,
    width: int,
    confidence: float,
    placement: Tensor | None,
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    numbers: Tensor,
    counts: Tensor,
) -> None:
    """Fill the buffers with each image's candidates, on their device's current stream, in any
    order. Neither waits for the device nor reads from it.

    maps: views [B, h, w, A * (5 + C)], all float32, float16 or bfloat16. anchors, scale_x_y,
    new_coords, height, width, confidence, placement ([B, 4] float32 on the device): as in
    `ops.decode`. boxes: [B, K, 4] float32. scores: [B, K] float32. class_ids: [B, K] int32.
    numbers: [B, K] int32, a candidate's position among all boxes and classes, (map, anchor, cell,
    class), which orders as `ops.decode` does. counts: [B] int32, how many there are; where that is
    more than K, any K of them were written. The rest of the buffers is left alone.
    Raises ValueError.
    """
    if not maps:
        raise ValueError("decode needs at least one map")
    check_dtype(maps[0], "map 0", FLOATS)
    buffers = (boxes, scores, class_ids, numbers, counts)
    _check_buffers(maps, placement, buffers)
    confidence = float(np.float32(confidence))
    heads = []
    for raw, sizes, scale, new in zip(maps, anchors, scale_x_y, new_coords, strict=True):
        if not sizes or raw.shape[3] % len(sizes) or raw.shape[3] // len(sizes) < 6:
            raise ValueError(
                f"{raw.shape[3]} channels do not divide into {len(sizes)} anchors of 5 + classes"
            )
        relative = tuple((float(w) / width, float(h) / height) for w, h in sizes)
        heads.append(Head(raw, relative, float(scale), new, raw_bound(confidence, new)))
    if sum(head.pairs * head.classes for head in heads) > LARGEST:
        raise ValueError("the maps hold more than 2^31 - 1 boxes and classes an image")
    first_number = 0
    with torch.cuda.device_of(boxes):
        for start in range(0, len(heads), HEADS):
            group = heads[start : start + HEADS]
            _launch(group, confidence, placement, buffers, first_number, reset=start == 0)
            first_number += sum(head.pairs * head.classes for head in group)


def _launch(
    heads: Sequence[Head],
    confidence: float,
    placement: Tensor | None,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    first_number: int,
    reset: bool,
) -> None:
    """Both kernels over up to three heads; those that are not there have no cells."""
    boxes, scores, class_ids, numbers, counts = buffers
    batch, capacity = scores.shape
    absent = HEADS - len(heads)

    def three(values: Sequence[float], filler: float = 0) -> list[float]:
        return [*values, *[filler] * absent]

    pairs = sum(head.pairs for head in heads)
    listed = torch.empty(batch * pairs, dtype=torch.int32, device=boxes.device)
    found = torch.zeros(batch, dtype=torch.int32, device=boxes.device)
    maps = [*(head.raw for head in heads), *[heads[0].raw] * absent]
    cells = three([head.cells for head in heads])
    strides = three([row_stride(head.raw) for head in heads])
    anchors = three([len(head.anchors) for head in heads], 1)
    programs = sum(triton.cdiv(head.pairs, BLOCK) for head in heads)
    filter_kernel[(programs, batch)](
        *maps,
        *cells,
        *strides,
        *anchors,
        *three([5 + head.classes for head in heads]),
        *three([head.bound for head in heads], 0.0),
        listed,
        found,
        counts,
        RESET=reset,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    most_classes = max(head.classes for head in heads)
    block_c = min(128, triton.next_power_of_2(most_classes))
    # Unfused, so that boxes are rounded as on the CPU.
    append_kernel[(min(pairs, triton.cdiv(PROGRAMS, batch)), batch)](
        *maps,
        *cells,
        *three([head.raw.shape[2] for head in heads], 1),
        *strides,
        *anchors,
        *three([head.classes for head in heads]),
        listed,
        found,
        placement,
        boxes,
        scores,
        class_ids,
        numbers,
        counts,
        first_number,
        capacity,
        confidence,
        **_constants(heads),
        CHUNKS=triton.cdiv(most_classes, block_c),
        BLOCK_C=block_c,
        num_warps=1,
        enable_fp_fusion=False,
    )


def _constants(heads: Sequence[Head]) -> dict[str, object]:
    scales = [x for head in heads for x in (head.scale_x_y, (head.scale_x_y - 1) / 2)]
    anchors = [side for head in heads for size in head.anchors for side in size]
    return {
        "SCALES": (*scales, *[0.0] * (2 * HEADS - len(scales))),
        "ANCHORS": tuple(anchors),
        "ANCHOR_COUNT": len(anchors) // 2,
        "NEW_COORDS": sum(head.new_coords << i for i, head in enumerate(heads)),
    }


def _check_buffers(
    maps: Sequence[Tensor], placement: Tensor | None, buffers: Sequence[Tensor]
) -> None:
    batch, capacity = buffers[1].shape
    for index, raw in enumerate(maps):
        stride = row_stride(raw, f"map {index}")
        if raw.dtype != maps[0].dtype or raw.shape[0] != batch:
            raise ValueError(
                f"map {index} must be {maps[0].dtype} with a batch of {batch} like the first, "
                f"not {raw.dtype} {list(raw.shape)}"
            )
        if raw.shape[1] * raw.shape[2] * stride > LARGEST:
            raise ValueError(f"map {index} {list(raw.shape)} has more than 2^31 values an image")
    expected = {
        "boxes": ((batch, capacity, 4), torch.float32),
        "scores": ((batch, capacity), torch.float32),
        "class_ids": ((batch, capacity), torch.int32),
        "numbers": ((batch, capacity), torch.int32),
        "counts": ((batch,), torch.int32),
        "placement": ((batch, 4), torch.float32),
    }
    tensors = (*buffers, placement)
    for (name, (shape, dtype)), tensor in zip(expected.items(), tensors, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {list(shape)} {dtype} and contiguous, not {list(tensor.shape)} "
                f"{tensor.dtype} with strides {list(tensor.stride())}"
            )
    check_same_device([tensor for tensor in (*maps, *tensors) if tensor is not None])


_THREE = ("0", "1", "2")
_MAPS = tuple(f"map{i}" for i in _THREE)
_YOLOV4 = {
    "SCALES": (1.2, 0.1, 1.1, 0.05, 1.05, 0.025),
    "ANCHORS": tuple(side / 416 for side in range(12, 30)),
    "ANCHOR_COUNT": 9,
    "NEW_COORDS": 0,
}


def _filter_variant(dtype: str) -> Variant:
    integers = [f"{name}{i}" for name in ("cells", "stride", "anchors", "entries") for i in _THREE]
    return Variant(
        name=f"decode filter {dtype}",
        kernel=filter_kernel,
        signature={
            **dict.fromkeys(_MAPS, f"*{dtype}"),
            **dict.fromkeys(integers, "i32"),
            **{f"bound{i}": "fp32" for i in _THREE},
            **dict.fromkeys(("listed", "found", "counts"), "*i32"),
        },
        constexprs={"RESET": True, "BLOCK": BLOCK},
        aligned=(*_MAPS, "listed", "found", "counts"),
        num_warps=4,
        minimum_sm=80 if dtype == "bf16" else 75,
    )


def _append_variant(dtype: str, placed: bool, classes: int) -> Variant:
    names = ("cells", "width", "stride", "anchors", "classes")
    integers = [f"{name}{i}" for name in names for i in _THREE]
    outs = {"boxes": "*fp32", "scores": "*fp32"} | dict.fromkeys(
        ("class_ids", "numbers", "counts"), "*i32"
    )
    return Variant(
        name=f"decode append {dtype} {classes} classes{' placed' if placed else ''}",
        kernel=append_kernel,
        signature={
            **dict.fromkeys(_MAPS, f"*{dtype}"),
            **dict.fromkeys((*integers, "first_number", "capacity"), "i32"),
            **dict.fromkeys(("listed", "found"), "*i32"),
            **({"placement": "*fp32"} if placed else {}),
            **outs,
            "confidence": "fp32",
        },
        constexprs={
            **({} if placed else {"placement": None}),
            **_YOLOV4,
            "CHUNKS": -(-classes // 128),
            "BLOCK_C": min(128, triton.next_power_of_2(classes)),
        },
        aligned=(*_MAPS, "listed", "found", *outs, *(("placement",) if placed else ())),
        num_warps=1,
        fp_fusion=False,
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    _filter_variant("fp16"),
    _filter_variant("bf16"),
    _filter_variant("fp32"),
    _append_variant("fp16", False, 80),
    _append_variant("bf16", True, 80),
    _append_variant("fp32", True, 80),
    _append_variant("fp16", True, 3),
    _append_variant("fp16", False, 300),
)
