"""The loss of YOLOv4: IoU-family box regression, objectness and class binary cross-entropy.

    L = box * sum(1 - CIoU) + objectness * sum(BCE) + classes * sum(BCE), divided by the number of
    positives

Objectness counts in every cell except those whose box overlaps some object by more than the head's
`ignore_thresh` without being responsible for it. Box losses: GIoU arXiv 1902.09630, DIoU and CIoU
arXiv 1911.08287 (equations 7, 10). As there, the trade-off alpha of CIoU is a constant for the
gradient; the gradient of v through arctan is exact here, without the factor 1/(w^2 + h^2) set to
1, since boxes are in pixels and not in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.assign import Positives, assign
from yolov4_fast.network.layers import Head
from yolov4_fast.ops.decode import in_cell

BOX_LOSSES = ("iou", "giou", "diou", "ciou")
EPS = 1e-7
LARGEST_LOG_SCALE = 8.0  # exp(8) anchors: larger than any image, keeps exp finite on a bad step


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms and the kind of box loss."""

    box_loss: str = "ciou"
    box: float = 5.0
    objectness: float = 1.0
    classes: float = 1.0

    def __post_init__(self) -> None:
        if self.box_loss not in BOX_LOSSES:
            raise ValueError(f"box loss {self.box_loss!r} is not one of {', '.join(BOX_LOSSES)}")


class Losses(NamedTuple):
    """The weighted terms (scalars, float32) and their sum."""

    total: Tensor
    box: Tensor
    objectness: Tensor
    classes: Tensor


def box_loss(predicted: Tensor, target: Tensor, kind: str) -> Tensor:
    """1 - IoU + penalty of paired boxes. predicted, target: [P, 4] cxcywh px -> [P]."""
    half, target_half = predicted[:, 2:] / 2, target[:, 2:] / 2
    low, high = predicted[:, :2] - half, predicted[:, :2] + half
    target_low, target_high = target[:, :2] - target_half, target[:, :2] + target_half
    overlap = (torch.minimum(high, target_high) - torch.maximum(low, target_low)).clamp(min=0)
    intersection = overlap.prod(1)
    union = predicted[:, 2:].prod(1) + target[:, 2:].prod(1) - intersection + EPS
    iou = intersection / union
    if kind == "iou":
        return 1 - iou
    enclosing = torch.maximum(high, target_high) - torch.minimum(low, target_low)
    if kind == "giou":
        area = enclosing.prod(1) + EPS
        return 1 - iou + (area - union) / area
    distance = (predicted[:, :2] - target[:, :2]).square().sum(1)
    penalty = distance / (enclosing.square().sum(1) + EPS)
    if kind == "diou":
        return 1 - iou + penalty
    if kind == "ciou":
        angle = torch.atan2(predicted[:, 2], predicted[:, 3])
        v = (4 / pi**2) * (torch.atan2(target[:, 2], target[:, 3]) - angle).square()
        with torch.no_grad():
            alpha = v / (1 - iou + v + EPS)
        return 1 - iou + penalty + alpha * v
    raise ValueError(f"box loss {kind!r} is not one of {', '.join(BOX_LOSSES)}")


def decode_boxes(raw: Tensor, head: Head, anchors: Tensor, cells: Tensor) -> Tensor:
    """Boxes cxcywh in px of the input, differentiable. raw [..., 4], anchors, cells [..., 2]."""
    if not head.new_coords:
        raw = torch.cat([raw[..., :2], raw[..., 2:].clamp(max=LARGEST_LOG_SCALE)], -1)
    offset, factor = in_cell(raw, head.scale_x_y, head.new_coords)
    return torch.cat([(offset + cells) * head.stride, factor * anchors], -1)


def detection_loss(
    heads: Sequence[Head], maps: Sequence[Tensor], targets: Tensor, config: LossConfig
) -> Losses:
    """The loss of a batch.

    maps: raw, [B, A * (5 + classes), h, w] per head, any float dtype (computed in float32).
    targets: [M, 6] float32 (image, class, cx, cy, w, h), the box normalised; M may be 0.
    """
    height = maps[0].shape[2] * heads[0].stride
    width = maps[0].shape[3] * heads[0].stride
    positives = assign(heads, targets, width, height)
    count = max(1, sum(len(p.image) for p in positives))
    objects = pad_boxes(targets, maps[0].shape[0], width, height)
    box = objectness = classes = maps[0].new_zeros((), dtype=torch.float32)
    for head, raw, positive in zip(heads, maps, positives, strict=True):
        terms = _head_loss(head, raw.float(), positive, objects, config.box_loss)
        box, objectness, classes = box + terms[0], objectness + terms[1], classes + terms[2]
    box = box * (config.box / count)
    objectness = objectness * (config.objectness / count)
    classes = classes * (config.classes / count)
    return Losses(box + objectness + classes, box.detach(), objectness.detach(), classes.detach())


def _head_loss(
    head: Head, raw: Tensor, positive: Positives, objects: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, rows, columns = raw.shape
    raw = raw.view(batch, len(head.mask), 5 + head.num_classes, rows, columns)
    chosen = raw[positive.image, positive.anchor, :, positive.y, positive.x]  # [P, 5 + classes]
    anchors = raw.new_tensor(head.anchors)
    cells = torch.stack([positive.x, positive.y], 1)
    predicted = decode_boxes(chosen[:, :4], head, anchors[positive.anchor], cells)
    box = box_loss(predicted, positive.boxes_cxcywh, kind).sum()

    where = positive.image, positive.anchor, positive.y, positive.x
    labels = raw.new_zeros((batch, len(head.mask), rows, columns, head.num_classes))
    labels[*where, positive.classes] = 1.0  # two objects in one place: both classes are right
    classes = _cross_entropy(chosen[:, 5:], labels[where], head.new_coords).sum()
    target = torch.zeros_like(raw[:, :, 4])
    target[where] = 1.0
    weight = 1.0 - ignored(head, raw.detach(), objects) * (1.0 - target)
    objectness = (_cross_entropy(raw[:, :, 4], target, head.new_coords) * weight).sum()
    return box, objectness, classes


def _cross_entropy(raw: Tensor, target: Tensor, is_probability: bool) -> Tensor:
    if is_probability:  # new_coords: the logistic is part of the convolution
        return F.binary_cross_entropy(raw.clamp(EPS, 1 - EPS), target, reduction="none")
    return F.binary_cross_entropy_with_logits(raw, target, reduction="none")


def pad_boxes(targets: Tensor, batch: int, width: int, height: int) -> Tensor:
    """Objects of each image, padded with empty boxes. -> [B, G, 4] xyxy px."""
    image = targets[:, 0].long()
    counts = torch.bincount(image, minlength=batch)
    order = torch.argsort(image, stable=True)
    slot = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image[order]]
    boxes = targets.new_zeros((batch, int(counts.max()) if len(image) else 0, 4))
    center, half = targets[order, 2:4], targets[order, 4:] / 2
    scale = targets.new_tensor([width, height, width, height])
    boxes[image[order], slot] = torch.cat([center - half, center + half], 1) * scale
    return boxes


@torch.no_grad()
def ignored(head: Head, raw: Tensor, objects: Tensor) -> Tensor:
    """1 where a predicted box overlaps an object by more than `ignore_thresh`. -> [B, A, h, w]."""
    batch, count, _, rows, columns = raw.shape
    if not objects.shape[1]:
        return raw.new_zeros((batch, count, rows, columns))
    y, x = torch.meshgrid(
        torch.arange(rows, device=raw.device),
        torch.arange(columns, device=raw.device),
        indexing="ij",
    )
    anchors = raw.new_tensor(head.anchors)[:, None, None]
    boxes = decode_boxes(
        raw[:, :, :4].permute(0, 1, 3, 4, 2), head, anchors, torch.stack([x, y], -1)
    ).reshape(batch, -1, 1, 4)
    half = boxes[..., 2:] / 2
    low, high = boxes[..., :2] - half, boxes[..., :2] + half
    objects = objects[:, None]  # [B, 1, G, 4]
    overlap = torch.minimum(high, objects[..., 2:]) - torch.maximum(low, objects[..., :2])
    intersection = overlap.clamp_(min=0).prod(-1)  # [B, N, G]
    areas = boxes[..., 2:].prod(-1) + (objects[..., 2:] - objects[..., :2]).prod(-1)
    above = intersection > head.ignore_thresh * (areas - intersection)
    return above.any(-1).to(raw.dtype).view(batch, count, rows, columns)
