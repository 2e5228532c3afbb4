"""Losses of predicted boxes against the objects they have to find, and the decoding they rest on.

    iou    1 - IoU
    giou   1 - IoU + (C - U) / C, areas of the enclosing box and of the union   (arXiv 1902.09630)
    diou   1 - IoU + d^2 / c^2, centre distance over the enclosing diagonal     (1911.08287, eq. 7)
    ciou   DIoU + alpha * v, v = 4 / pi^2 * (atan(w*/h*) - atan(w/h))^2,
           alpha = v / (1 - IoU + v)                                            (eq. 8 to 11)
    siou   1 - IoU + (distance + shape) / 2                                     (2205.12740)
    sse    squared error of what the network gives, as in YOLOv3                (1804.02767, 2.1)

SIoU: with the centres' difference (dx, dy) and the enclosing box cw x ch

    angle     L = 1 - 2 sin^2(arcsin(|dy| / sigma) - pi/4) = 2 |dx dy| / (dx^2 + dy^2)
    distance  sum over x, y of 1 - exp(-(2 - L) * (dx / cw)^2)
    shape     sum over w, h of (1 - exp(-|w - w*| / max(w, w*)))^4

The gradient of CIoU: alpha is a constant for it, as in the paper. Of v it is

    dv/dw = -8 / pi^2 * (atan(w*/h*) - atan(w/h)) * h / (w^2 + h^2)     and +, with w, for dv/dh

(the paper's equation 12 has the opposite signs, which would lead away from the object).
"exact" is that, and the default: it belongs to the loss, and as a derivative by log w, which is
what the network gives, it is w h / (w^2 + h^2), at most 1/2 for boxes of any size. "paper" sets
1 / (w^2 + h^2) to 1 as the paper and Darknet do, with w and h in units of the input: then small
boxes learn their proportions hundreds of times slower than large ones.

Everything is computed in the dtype of what is given, which training makes float32. Values and
gradients stay finite for boxes that coincide, lie apart, have no size, or are as large as 1e15.
"""

from __future__ import annotations

from math import exp, pi

import torch
from torch import Tensor

from yolov4_fast.network.layers import Head
from yolov4_fast.ops.decode import in_cell

BOX_LOSSES = ("sse", "iou", "giou", "diou", "ciou", "siou")
CIOU_GRADIENTS = ("exact", "paper")
EPS = 1e-7
LARGEST_LOG_SCALE = 8.0  # exp(8) anchors: larger than any image, keeps exp finite on a bad step
SHAPE_EXPONENT = 4  # theta of SIoU; its paper found values around 4 by a genetic search


def decode_boxes(raw: Tensor, head: Head, anchors: Tensor, cells: Tensor) -> Tensor:
    """Boxes cxcywh in px of the input, differentiable. raw [..., 4], anchors, cells [..., 2].

    raw: before any logistic, of `new_coords` heads too.
    """
    if head.new_coords:
        raw = torch.sigmoid(raw)
    else:
        raw = torch.cat([raw[..., :2], raw[..., 2:].clamp(max=LARGEST_LOG_SCALE)], -1)
    offset, factor = in_cell(raw, head.scale_x_y, head.new_coords)
    return torch.cat([(offset + cells) * head.stride, factor * anchors], -1)


def encode_boxes(boxes: Tensor, head: Head, anchors: Tensor, cells: Tensor) -> Tensor:
    """What the network should give for boxes [P, 4] cxcywh px: the inverse of `decode_boxes`.

    [P, 4]: of x and y the sigmoid of the raw value, of w and h the raw value itself, or its sigmoid
    with `new_coords`. Boxes that no raw value gives get the nearest that one does.
    """
    offset = boxes[:, :2] / head.stride - cells
    factor = (boxes[:, 2:] / anchors).clamp(exp(-LARGEST_LOG_SCALE), exp(LARGEST_LOG_SCALE))
    size = factor.sqrt().div(2).clamp(max=1) if head.new_coords else factor.log()
    center = (offset + (head.scale_x_y - 1) / 2) / head.scale_x_y
    return torch.cat([center.clamp(0, 1), size], 1)


def squared_error(
    raw: Tensor,
    target: Tensor,
    head: Head,
    anchors: Tensor,
    cells: Tensor,
    size: tuple[float, float],
) -> Tensor:
    """SSE of paired boxes -> [P].

    raw: [P, 4] before any logistic; target: [P, 4] cxcywh px; anchors, cells: [P, 2]; size: (width,
    height) of the input in px. The sum over x, y, w, h of the squared difference to `encode_boxes`,
    times 2 - (area of the object as a share of the input): Darknet's weight for YOLOv3, which
    makes up for the little that an error of a small box costs in this space.
    """
    given = torch.sigmoid(raw[:, :2]), torch.sigmoid(raw[:, 2:]) if head.new_coords else raw[:, 2:]
    error = torch.cat(given, 1) - encode_boxes(target, head, anchors, cells)
    share = target[:, 2] * target[:, 3] / (size[0] * size[1])
    return (2 - share) * error.square().sum(1)


def box_loss(
    predicted: Tensor,
    target: Tensor,
    kind: str,
    *,
    ciou_gradient: str = "exact",
    size: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """1 - IoU + penalty of paired boxes -> [P].

    predicted, target: [P, 4] cxcywh px. kind: of BOX_LOSSES, but for "sse", which is no function of
    boxes alone. size: (width, height) of the input in px, for the paper's gradient of CIoU.
    """
    overlap, enclosing = _overlap(predicted, target)
    intersection = overlap[:, 0] * overlap[:, 1]
    union = predicted[:, 2] * predicted[:, 3] + target[:, 2] * target[:, 3] - intersection + EPS
    iou = intersection / union
    if kind == "iou":
        return 1 - iou
    if kind == "giou":
        area = enclosing[:, 0] * enclosing[:, 1] + EPS
        return 1 - iou + (area - union) / area
    difference = predicted[:, :2] - target[:, :2]
    if kind == "siou":
        return 1 - iou + _siou_penalty(difference, enclosing, predicted[:, 2:], target[:, 2:])
    loss = 1 - iou + difference.square().sum(1) / (enclosing.square().sum(1) + EPS)
    if kind == "diou":
        return loss
    if kind == "ciou":
        v = (4 / pi**2) * (
            _angle(target[:, 2:]) - _angle(predicted[:, 2:], ciou_gradient, size)
        ).square()
        with torch.no_grad():
            alpha = v / ((1 - iou).clamp(min=0) + v + EPS)
        return loss + alpha * v
    raise ValueError(f"box loss {kind!r} is not one of {', '.join(BOX_LOSSES[1:])}")


@torch.no_grad()
def plain_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """IoU of paired boxes cxcywh, [P, 4] each -> [P], without a gradient."""
    return (1 - box_loss(predicted, target, "iou")).clamp(0, 1)


def _overlap(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the common and of the enclosing box, [P, 2] each."""
    half, target_half = predicted[:, 2:] / 2, target[:, 2:] / 2
    low, high = predicted[:, :2] - half, predicted[:, :2] + half
    target_low, target_high = target[:, :2] - target_half, target[:, :2] + target_half
    overlap = torch.minimum(high, target_high) - torch.maximum(low, target_low)
    enclosing = torch.maximum(high, target_high) - torch.minimum(low, target_low)
    return overlap.clamp(min=0), enclosing


def _angle(sizes: Tensor, gradient: str = "exact", unit: tuple[float, float] = (1, 1)) -> Tensor:
    """atan(w / h) of sizes [P, 2]; with "paper" its gradient is w^2 + h^2 times as large."""
    sizes = sizes.clamp(min=EPS)  # atan2 has no derivative at (0, 0)
    angle = torch.atan2(sizes[:, 0], sizes[:, 1])
    if gradient == "exact":
        return angle
    factor = (sizes.detach() / sizes.new_tensor(unit)).square().sum(1)
    return angle.detach() + (angle - angle.detach()) * factor


def _siou_penalty(
    difference: Tensor, enclosing: Tensor, sizes: Tensor, target_sizes: Tensor
) -> Tensor:
    """(distance + shape) / 2 of SIoU. All [P, 2]."""
    squares = difference.square()
    angle = 2 * (difference[:, 0] * difference[:, 1]).abs() / (squares.sum(1) + EPS)
    rho = squares / (enclosing.square() + EPS)
    distance = (1 - torch.exp((angle - 2)[:, None] * rho)).sum(1)
    omega = (sizes - target_sizes).abs() / (torch.maximum(sizes, target_sizes) + EPS)
    shape = (1 - torch.exp(-omega)).pow(SHAPE_EXPONENT).sum(1)
    return (distance + shape) / 2
