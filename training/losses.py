"""The loss of YOLOv4: box regression, objectness and class binary cross-entropy (BCE).

    L = box * sum(box loss) + objectness * sum(BCE) + classes * sum(BCE), divided by the number of
    positives, or of images

Box and class losses count at the positives. Objectness counts everywhere, except where the
predicted box overlaps some object by more than the head's `ignore_thresh` without being responsible
for it (training/assign.py). Box losses are those of training/box_loss.py.

The options of `LossConfig`, with t a label and z the network's raw value (logit):

    focal_gamma, focal_alpha  objectness BCE * a * (1 - q)^gamma with q = sigmoid(z) where t = 1 and
        1 - sigmoid(z) where t = 0, a = alpha and 1 - alpha (RetinaNet, arXiv 1708.02002); for
        labels between, both are mixed in that proportion. Classes likewise, without a, since they
        count at positives only, where alpha would favour the wrong classes.
    label_smoothing    class labels t become t * (1 - s) + s / 2 (Darknet's label_smooth_eps)
    objectness_smooth  labels of positives become 1 - s * (1 - IoU of the predicted box)

Maps hold raw values before any logistic. Where the network has one of its own (`new_coords` heads)
`linear_heads` leaves it to the loss: a probability that has rounded to 1, from a logit of 17 in
float32 and 6.3 in bfloat16, has lost the gradient that would correct it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.assign import Positives, assign, count_positives, overlapping
from training.box_loss import box_loss, decode_boxes, plain_iou, squared_error
from training.loss_config import LossConfig
from yolov4_fast.network.layers import Conv, Head
from yolov4_fast.network.module import ConvBlock, NetworkModule

__all__ = ["LossConfig", "Losses", "count_positives", "detection_loss", "linear_heads"]

LEAST_FOCUS = 1e-12  # of 1 - q: its power has no derivative at 0


class Losses(NamedTuple):
    """The weighted terms (scalars, float32) and their sum."""

    total: Tensor
    box: Tensor
    objectness: Tensor
    classes: Tensor


def detection_loss(
    heads: Sequence[Head],
    maps: Sequence[Tensor],
    targets: Tensor,
    config: LossConfig,
    *,
    positives: Tensor | float | None = None,
) -> Losses:
    """The loss of a batch.

    maps: raw, [B, A * (5 + classes), h, w] per head, any float dtype (computed in float32), before
    any logistic (`linear_heads`).
    targets: [M, 6] float32 (image, class, cx, cy, w, h), the box normalised; M may be 0. Best on
    the CPU: where they lie on a GPU, the host waits for it.
    positives: what the sums are divided by, where this is part of a larger batch: its
    `count_positives`, or its images if that is the config's normaliser. None: of these maps.
    Raises ValueError where the config or a map does not fit the heads.
    """
    _check(heads, maps, config)
    height = maps[0].shape[2] * heads[0].stride
    width = maps[0].shape[3] * heads[0].stride
    targets = targets.cpu()
    assigned = assign(heads, targets, width, height)
    if positives is None:
        by_images = config.normaliser == "images"
        positives = len(maps[0]) if by_images else sum(len(p.image) for p in assigned)
    count = torch.as_tensor(positives, dtype=torch.float32, device=maps[0].device).clamp(min=1)
    box = objectness = classes = maps[0].new_zeros((), dtype=torch.float32)
    for head, raw, positive, balance in zip(
        heads, maps, assigned, _balance(heads, config), strict=True
    ):
        terms = _head_loss(head, raw, positive, targets, config)
        box, objectness, classes = (
            box + terms[0],
            objectness + balance * terms[1],
            classes + terms[2],
        )
    box = box * (config.box / count)
    objectness = objectness * (config.objectness / count)
    classes = classes * (config.classes / count)
    return Losses(box + objectness + classes, box.detach(), objectness.detach(), classes.detach())


def linear_heads(module: NetworkModule) -> None:
    """Take the logistic of `new_coords` heads off a module that is to be trained, as
    `detection_loss` needs it. What is stored does not change, and the Network keeps the logistic.

    Raises ValueError where such a head does not read a logistic convolution.
    """
    for head in module.network.heads:
        source = head.inputs[0]
        spec = module.network.layers[source]
        if not head.new_coords:
            continue
        if not isinstance(spec, Conv) or spec.activation != "logistic":
            raise ValueError(
                f"layer {source}: a head with new_coords is trained on a convolution with "
                "activation=logistic"
            )
        block = module.layers[str(source)]
        assert isinstance(block, ConvBlock)
        block.activation = "linear"


def _check(heads: Sequence[Head], maps: Sequence[Tensor], config: LossConfig) -> None:
    if config.scale_balance and len(config.scale_balance) != len(heads):
        raise ValueError(
            f"scale_balance must have one weight for each of {len(heads)} heads, not "
            f"{len(config.scale_balance)}"
        )
    for head, raw in zip(heads, maps, strict=True):
        made_by = raw.grad_fn.name() if raw.grad_fn is not None else ""
        if head.new_coords and made_by.startswith("Sigmoid"):
            raise ValueError(
                "the map of a head with new_coords has been through its logistic: call "
                "linear_heads(module) before training"
            )


def _balance(heads: Sequence[Head], config: LossConfig) -> list[float]:
    """The weight of each head's objectness, in the order of the heads, which may be any."""
    by_stride = sorted(range(len(heads)), key=lambda index: heads[index].stride)
    weights = dict(zip(by_stride, config.scale_balance or [1.0] * len(heads), strict=True))
    return [weights[index] for index in range(len(heads))]


class Places(NamedTuple):
    """Where the positives of a head are: U cells and anchors, fewer than P where objects share one.

    Each is read off the map once, so that no gradient is a sum in an order that threads decide.
    """

    image: Tensor  # [U] int64, as the three that follow
    anchor: Tensor
    y: Tensor
    x: Tensor
    of: Tensor  # [P] int64, the place of each positive
    times: Tensor  # [U] int64, positives of each place
    labels: Tensor  # [U, classes] float32; the classes of all objects of a place are right there

    @classmethod
    def of_positives(cls, positive: Positives, shape: tuple[int, ...], classes: int) -> Places:
        """shape: images, anchors, rows, columns of the head's map."""
        _, anchors, rows, columns = shape
        key = (positive.image * anchors + positive.anchor) * rows + positive.y
        keys, of, times = torch.unique(
            key * columns + positive.x, return_inverse=True, return_counts=True
        )
        labels = torch.zeros((len(keys), classes), device=keys.device)
        labels[of, positive.classes] = 1.0
        image, anchor, y, x = torch.unravel_index(keys, shape)
        return cls(image, anchor, y, x, of, times, labels)


def _head_loss(
    head: Head, raw: Tensor, positive: Positives, targets: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of box, objectness and class loss. targets and positive may lie on the CPU."""
    batch, _, rows, columns = raw.shape
    shape = batch, len(head.mask), rows, columns
    raw = raw.unflatten(1, (len(head.mask), 5 + head.num_classes))
    places = Places.of_positives(positive, shape, head.num_classes)
    places = Places(*(tensor.to(raw.device, non_blocking=True) for tensor in places))
    positive = Positives(*(tensor.to(raw.device, non_blocking=True) for tensor in positive))
    # Only the values at positives and one channel are converted to float32, not the whole map.
    chosen = raw[places.image, places.anchor, :, places.y, places.x].float()  # [U, 5 + classes]
    size = float(columns * head.stride), float(rows * head.stride)
    box, iou = _boxes(head, chosen[:, :4].index_select(0, places.of), positive, size, config)

    labels = places.labels * (1 - config.label_smoothing) + config.label_smoothing / 2
    classes = _cross_entropy(chosen[:, 5:], labels, config.focal_gamma).sum(1) * places.times

    negative = ~overlapping(head, raw.detach(), targets)
    negative[places[:4]] = False
    nothing = _nothing(raw[:, :, 4].float(), config) * negative
    found = _found(chosen[:, 4], iou, places.of, config)
    return box.sum(), nothing.sum() * config.no_object + found.sum(), classes.sum()


def _boxes(
    head: Head, raw: Tensor, positive: Positives, size: tuple[float, float], config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Box losses of the positives and, where objectness needs it, their IoU. raw: [P, 4]."""
    anchors = raw.new_tensor(head.anchors)[positive.anchor]
    cells = torch.stack([positive.x, positive.y], 1)
    predicted = decode_boxes(raw, head, anchors, cells)
    target = positive.boxes_cxcywh
    if config.box_loss == "sse":
        loss = squared_error(raw, target, head, anchors, cells, size)
    else:
        loss = box_loss(
            predicted, target, config.box_loss, ciou_gradient=config.ciou_gradient, size=size
        )
    smooth = config.objectness_smooth > 0
    return loss, plain_iou(predicted, target) if smooth else torch.ones_like(loss)


def _found(logits: Tensor, iou: Tensor, place: Tensor, config: LossConfig) -> Tensor:
    """Objectness loss of places [U]; the label is of the best IoU [P] of the positives there."""
    best = torch.zeros_like(logits).scatter_reduce_(0, place, iou, "amax")
    labels = 1 - config.objectness_smooth * (1 - best)
    loss = _cross_entropy(logits, labels, config.focal_gamma)
    if not config.focal_gamma:
        return loss
    return loss * (config.focal_alpha * labels + (1 - config.focal_alpha) * (1 - labels))


def _nothing(logits: Tensor, config: LossConfig) -> Tensor:
    """Objectness loss of every place as if it held no object: BCE with a label of 0."""
    loss = F.softplus(logits)
    if not config.focal_gamma:
        return loss
    return (1 - config.focal_alpha) * _focused(loss, torch.sigmoid(logits), config.focal_gamma)


def _cross_entropy(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if not gamma:
        return loss
    wrong = torch.sigmoid(logits) * (1 - labels) + torch.sigmoid(-logits) * labels
    return _focused(loss, wrong, gamma)


def _focused(loss: Tensor, wrong: Tensor, gamma: float) -> Tensor:
    return loss * wrong.clamp(min=LEAST_FOCUS).pow(gamma)
