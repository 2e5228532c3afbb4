"""upsample by 2 into a channel slice on a GPU in float16, against torch channels-last (which then
still has to concatenate) and against the time to move the bytes that must be moved.

`python -m benchmarks.bench_upsample` prints the figures. Without a GPU there is nothing to measure.
"""

import torch
import torch.nn.functional as F

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, report
from benchmarks.roofline import copy_rate
from yolov4_fast.ops.upsample import upsample

SHAPES = ((1, 13, 256), (1, 26, 128), (32, 13, 256), (32, 26, 128))  # YOLOv4 at 416


def functions(batch: int, size: int, channels: int, device: torch.device) -> dict[str, Function]:
    """Each makes [batch, 2 * size, 2 * size, channels]."""
    source = torch.randn(batch, size, size, channels, device=device).half()
    buffer = torch.empty(batch, 2 * size, 2 * size, 2 * channels, device=device).half()
    planes = source.permute(0, 3, 1, 2)
    return {
        "upsample": lambda: upsample(source, buffer[..., channels:], 2),
        "torch interpolate": lambda: F.interpolate(planes, scale_factor=2, mode="nearest"),
    }


def main(gpu_only: bool = False) -> None:
    if not torch.cuda.is_available():
        print("upsample: needs an NVIDIA GPU")
        return
    device = torch.device("cuda")
    rate = copy_rate(device, 2**32)
    for batch, size, channels in SHAPES:
        timings = compare_kernels(functions(batch, size, channels, device))
        ours, peer = (timing.median for timing in timings.values())
        floor = 2 * 5 * batch * size**2 * channels / rate
        report(
            f"upsample [{batch}, {size}, {size}, {channels}] by 2 float16",
            timings,
            {"torch / ours": peer / ours, "ours / moving the bytes once": ours / floor},
        )


if __name__ == "__main__":
    main()
