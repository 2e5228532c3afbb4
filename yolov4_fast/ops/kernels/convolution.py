"""Launches the fused convolution of ops/convolution.py: picks the kernel's way through K and its
constants for a layer. The kernel itself: convolution_kernel.py.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from yolov4_fast.ops.convolution_config import ConvConfig
from yolov4_fast.ops.kernels.ahead import Binary, argument
from yolov4_fast.ops.kernels.convolution_kernel import convolution_kernel
from yolov4_fast.ops.views import row_stride

FLAT_BELOW = 32  # channels: fewer do not fill a step of the K loop
MOST_TAPS = 63  # of which bits can say whether they lie inside the map; more go flat
NARROW_M, NARROW_N, NARROW_K, NARROW_STAGES = 64, 32, 32, 2  # where addresses are not aligned
UNIT = 8  # elements that channels and row strides are multiples of where loads can be wide


def fitted(config: ConvConfig, depth: int, wide: bool) -> ConvConfig:
    """A configuration as it is launched for `depth` values of K a step at most.

    wide: whether loads and stores take 16 bytes. Otherwise each value has an address of its own,
    and the registers suffice for small tiles only.
    """
    config = replace(config, block_k=min(config.block_k, max(32, triton.next_power_of_2(depth))))
    if wide:
        return config
    return replace(
        config,
        block_m=min(config.block_m, NARROW_M),
        block_n=min(config.block_n, NARROW_N),
        block_k=min(config.block_k, NARROW_K),
        num_warps=4,
        num_stages=min(config.num_stages, NARROW_STAGES),
    )


def parts(config: ConvConfig) -> int:
    """How many pieces of a large tile are finished one after the other: 32 sums a thread each."""
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    return sums // 32 if sums >= 128 else 1


def unit(sizes: Iterable[int], tensors: Iterable[Tensor | None]) -> int:
    """UNIT where all sizes are multiples of it and all tensors begin at a multiple of 16 bytes."""
    begins = (tensor.data_ptr() for tensor in tensors if tensor is not None)
    aligned = all(size % UNIT == 0 for size in sizes) and all(begin % 16 == 0 for begin in begins)
    return UNIT if aligned else 1


def launch(
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: int,
    padding: int,
    activation: int,
    config: ConvConfig,
    sums: Tensor | None,
) -> None:
    """Arguments as of `ops.convolution`, checked there; activation by number. sums: float32
    [split_k, rows, filters], filled in place of `out` where the configuration splits K; bias,
    activation and residual are then left to whoever adds them.
    """
    grid, arguments, options = call(
        source, weight, bias, residual, out, stride, padding, activation, config, sums
    )
    convolution_kernel[grid](*arguments, **options)


def binary(
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: int,
    padding: int,
    activation: int,
    config: ConvConfig,
) -> Binary:
    """What `launch` with these arguments needs compiled; no tensor is read."""
    sums = None if config.split_k == 1 else torch.empty((), dtype=torch.float32, device="meta")
    _, arguments, options = call(
        source, weight, bias, residual, out, stride, padding, activation, config, sums
    )
    return Binary(
        convolution_kernel.fn.__module__,
        "convolution_kernel",
        # Sizes are not specialised: one number stands for all.
        tuple(7 if isinstance(value, int) else argument(value) for value in arguments),
        tuple(options.items()),
    )


def call(
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    stride: int,
    padding: int,
    activation: int,
    config: ConvConfig,
    sums: Tensor | None,
) -> tuple[tuple[int, int], tuple[Tensor | int | None, ...], dict[str, int]]:
    """What `launch` calls the kernel with: grid, arguments, constants and options."""
    batch, height, width, channels = source.shape
    filters, kernel_height, kernel_width, _ = weight.shape
    out_height, out_width = out.shape[1:3]
    rows = batch * out_height * out_width
    taps = kernel_height * kernel_width
    flat = taps > MOST_TAPS or (channels < FLAT_BELOW and taps > 1)
    if sums is not None:
        residual, activation = None, 0
    source_step, out_step = row_stride(source), row_stride(out)
    residual_step = 0 if residual is None else row_stride(residual)
    unit_in = unit((channels, source_step), (source, weight))
    unit_out = unit((filters, out_step, residual_step), (out, residual))
    wide = unit_in > 1 and (unit_out > 1 or residual is None)
    config = fitted(config, taps * channels if flat else channels, wide)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(filters, config.block_n)
    arguments = (
        source,
        weight,
        bias,
        residual,
        out if sums is None else sums,
        rows,
        filters // unit_out,
        channels // unit_in,
        height,
        width,
        out_height,
        out_width,
        source_step // unit_in,
        residual_step // unit_out,
        out_step // unit_out,
    )
    options = {
        "KH": kernel_height,
        "KW": kernel_width,
        "STRIDE": stride,
        "PADDING": padding,
        "ACTIVATION": activation,
        "FLAT": channels if flat else 0,
        "EVEN": channels % config.block_k == 0,
        "UNIT_IN": unit_in,
        "UNIT_OUT": unit_out,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "SPLIT": sums is not None,
        "PARTS": parts(config),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    return (tiles, config.split_k), arguments, options
