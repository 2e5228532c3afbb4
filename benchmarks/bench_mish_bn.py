"""mish_bn on a GPU in float16: scale, bias, Mish and residual in one pass, against torch's own
operators and against the time to move the bytes that must be moved; and the sum of split-K's parts.

`python -m benchmarks.bench_mish_bn` prints the figures. Without a GPU there is nothing to measure.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, report
from benchmarks.roofline import copy_rate
from yolov4_fast.ops.mish_bn import mish_bn

# YOLOv4 at 416: batch, height and width, channels.
SHAPES = ((32, 208, 64), (32, 52, 256), (1, 208, 64), (1, 52, 256), (1, 13, 1024))
SPLITS = 4


def functions(batch: int, size: int, channels: int, device: torch.device) -> dict[str, Function]:
    """Each makes [batch, size, size, channels], the first two written into a slice of a buffer."""
    shape = (batch, size, size, channels)
    x, residual = (torch.randn(shape, device=device).half() for _ in range(2))
    scale, bias = torch.rand(channels, device=device), torch.randn(channels, device=device)
    halves = scale.half(), bias.half()
    out = torch.empty((*shape[:3], 2 * channels), dtype=torch.float16, device=device)[
        ..., channels:
    ]
    partial = torch.randn(SPLITS, batch * size * size, channels, device=device)

    def in_torch() -> Tensor:
        return F.mish(torch.addcmul(halves[1], x, halves[0])) + residual

    return {
        "mish_bn": lambda: mish_bn(x, scale, bias, "mish", None, out),
        "mish_bn with residual": lambda: mish_bn(x, scale, bias, "mish", residual, out),
        f"mish_bn of {SPLITS} partial sums": lambda: mish_bn(
            partial, None, bias, "mish", None, out
        ),
        "torch with residual": in_torch,
    }


def main(gpu_only: bool = False) -> None:
    if not torch.cuda.is_available():
        print("mish_bn: needs an NVIDIA GPU")
        return
    device = torch.device("cuda")
    rate = copy_rate(device, 2**32)
    for shape in SHAPES:
        timings = compare_kernels(functions(*shape, device))
        batch, size, channels = shape
        values = batch * size**2 * channels
        plain, added, partial, peer = (timing.median for timing in timings.values())
        report(
            f"mish_bn [{batch}, {size}, {size}, {channels}] float16",
            timings,
            {
                "torch / ours, with residual": peer / added,
                "ours / moving the bytes once": plain / (4 * values / rate),
                "the same, with residual": added / (6 * values / rate),
                "the same, partial sums": partial / ((4 * SPLITS + 2) * values / rate),
            },
        )


if __name__ == "__main__":
    main()
