"""decode: the raw maps of a network to candidate boxes over a confidence.

A map holds for each anchor tx, ty, tw, th, objectness to and class logits; cell (i, j) of an h x w
map and an anchor of pw x ph input pixels give, with s = scale_x_y and relative to the W x H input:

    x = (sigmoid(tx) * s - (s - 1) / 2 + j) / w        width  = exp(tw) * pw / W
    y = (sigmoid(ty) * s - (s - 1) / 2 + i) / h        height = exp(th) * ph / H
    score of class c = sigmoid(to) * sigmoid(tc)

With `new_coords` (Scaled-YOLOv4) the convolution has applied the logistic already: no sigmoid here,
and the width is (2 * tw)^2 * pw / W. A candidate is a cell, anchor and class with objectness >
confidence and score > confidence, both strict: one cell can give several classes. (Bochkovskiy et
al. 2020, section 3.4, "eliminate grid sensitivity"; AlexeyAB/darknet, `get_yolo_box` and
`get_yolo_detections`.)

Scores and boxes are computed in float64, rounded to float32, and only then compared, so that every
implementation finds the same candidates. NaN never makes a candidate, nor does a box that is not
finite.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import yolov4_fast.ops.library  # noqa: F401  registers the operator
from yolov4_fast.ops.implementation import Implementation, choose

FIRST_ROOM = 1024  # candidates an image that the kernel gets room for before their number is known


class Candidates(NamedTuple):
    """Boxes over the confidence by map, anchor, cell (row by row) and class, then padding."""

    boxes: Tensor  # [B, K, 4] float32 xyxy relative to the original image, not clipped; padding 0
    scores: Tensor  # [B, K] float32; padding 0
    class_ids: Tensor  # [B, K] int32; padding -1
    counts: Tensor  # [B] int32; over K where the capacity was too small for all


def decode(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[tuple[float, float]]],
    scale_x_y: Sequence[float],
    new_coords: Sequence[bool],
    height: int,
    width: int,
    confidence: float,
    placement: Tensor | None = None,
    capacity: int = 0,
    *,
    implementation: Implementation | None = None,
) -> Candidates:
    """Decode the maps of all heads.

    maps: each [B, A * (5 + C), h, w] float32, read in place whatever the strides (by the kernel:
    where they lie channels-last).
    anchors, scale_x_y, new_coords: of each map; anchors (width, height) in pixels of the input.
    height, width: of the network's input in pixels. confidence: in 0..1.
    placement: [B, 4] float32 from `placement`, or None for boxes relative to the network's input.
    capacity: K. 0 makes it the largest count (a size that depends on the data); otherwise an
    image's candidates beyond the first K are left out, and its count says how many there were.
    implementation: None is the kernel for CUDA maps and the extension for others. The kernel waits
    for the device to know the counts; ops/kernels/decode.py has the part of it that does not.
    Raises ValueError.
    """
    _check(maps, anchors, scale_x_y, new_coords, height, width, confidence, placement, capacity)
    chosen = choose(maps[0], implementation)
    placement = None if placement is None else placement.to(maps[0].device)
    if chosen == "kernel":
        return _decode_kernel(
            maps, anchors, scale_x_y, new_coords, height, width, confidence, placement, capacity
        )
    if chosen == "reference":
        return decode_reference(
            maps, anchors, scale_x_y, new_coords, height, width, confidence, placement, capacity
        )
    return Candidates(
        *torch.ops.yolov4_fast.decode(
            list(maps),
            [float(side) for sizes in anchors for size in sizes for side in size],
            [len(sizes) for sizes in anchors],
            list(scale_x_y),
            list(new_coords),
            height,
            width,
            confidence,
            placement,
            capacity,
        )
    )


def _decode_kernel(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[tuple[float, float]]],
    scale_x_y: Sequence[float],
    new_coords: Sequence[bool],
    height: int,
    width: int,
    confidence: float,
    placement: Tensor | None,
    capacity: int,
) -> Candidates:
    """Arguments and result as of `decode`. The kernel appends in any order, and any of too many
    candidates: here all are found, sorted by their numbers, and cut.
    """
    from yolov4_fast.ops.kernels.decode import append

    batch, device = maps[0].shape[0], maps[0].device
    views = [raw.permute(0, 2, 3, 1).contiguous() for raw in maps]
    counts = torch.zeros(batch, dtype=torch.int32, device=device)
    room, most = max(capacity, FIRST_ROOM), 0
    while True:
        boxes = torch.zeros((batch, room, 4), device=device)
        scores = torch.zeros((batch, room), device=device)
        class_ids = torch.full((batch, room), -1, dtype=torch.int32, device=device)
        numbers = torch.full((batch, room), 2**31 - 1, dtype=torch.int32, device=device)
        if batch:
            buffers = (boxes, scores, class_ids, numbers, counts)
            append(
                views, anchors, scale_x_y, new_coords, height, width, confidence,
                None if placement is None else placement.contiguous(), *buffers,
            )  # fmt: skip
            most = int(counts.max())
        if most <= room:
            break
        room = most
    order = numbers.argsort(1)[:, : capacity or most]
    return Candidates(
        boxes.gather(1, order[:, :, None].expand(-1, -1, 4)),
        scores.gather(1, order),
        class_ids.gather(1, order),
        counts,
    )


def decode_reference(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[tuple[float, float]]],
    scale_x_y: Sequence[float],
    new_coords: Sequence[bool],
    height: int,
    width: int,
    confidence: float,
    placement: Tensor | None = None,
    capacity: int = 0,
) -> Candidates:
    """The definition in torch; arguments and result as in `decode`."""
    boxes, scores = [], []
    for raw, sizes, scale, new in zip(maps, anchors, scale_x_y, new_coords, strict=True):
        _, channels, rows, columns = raw.shape
        cells = raw.double().unflatten(1, (len(sizes), channels // len(sizes)))
        cells = cells.permute(0, 1, 3, 4, 2)  # [B, A, h, w, 5 + C]
        probability = cells if new else torch.sigmoid(cells)
        j, i = torch.meshgrid(
            torch.arange(columns, device=raw.device),
            torch.arange(rows, device=raw.device),
            indexing="xy",
        )
        corner = torch.stack((j, i), -1)
        grid = torch.tensor((columns, rows), device=raw.device)
        offset, factor = in_cell(cells[..., :4], scale, new)
        center = (offset + corner) / grid
        anchor = torch.tensor(sizes, dtype=torch.float64) / torch.tensor((width, height))
        size = factor * anchor.to(raw.device)[:, None, None, :]
        boxes.append(torch.cat((center - size / 2, center + size / 2), -1).flatten(1, 3))
        score = (probability[..., 4:5] * probability[..., 5:]).float()
        passes = probability[..., 4:5].float() > torch.tensor(confidence, dtype=torch.float32)
        scores.append(score.where(passes, -1).flatten(1, 3))
    all_boxes = torch.cat(boxes, 1)  # [B, cells, 4]
    all_scores = torch.cat(scores, 1)  # [B, cells, C]
    if placement is not None:
        scale_xy, offset_xy = placement.double()[:, None].split(2, -1)  # [B, 1, 2] each
        all_boxes = all_boxes * scale_xy.repeat(1, 1, 2) + offset_xy.repeat(1, 1, 2)
    return _gather(all_boxes.float(), all_scores, confidence, capacity)


def in_cell(raw: Tensor, scale_x_y: float, new_coords: bool) -> tuple[Tensor, Tensor]:
    """A box within its cell and in terms of its anchor; differentiable, for training too.

    raw: [..., 4] tx, ty, tw, th of any floating dtype. Returns the centre's offset from the cell's
    corner in cells, and the factors on the anchor's width and height, [..., 2] each.
    """
    xy, wh = raw.split(2, -1)
    offset = (xy if new_coords else torch.sigmoid(xy)) * scale_x_y - (scale_x_y - 1) / 2
    return offset, (2 * wh).square() if new_coords else torch.exp(wh)


def _gather(boxes: Tensor, scores: Tensor, confidence: float, capacity: int) -> Candidates:
    """Candidates among boxes [B, cells, 4] and scores [B, cells, C], padded to a common length."""
    found = scores > torch.tensor(confidence, dtype=torch.float32)
    found &= boxes.isfinite().all(-1, keepdim=True)
    counts = found.sum((1, 2))
    rows = capacity or int(max(counts.tolist(), default=0))
    batch = len(boxes)
    result = Candidates(
        boxes.new_zeros(batch, rows, 4),
        boxes.new_zeros(batch, rows),
        counts.new_full((batch, rows), -1, dtype=torch.int32),
        counts.int(),
    )
    for image in range(batch):
        cell, class_id = found[image].nonzero()[:rows].unbind(1)
        result.boxes[image, : len(cell)] = boxes[image, cell]
        result.scores[image, : len(cell)] = scores[image, cell, class_id]
        result.class_ids[image, : len(cell)] = class_id.int()
    return result


def _check(
    maps: Sequence[Tensor],
    anchors: Sequence[Sequence[tuple[float, float]]],
    scale_x_y: Sequence[float],
    new_coords: Sequence[bool],
    height: int,
    width: int,
    confidence: float,
    placement: Tensor | None,
    capacity: int,
) -> None:
    lengths = (len(anchors), len(scale_x_y), len(new_coords))
    if not maps or set(lengths) != {len(maps)}:
        raise ValueError(
            f"anchors, scale_x_y and new_coords must have one entry for each of {len(maps)} maps "
            f"(at least one), not {lengths[0]}, {lengths[1]} and {lengths[2]}"
        )
    batch = maps[0].shape[0] if maps[0].ndim else 0
    for index, (raw, sizes) in enumerate(zip(maps, anchors, strict=True)):
        if raw.dtype != torch.float32:
            raise ValueError(f"map {index} must be float32, not {raw.dtype}")
        if raw.ndim != 4 or raw.shape[0] != batch:
            raise ValueError(
                f"map {index} must be [batch, anchors * (5 + classes), height, width] with the "
                f"batch of the first, not {list(raw.shape)}"
            )
        if not sizes or raw.shape[1] % len(sizes) or raw.shape[1] // len(sizes) < 6:
            raise ValueError(
                f"{raw.shape[1]} channels of map {index} do not divide into "
                f"{len(sizes)} anchors of 5 + classes"
            )
    if min(height, width) < 1:
        raise ValueError(f"height and width must be at least 1, not {height} and {width}")
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence must be in 0..1, not {confidence}")
    if placement is not None and (
        placement.shape != (batch, 4) or placement.dtype != torch.float32
    ):
        raise ValueError(
            f"placement must be [{batch}, 4] float32, not {list(placement.shape)} {placement.dtype}"
        )
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0, not {capacity}")


@torch.library.register_fake("yolov4_fast::decode")
def _(
    maps: Sequence[Tensor],
    anchors: Sequence[float],
    anchor_counts: Sequence[int],
    scale_x_y: Sequence[float],
    new_coords: Sequence[bool],
    height: int,
    width: int,
    confidence: float,
    placement: Tensor | None = None,
    capacity: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = maps[0].shape[0]
    rows = capacity or torch.library.get_ctx().new_dynamic_size()
    return (
        maps[0].new_empty((batch, rows, 4)),
        maps[0].new_empty((batch, rows)),
        maps[0].new_empty((batch, rows), dtype=torch.int32),
        maps[0].new_empty((batch,), dtype=torch.int32),
    )
