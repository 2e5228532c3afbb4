"""The fused convolution on a GPU: every tiling that is proposed for layers of real networks, every
type, slices whose offsets pass 2^31, capture in a CUDA graph, other streams, many runs alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference, activation_code
from yolov4_fast.ops.convolution import (
    ConvConfig,
    configs_for,
    convolution,
    workspace_bytes,
)
from yolov4_fast.ops.convolution_config import SCALAR, WARP, WARPGROUP

if TYPE_CHECKING:
    from yolov4_fast.ops.kernels.ahead import Binary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# One unit in the last place of the rounded result, and float32 sums of K products that together
# are about 1, which are wrong by some 1e-6.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
}
DTYPES = list(TOLERANCES)
Shape = tuple[int, int, int, int, int]
# cells of a side, channels, filters, size, stride: of YOLOv4, and some that fit nothing
LAYERS = [
    (416, 3, 32, 3, 1),
    (208, 32, 64, 3, 2),
    (104, 64, 64, 1, 1),
    (52, 128, 128, 3, 1),
    (52, 256, 255, 1, 1),
    (26, 256, 512, 3, 2),
    (26, 512, 256, 1, 1),
    (13, 512, 1024, 3, 1),
    (13, 2048, 512, 1, 1),
    (38, 48, 72, 3, 1),
    (19, 40, 130, 3, 2),
    (21, 6, 10, 3, 1),
    (17, 33, 65, 5, 1),
]


class Layer:
    """Random operands in poisoned buffers."""

    def __init__(
        self,
        batch: int,
        shape: Shape,
        dtype: torch.dtype,
        activation: str = "mish",
        residual: bool = True,
    ) -> None:
        cells, channels, filters, size, stride = shape
        out_cells = (cells - 1) // stride + 1
        self.source = poisoned((batch, cells, cells, channels), dtype).normal_()
        self.out = poisoned((batch, out_cells, out_cells, filters), dtype)
        self.residual = torch.randn_like(self.out) if residual else None
        depth = size * size * channels
        weight = torch.randn(filters, size, size, channels, device="cuda") / math.sqrt(depth)
        self.weight, self.bias = weight.to(dtype), torch.randn(filters, device="cuda")
        self.options = {"stride": stride, "padding": size // 2, "activation": activation}
        self.rows, self.filters, self.depth = self.out.shape[:3].numel(), filters, depth

    def run(self, config: ConvConfig | None, workspace: Tensor | None = None) -> Tensor:
        return convolution(
            *(self.source, self.weight, self.bias, self.out),
            **self.options,
            residual=self.residual,
            config=config,
            workspace=workspace,
        )

    def binary(self, config: ConvConfig) -> Binary:
        from yolov4_fast.ops.kernels.convolution import binary

        options = {**self.options, "activation": activation_code(str(self.options["activation"]))}
        return binary(
            *(self.source, self.weight, self.bias, self.residual, self.out),
            **options,
            config=config,
        )

    def expected(self) -> Tensor:
        """In float64, rounded once: float32 algorithms of cuDNN may be less exact than ours."""
        source, weight = (x.double().permute(0, 3, 1, 2) for x in (self.source, self.weight))
        stride, padding, activation = self.options.values()
        exact = F.conv2d(source, weight, self.bias.double(), stride, padding)
        exact = activate_reference(exact.permute(0, 2, 3, 1), activation)
        exact = exact if self.residual is None else exact + self.residual.double()
        return exact.to(self.out.dtype)

    def configs(self) -> list[ConvConfig]:
        properties = torch.cuda.get_device_properties(0)
        sm = 10 * properties.major + properties.minor
        dtype = self.source.dtype
        processors = properties.multi_processor_count
        return configs_for(self.rows, self.filters, self.depth, processors, dtype, sm)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A slice of a buffer of NaN, 16 channels in, its rows aligned to 16 bytes."""
    after = 16 + -shape[3] % 8
    buffer = torch.full((*shape[:3], 16 + shape[3] + after), math.nan, device="cuda", dtype=dtype)
    return buffer[..., 16 : 16 + shape[3]]


def check_around(view: Tensor) -> None:
    buffer, channels = view._base, view.shape[3]
    assert buffer is not None
    assert buffer[..., :16].isnan().all() and buffer[..., 16 + channels :].isnan().all()


CASES = [
    *((shape, batch, torch.float16) for shape in LAYERS for batch in (1, 8)),
    *((shape, 3, dtype) for shape in LAYERS[::4] for dtype in (torch.bfloat16, torch.float32)),
]
TILINGS = [
    ConvConfig(
        tiling.block_m, tiling.block_n, tiling.block_k, tiling.num_warps, tiling.num_stages, split
    )
    for tiling in WARPGROUP + WARP + SCALAR
    for split in (1, 5)
]
SCALAR_BLOCK_K = SCALAR[0].block_k


def tiled_layer(tiling: ConvConfig, size: int) -> Layer | None:
    """A layer for any tiling; None where this GPU has too little shared memory for it."""
    dtype = torch.float32 if tiling.block_k == SCALAR_BLOCK_K else torch.float16
    values = (tiling.block_m + tiling.block_n) * tiling.block_k * tiling.num_stages
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    fits = values * dtype.itemsize <= limit
    return Layer(3, (30, 200, 136, size, 1), dtype) if fits else None


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All that the larger tests launch, compiled on several processors at once."""
    from yolov4_fast.ops.kernels.ahead import compile_ahead

    capability = torch.cuda.get_device_capability(0)
    compile_ahead(binaries(), 10 * capability[0] + capability[1])


def binaries() -> Iterator[Binary]:
    for shape, batch, dtype in CASES:
        layer = Layer(batch, shape, dtype)
        yield from map(layer.binary, layer.configs())
    for size in (1, 3):
        for tiling in TILINGS:
            tiled = tiled_layer(tiling, size)
            if tiled is not None:
                yield tiled.binary(tiling)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("shape", "batch", "dtype"), CASES, ids=str)
def test_what_is_proposed_for_a_layer(shape: Shape, batch: int, dtype: torch.dtype) -> None:
    layer = Layer(batch, shape, dtype)
    expected = layer.expected()
    for config in layer.configs():
        layer.out.fill_(math.nan)
        torch.testing.assert_close(
            layer.run(config),
            expected,
            **TOLERANCES[dtype],
            msg=lambda text, config=config: f"{config}: {text}",
        )
        check_around(layer.out)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_every_tiling(tiling: ConvConfig, size: int) -> None:
    """Those of another kind of GPU too, where they find enough shared memory."""
    layer = tiled_layer(tiling, size)
    if layer is None:
        pytest.skip("needs more shared memory than this GPU has")
    expected = layer.expected()
    torch.testing.assert_close(layer.run(tiling), expected, **TOLERANCES[layer.out.dtype])
    check_around(layer.out)


@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues(activation: str, residual: bool, dtype: torch.dtype) -> None:
    layer = Layer(2, (26, 64, 128, 3, 1), dtype, activation, residual)
    torch.testing.assert_close(layer.run(None), layer.expected(), **TOLERANCES[dtype])


@pytest.mark.parametrize("split", [1, 8])
def test_the_same_bits_in_every_run(split: int) -> None:
    layer = Layer(1, (13, 512, 512, 3, 1), torch.float16)
    config = ConvConfig(64, 64, 64, 4, 3, split)
    first = layer.run(config).clone()
    for _ in range(20):
        assert torch.equal(layer.run(config), first)


@pytest.mark.parametrize("split", [1, 4])
def test_capture_in_a_graph(split: int) -> None:
    layer = Layer(1, (13, 256, 256, 3, 1), torch.float16)
    config = ConvConfig(64, 64, 64, 4, 3, split)
    room = workspace_bytes(config, layer.rows, layer.filters)
    workspace = torch.empty(room, dtype=torch.uint8, device="cuda")
    layer.run(config, workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(config, workspace)
    layer.source.normal_()
    layer.out.fill_(math.nan)
    graph.replay()
    torch.testing.assert_close(layer.out, layer.expected(), **TOLERANCES[torch.float16])


def test_the_current_stream_is_used() -> None:
    layer = Layer(8, (52, 128, 128, 3, 1), torch.float16)
    layer.run(None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        layer.source.normal_()
        layer.run(None)
        expected = layer.expected()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(layer.out, expected, **TOLERANCES[torch.float16])


@pytest.mark.parametrize("size", [1, 3])
def test_offsets_beyond_2_to_the_31(size: int) -> None:
    """64 x 64 cells whose rows lie 2^20 values apart: 8.6 GB for the buffer."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    small = Layer(1, (64, 64, 64, size, 1), torch.float16)
    buffer = torch.empty(1, 64, 64, 2**20, dtype=torch.float16, device="cuda")
    expected = small.expected()
    source, out, residual = (buffer[..., 64 * i : 64 * (i + 1)] for i in range(3))
    source.copy_(small.source)
    residual.copy_(small.residual)
    convolution(source, small.weight, small.bias, out, **small.options, residual=residual)
    torch.testing.assert_close(out.contiguous(), expected, **TOLERANCES[torch.float16])
