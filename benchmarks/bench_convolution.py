"""convolution on a GPU in float16: each tiling that `configs_for` proposes for layers of YOLOv4 at
416, against torch's channels-last convolution with bias, Mish and (3x3) the residual as operators
of their own, and against the layer's floor: its bytes or its operations, whichever takes longer at
the rates that a copy and a matrix product reach in the same run.

`python -m benchmarks.bench_convolution` prints the figures. Without a GPU there is nothing to
measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.graph_timing import compare_kernels
from benchmarks.harness import Function, report
from benchmarks.roofline import Rates, measure_rates
from yolov4_fast.ops.convolution import ConvConfig, configs_for, convolution, workspace_bytes

DTYPE = torch.float16


@dataclass(frozen=True)
class Layer:
    """cells: of one side of the square source."""

    cells: int
    channels: int
    filters: int
    size: int
    stride: int = 1

    @property
    def out_cells(self) -> int:
        return self.cells // self.stride

    def __str__(self) -> str:
        return (
            f"{self.size}x{self.size}/{self.stride} {self.cells}x{self.cells}x{self.channels} "
            f"to {self.filters}"
        )

    def floor(self, batch: int, rates: Rates) -> float:
        """Seconds that the layer takes at least."""
        weights = self.filters * self.channels * self.size**2
        rows = batch * self.out_cells**2
        read = batch * self.cells**2 * self.channels + weights
        residual = rows * self.filters if self.has_residual else 0
        moved = DTYPE.itemsize * (read + residual + rows * self.filters)
        return max(moved / rates.copy, 2 * rows * weights / rates.matrix)

    @property
    def has_residual(self) -> bool:
        return self.size == 3 and self.stride == 1


LAYERS = (
    Layer(416, 3, 32, 3),
    Layer(416, 32, 64, 3, 2),
    Layer(208, 64, 64, 1),
    Layer(104, 64, 64, 3),
    Layer(52, 128, 128, 1),
    Layer(52, 128, 128, 3),
    Layer(26, 256, 256, 3),
    Layer(13, 512, 512, 3),
    Layer(13, 512, 1024, 3),
    Layer(13, 2048, 512, 1),
    Layer(52, 256, 255, 1),
)


def functions(layer: Layer, batch: int, device: torch.device) -> dict[str, Function]:
    """Each makes the layer's output; ours writes into the second half of a buffer's channels."""
    properties = torch.cuda.get_device_properties(device)
    rows = batch * layer.out_cells**2
    configs = configs_for(
        rows,
        layer.filters,
        layer.size**2 * layer.channels,
        properties.multi_processor_count,
        DTYPE,
        10 * properties.major + properties.minor,
    )

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPE)

    source = random(batch, layer.cells, layer.cells, layer.channels)
    weight = random(layer.filters, layer.size, layer.size, layer.channels)
    weight /= (layer.size**2 * layer.channels) ** 0.5
    bias = torch.randn(layer.filters, device=device)
    step = -(-layer.filters // 8) * 8
    buffer = random(batch, layer.out_cells, layer.out_cells, 2 * step)
    out = buffer[..., step : step + layer.filters]
    residual = random(*out.shape) if layer.has_residual else None
    room = max(workspace_bytes(config, rows, layer.filters) for config in configs)
    workspace = torch.empty(room, dtype=torch.uint8, device=device)
    ours = {
        name(config): partial(
            convolution,
            *(source, weight, bias, out),
            stride=layer.stride,
            padding=layer.size // 2,
            activation="mish",
            residual=residual,
            config=config,
            workspace=workspace,
        )
        for config in configs
    }
    nchw, oihw, half = source.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias.half()

    def in_torch() -> Tensor:
        x = F.mish(F.conv2d(nchw, oihw, half, layer.stride, layer.size // 2))
        return x if residual is None else x + residual.permute(0, 3, 1, 2)

    return {**ours, "torch": in_torch}


def name(config: ConvConfig) -> str:
    return (
        f"{config.block_m}x{config.block_n}x{config.block_k} warps {config.num_warps} "
        f"stages {config.num_stages} split {config.split_k}"
    )


def summary(
    layer: Layer, batch: int, rates: Rates, medians: Mapping[str, float]
) -> dict[str, object]:
    """The best of ours beside torch and the floor."""
    ours = {key: value for key, value in medians.items() if key != "torch"}
    best = min(ours, key=lambda key: ours[key])
    return {
        "best": best,
        "proposed at": list(ours).index(best) + 1,
        "torch / best": medians["torch"] / ours[best],
        "first / best": next(iter(ours.values())) / ours[best],
        "best / floor": ours[best] / layer.floor(batch, rates),
    }


def main(gpu_only: bool = False) -> None:
    """gpu_only: for callers that ask for the GPU's figures; there are no others here."""
    if not torch.cuda.is_available():
        print("convolution: needs an NVIDIA GPU")
        return
    device = torch.device("cuda")
    rates = measure_rates(device, DTYPE)
    for batch in (1, 32):
        for layer in LAYERS:
            timings = compare_kernels(functions(layer, batch, device))
            medians = {key: timing.median for key, timing in timings.items()}
            report(
                f"convolution {layer}, batch {batch}, float16",
                timings,
                summary(layer, batch, rates, medians),
            )


if __name__ == "__main__":
    main()
