"""Self-adversarial training (SAT, YOLOv4 paper, section 3.3), its first pass.

The network attacks its own input: every value of the picture takes one step against the gradient of
what would have to be lower for the objects to go unseen, the fast gradient sign method (arXiv
1412.6572). The second pass trains on that picture and the true objects as ever.

What is lowered is the loss that objectness would have without objects, softplus(z) = BCE(z, 0), at
the places that stand for one: the responsible anchors, and those whose predicted box overlaps an
object by more than the head's `ignore_thresh`. Elsewhere there is nothing to hide, and the many
cells of background would decide the signs. A picture without objects stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.assign import Positives, assign, overlapping
from training.batch_norm import frozen
from yolov4_fast.network.layers import Head
from yolov4_fast.network.module import NetworkModule


def attack(
    module: NetworkModule, images: Tensor, heads: Sequence[Head], targets: Tensor, step: float
) -> Tensor:
    """The pictures altered by at most `step` a value, so that no object seems to be there.

    module: in training mode, whose batch statistics are used; it is left as it was: weights, their
    gradients, running statistics. Without its wrapper (DistributedDataParallel). With DropBlock
    attached, the pass draws from torch's generator.
    images: [B, 3, H, W] float in 0..1; the result as well. targets: as of `detection_loss`.
    Where processes share statistics, all of them must call this, whether they have objects or not.
    """
    pictures = images.detach().requires_grad_()
    targets = targets.cpu()
    with frozen(module), torch.enable_grad():
        maps = module(pictures)
        height, width = images.shape[2:]
        seen = [
            _seen(head, raw, targets, positive)
            for head, raw, positive in zip(
                heads, maps, assign(heads, targets, width, height), strict=True
            )
        ]
        (gradient,) = torch.autograd.grad(torch.stack(seen).sum(), pictures)
    return (images - step * gradient.sign()).clamp_(0, 1)


def _seen(head: Head, raw: Tensor, targets: Tensor, positive: Positives) -> Tensor:
    """How clearly a map [B, A * (5 + classes), h, w] shows the objects."""
    raw = raw.unflatten(1, (len(head.mask), 5 + head.num_classes))
    shown = overlapping(head, raw.detach(), targets)
    places = positive.image, positive.anchor, positive.y, positive.x
    shown[tuple(index.to(raw.device) for index in places)] = True
    return (F.softplus(raw[:, :, 4].float()) * shown).sum()
