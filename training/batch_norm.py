"""Batch normalisation in training, with the activation behind it: over one's own mini-batch, over
all processes, or across the mini-batches of a batch (CmBN, arXiv 2004.10934, figure 4).

local  statistics of the mini-batch of this process
sync   of the mini-batches of all processes, as one process with all of them would have
cross  of all processes and of the mini-batches 1..t of this batch, each by its number of values;
       those before t are constant for the gradient, and the running statistics move once a batch

On a GPU, normalisation and activation are the fused operator of ops/mish_bn_train.py, which keeps a
third less for the backward pass. On a CPU, where neither processes nor mini-batches are to be
joined, they are torch's own, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from yolov4_fast.network.module import ConvBlock, activate
from yolov4_fast.ops.activation import ACTIVATION_CODES
from yolov4_fast.ops.channel_moments import batch_statistics, join_moments, partial_moments
from yolov4_fast.ops.mish_bn_train import mish_bn_train
from yolov4_fast.ops.views import Implementation

Mode = Literal["sync", "local", "cross"]


class BatchNorm(nn.BatchNorm2d):
    """Takes the place of a `BatchNorm2d`, whose parameters and buffers it takes over, and of the
    activation behind it. x, y: [B, C, H, W] float32, float16 or bfloat16; on a CPU float64 too.

    implementation: of the fused operator, which is then used in any case; None: as the module says.
    """

    def __init__(self, source: nn.BatchNorm2d, activation: str) -> None:
        if source.momentum is None or not (source.affine and source.track_running_stats):
            raise ValueError(
                "only a normalisation with weights and with running statistics that move by a "
                f"fixed share can be converted, not {source}"
            )
        super().__init__(source.num_features, source.eps, source.momentum)
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.train(source.training)
        self.activation = activation
        self.mode: Mode = "local"
        self.subdivisions = 1
        self.implementation: Implementation | None = None
        self.begin_batch()

    def begin_batch(self) -> None:
        self.minibatches = 0  # of this batch, that were recorded
        self.earlier: Tensor | None = None  # moments [3, C] of these, over all processes

    def forward(self, x: Tensor) -> Tensor:
        together = self.mode != "local" and dist.is_available() and dist.is_initialized()
        together = together and dist.get_world_size() > 1
        cross = self.mode == "cross" and self.subdivisions > 1
        fused = x.is_cuda or together or cross or self.implementation is not None
        if not (self.training and fused):
            return activate(super().forward(x), self.activation)
        x = x.contiguous(memory_format=torch.channels_last)
        statistics = self._statistics(x.detach(), together, cross)
        return mish_bn_train(
            *(x, statistics, self.weight, self.bias, self.activation),
            sum_over=dist.all_reduce if together else None,
            implementation=self.implementation,
        )

    @torch.no_grad()
    def _statistics(self, x: Tensor, together: bool, cross: bool) -> Tensor:
        """[3, C] that x is normalised with; records them unless frozen."""
        if not (together or cross) and x.numel() == x.shape[1]:
            raise ValueError(
                f"batch normalisation needs more than one value a channel, not {list(x.shape)}"
            )
        implementation, last = self.implementation, True
        parts = partial_moments(x.permute(0, 2, 3, 1), implementation=implementation)
        if together:
            parts = _gathered(join_moments(parts, implementation=implementation))
        if cross:
            if self.earlier is not None:
                parts = torch.cat([self.earlier[None], parts])
            parts = join_moments(parts, implementation=implementation)[None]
            last = self._record(parts[0])
        running = None
        if self.track_running_stats and last:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            running = self.running_mean, self.running_var
            self.num_batches_tracked.add_(1)
        momentum = self.momentum or 0.0
        return batch_statistics(parts, self.eps, running, momentum, implementation=implementation)

    def _record(self, moments: Tensor) -> bool:
        """Keep the moments of the mini-batches so far; whether these are all of the batch."""
        if not self.track_running_stats:
            return False
        if self.minibatches == self.subdivisions:
            raise ValueError(
                f"a batch has {self.subdivisions} mini-batches and all were seen: call begin_batch "
                "before the first of the next"
            )
        self.earlier = moments
        self.minibatches += 1
        return self.minibatches == self.subdivisions


def _gathered(moments: Tensor) -> Tensor:
    """[3, C] of each process -> [processes, 3, C], the same bits in all of them."""
    parts = moments.new_empty((dist.get_world_size() * 3, moments.shape[1]))
    dist.all_gather_into_tensor(parts, moments)
    return parts.view(-1, *moments.shape)


def convert(
    module: nn.Module,
    mode: Mode,
    subdivisions: int = 1,
    implementation: Implementation | None = None,
) -> None:
    """Give every ConvBlock below `module` the normalisation of `mode`, in place: before it is
    wrapped for several processes, or again to change the mode. Parameters, buffers and the keys of
    the state dict stay.

    subdivisions: mini-batches of a batch, for "cross". implementation: of the fused operator where
    it is to run whatever the device, by name. Raises ValueError.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"batch_norm must be one of {', '.join(get_args(Mode))}, not {mode!r}")
    if subdivisions < 1:
        raise ValueError(f"subdivisions must be at least 1, not {subdivisions}")
    for block in module.modules():
        if not isinstance(block, ConvBlock) or block.bn is None:
            continue
        if not isinstance(block.bn, BatchNorm):
            fusible = block.activation in ACTIVATION_CODES
            block.bn = BatchNorm(block.bn, block.activation if fusible else "linear")
            block.activation = "linear" if fusible else block.activation
        block.bn.mode, block.bn.subdivisions = mode, subdivisions
        block.bn.implementation = implementation
        block.bn.begin_batch()


def begin_batch(module: nn.Module) -> None:
    """To be called before the first mini-batch of an optimiser step: CmBN's sums start anew."""
    for norm in module.modules():
        if isinstance(norm, BatchNorm):
            norm.begin_batch()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While open, a module in training normalises by its batches' statistics as ever, and records
    nothing: neither running statistics nor CmBN's sums. Converted or not. Where statistics are of
    all processes, all must enter together.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before, strict=True):
            norm.track_running_stats = tracked
