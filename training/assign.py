"""Which anchors of which cells are responsible for which objects, as in Darknet.

An object belongs to the cell that holds its centre. There, the anchor of best shape IoU over all
heads (the first of several) is positive, and so is every anchor whose shape IoU exceeds the head's
`iou_thresh` (YOLOv4's several anchors per object, .213). All other anchors of all cells have to
find nothing, but for those whose predicted box overlaps some object by more than `ignore_thresh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.box_loss import decode_boxes
from yolov4_fast.network.layers import Head

ROUNDING = 1e-3  # cells by which the search for overlapping boxes reaches further than it must
PLACES_AT_ONCE = 1 << 16  # cells that are compared with an object at a time, bounding memory


class Positives(NamedTuple):
    """The positives of one head: P of them, each with the object it has to find."""

    image: Tensor  # [P] int64, index in the batch
    anchor: Tensor  # [P] int64, index in the head's anchors
    y: Tensor  # [P] int64, cell
    x: Tensor  # [P] int64, cell
    boxes_cxcywh: Tensor  # [P, 4] float32, px of the network's input
    classes: Tensor  # [P] int64


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of boxes that share their centre. sizes [M, 2], anchors [A, 2], both (w, h) -> [M, A]."""
    overlap = torch.minimum(sizes[:, None], anchors[None]).prod(2)
    return overlap / (sizes.prod(1)[:, None] + anchors.prod(1)[None] - overlap)


def boxes_px(targets: Tensor, width: int, height: int) -> Tensor:
    """Boxes of targets [M, 6] in px of an input of that size. -> [M, 4] cxcywh."""
    return targets[:, 2:] * targets.new_tensor([width, height, width, height])


def _chosen(heads: Sequence[Head], sizes: Tensor) -> tuple[Tensor, ...]:
    """For each head whether each of its anchors is positive for each object. -> [M, A] bool."""
    all_anchors = heads[0].all_anchors
    if any(head.all_anchors != all_anchors for head in heads):
        raise ValueError("the heads of one network must share one list of anchors")
    iou = shape_iou(sizes, sizes.new_tensor(all_anchors))  # [M, all anchors]
    masks = [sizes.new_tensor(head.mask, dtype=torch.int64) for head in heads]
    in_use = torch.cat(masks).unique()
    best = in_use[iou[:, in_use].argmax(1)]
    return tuple(
        (best[:, None] == mask) | (iou[:, mask] > head.iou_thresh)
        for head, mask in zip(heads, masks, strict=True)
    )


def assign(
    heads: Sequence[Head], targets: Tensor, width: int, height: int
) -> tuple[Positives, ...]:
    """Positives of every head.

    targets: [M, 6] float32, (image, class, cx, cy, w, h), the box normalised to 0..1.
    width, height: of the batch's images, px; multiples of every head's stride.
    """
    boxes = boxes_px(targets, width, height)
    classes, images = targets[:, 1].long(), targets[:, 0].long()
    result = []
    for head, chosen in zip(heads, _chosen(heads, boxes[:, 2:]), strict=True):
        which, anchor = chosen.nonzero(as_tuple=True)
        center = boxes[which, :2] / head.stride
        x = center[:, 0].long().clamp(0, width // head.stride - 1)
        y = center[:, 1].long().clamp(0, height // head.stride - 1)
        result.append(Positives(images[which], anchor, y, x, boxes[which], classes[which]))
    return tuple(result)


def count_positives(heads: Sequence[Head], targets: Tensor, width: int, height: int) -> int:
    """How many positives `assign` gives, which a loss over several mini-batches is divided by."""
    sizes = boxes_px(targets, width, height)[:, 2:]
    return sum(int(chosen.sum()) for chosen in _chosen(heads, sizes))


@torch.no_grad()
def overlapping(head: Head, raw: Tensor, targets: Tensor) -> Tensor:
    """Where a predicted box overlaps an object by more than `ignore_thresh`. -> [B, A, h, w] bool.

    raw: [B, A, 5 + classes, h, w], any float dtype (boxes are compared in float32), before any
    logistic. targets: as of `assign`, best on the CPU, where counting makes nobody wait.

    A box of IoU above t with an object of width w has its centre within w (1 - t) / (2 t) of the
    object's centre in x, and so in y. A cell predicts centres within itself (by `scale_x_y` a
    little outside), so only the cells around each object are decoded and compared.
    """
    batch, count, _, rows, columns = raw.shape
    overlaps = raw.new_zeros(batch * count * rows * columns, dtype=torch.float32)
    boxes = boxes_px(targets, columns * head.stride, rows * head.stride)
    images, anchors = targets[:, 0].long(), raw.new_tensor(head.anchors, dtype=torch.float32)
    for which, y, x in _cells_around(head, boxes, rows, columns):
        places = [tensor.to(raw.device) for tensor in (images[which], y, x)]
        image, y, x = places
        near = raw[image, :, :4, y, x].float()  # [K, A, 4]
        predicted = decode_boxes(near, head, anchors, torch.stack([x, y], 1)[:, None])
        above = _above(predicted, boxes[which].to(raw.device)[:, None], head.ignore_thresh)
        index = ((image * count)[:, None] + torch.arange(count, device=raw.device)) * rows
        index = (index + y[:, None]) * columns + x[:, None]
        overlaps.index_add_(0, index.flatten(), above.flatten().float())
    return overlaps.view(batch, count, rows, columns) > 0


def _cells_around(
    head: Head, boxes: Tensor, rows: int, columns: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of an object and a cell that may predict a box over `ignore_thresh` with it.

    boxes: [M, 4] cxcywh px. In pieces: object's index, y and x of the cell, [K] int64 each.
    """
    threshold = max(head.ignore_thresh, 1e-6)
    reach = boxes[:, 2:] * (max(1 / threshold - 1, 0) / 2)
    outside = (head.scale_x_y - 1) / 2 + ROUNDING
    last_cell = boxes.new_tensor([columns - 1, rows - 1])
    first = ((boxes[:, :2] - reach) / head.stride - 1 - outside).ceil().clamp(min=0)
    last = ((boxes[:, :2] + reach) / head.stride + outside).floor().minimum(last_cell)
    first, sides = first.long(), (last - first + 1).clamp(min=0).long()  # [M, 2] x, y
    counts = sides[:, 0] * sides[:, 1]
    which = torch.repeat_interleave(counts)
    number = torch.arange(len(which), device=boxes.device) - (counts.cumsum(0) - counts)[which]
    x = first[which, 0] + number % sides[which, 0]
    y = first[which, 1] + number // sides[which, 0]
    pieces = (tensor.split(PLACES_AT_ONCE) for tensor in (which, y, x))
    return list(zip(*pieces, strict=True))


def _above(boxes: Tensor, objects: Tensor, threshold: float) -> Tensor:
    """Whether the IoU of boxes and objects, cxcywh [..., 4], exceeds a threshold. -> [...]."""
    half, object_half = boxes[..., 2:] / 2, objects[..., 2:] / 2
    center, object_center = boxes[..., :2], objects[..., :2]
    overlap = torch.minimum(center + half, object_center + object_half)
    overlap = (overlap - torch.maximum(center - half, object_center - object_half)).clamp_(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    areas = boxes[..., 2] * boxes[..., 3] + objects[..., 2] * objects[..., 3]
    return intersection > threshold * (areas - intersection)
