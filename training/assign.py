"""Which anchors of which cells are responsible for which objects, as in Darknet.

An object belongs to the cell that holds its centre. There, the anchor of best shape IoU over all
heads is positive, and so is every anchor whose shape IoU exceeds the head's `iou_thresh` (YOLOv4's
several anchors per object, .213).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from yolov4_fast.network.layers import Head


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


def assign(
    heads: Sequence[Head], targets: Tensor, width: int, height: int
) -> tuple[Positives, ...]:
    """Positives of every head.

    targets: [M, 6] float32, (image, class, cx, cy, w, h), the box normalised to 0..1.
    width, height: of the batch's images, px; multiples of every head's stride.
    """
    scale = targets.new_tensor([width, height, width, height])
    boxes = targets[:, 2:] * scale
    classes, images = targets[:, 1].long(), targets[:, 0].long()
    all_anchors = heads[0].all_anchors
    if any(head.all_anchors != all_anchors for head in heads):
        raise ValueError("the heads of one network must share one list of anchors")
    iou = shape_iou(boxes[:, 2:], boxes.new_tensor(all_anchors))  # [M, all anchors]
    in_use = sorted({index for head in heads for index in head.mask})
    best = iou.new_full(iou.shape, -1.0)
    best[:, in_use] = iou[:, in_use]
    best = best == best.amax(1, keepdim=True) if len(boxes) else best.bool()
    result = []
    for head in heads:
        mask = list(head.mask)
        chosen = best[:, mask] | (iou[:, mask] > head.iou_thresh)
        which, anchor = chosen.nonzero(as_tuple=True)
        center = boxes[which, :2] / head.stride
        x = center[:, 0].long().clamp(0, width // head.stride - 1)
        y = center[:, 1].long().clamp(0, height // head.stride - 1)
        result.append(Positives(images[which], anchor, y, x, boxes[which], classes[which]))
    return tuple(result)
