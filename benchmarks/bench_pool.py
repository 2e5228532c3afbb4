"""Pooling on a GPU in float16: SPP in one kernel and max-pooling, against torch channels-last and
against the time to move the bytes that must be moved.

`python -m benchmarks.bench_pool` prints the figures. Without a GPU there is nothing to measure.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, report
from benchmarks.roofline import copy_rate
from yolov4_fast.ops.pool import max_pool, pyramid_pool

SIZES = (13, 9, 5)
SPP_SHAPES = ((1, 13, 512), (32, 13, 512), (1, 19, 512), (32, 19, 512))  # YOLOv4 at 416 and 608
POOL_SHAPES = ((1, 104, 128), (32, 104, 128), (32, 26, 512))  # YOLOv4-tiny at 416


def spp(batch: int, size: int, channels: int, device: torch.device) -> dict[str, Function]:
    """Each fills a buffer [batch, size, size, 4 * channels] (torch: makes it)."""
    buffer = torch.randn(batch, size, size, 4 * channels, device=device).half()
    views = buffer.split(channels, 3)
    planes = views[-1].contiguous().permute(0, 3, 1, 2)  # channels-last, as torch has it

    def in_torch() -> Tensor:
        pooled = [F.max_pool2d(planes, size, 1, size // 2) for size in SIZES]
        return torch.cat([*pooled, planes], 1)

    return {
        "pyramid_pool": lambda: pyramid_pool(views[-1], views[:-1], SIZES),
        "torch max_pool2d and cat": in_torch,
    }


def halving(batch: int, size: int, channels: int, device: torch.device) -> dict[str, Function]:
    """Each makes [batch, size / 2, size / 2, channels]."""
    source = torch.randn(batch, size, size, channels, device=device).half()
    out = torch.empty(batch, size // 2, size // 2, channels, dtype=torch.float16, device=device)
    planes = source.permute(0, 3, 1, 2)
    return {
        "max_pool": lambda: max_pool(source, out, 2, 2, (0, 0, 0, 0)),
        "torch max_pool2d": lambda: F.max_pool2d(planes, 2, 2),
    }


def main(gpu_only: bool = False) -> None:
    if not torch.cuda.is_available():
        print("pool: needs an NVIDIA GPU")
        return
    device = torch.device("cuda")
    rate = copy_rate(device, 2**32)
    # Values moved per value of the source: SPP reads it once and writes three as large.
    kinds = (("SPP 5, 9, 13", spp, SPP_SHAPES, 4), ("max_pool 2/2", halving, POOL_SHAPES, 1.25))
    for name, functions, shapes, moved in kinds:
        for batch, size, channels in shapes:
            timings = compare_kernels(functions(batch, size, channels, device))
            ours, peer = (timing.median for timing in timings.values())
            floor = 2 * moved * batch * size**2 * channels / rate
            report(
                f"{name} [{batch}, {size}, {size}, {channels}] float16",
                timings,
                {"torch / ours": peer / ours, "ours / moving the bytes once": ours / floor},
            )


if __name__ == "__main__":
    main()
