"""The backbone with a linear layer on the mean of its last map, and its loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule

LINEAR = "classifier"  # where the state dict holds the linear layer; the rest is the backbone's


class Classifier(NetworkModule):
    """images [B, channels, H, W] -> (logits [B, classes] float32,).

    network: without heads, as `backbone_of` gives it. The state dict is that of its NetworkModule,
    and `classifier.weight` and `classifier.bias`.
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        super().__init__(network)
        self.classifier = nn.Linear(network.shapes()[-1][0], num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (features,) = super().forward(images)
        return (self.classifier(features.float().mean((2, 3))).float(),)


def mixed_cross_entropy(
    logits: Tensor, classes: Tensor, shares: Tensor, smoothing: float
) -> Tensor:
    """Mean cross-entropy of pictures that show several classes each.

    logits [B, C] float; classes [B, K] int64; shares [B, K] float32, each row's sum 1. The target
    is (1 - smoothing) * shares + smoothing / C (label smoothing, arXiv 1512.00567, section 7).
    """
    likelihoods = F.log_softmax(logits.float(), 1)
    own = (likelihoods.gather(1, classes) * shares).sum(1)
    return -((1 - smoothing) * own + smoothing * likelihoods.mean(1)).mean()


def hits(logits: Tensor, classes: Tensor, among: int) -> int:
    """How many pictures have their class [B] among the `among` most likely ones."""
    among = min(among, logits.shape[1])
    return int((logits.topk(among, 1).indices == classes[:, None]).sum())
