"""convolution: a fused convolution over channels-last views, the CUDA engine's main step.

    out = activation(conv(source, weight) + bias) + residual

Cross-correlation with zero padding, as everywhere in deep learning, without groups or dilation.
Products are summed, activated and added in float32 and rounded once. The order of the sum over K
differs between the implementations and tilings, so results agree to rounding, not bit for bit;
each of them gives the same bits in every run.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov4_fast.ops.activation import activate_reference, activation_code
from yolov4_fast.ops.convolution_config import ConvConfig, configs_for, workspace_bytes
from yolov4_fast.ops.full_precision import full_precision
from yolov4_fast.ops.mish_bn import mish_bn
from yolov4_fast.ops.views import (
    FLOATS,
    Implementation,
    check_dtype,
    check_same_device,
    row_stride,
    uses_kernel,
)

__all__ = [
    "ConvConfig",
    "configs_for",
    "convolution",
    "convolution_reference",
    "default_config",
    "workspace_bytes",
]


def convolution(
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    stride: int,
    padding: int,
    activation: str,
    residual: Tensor | None = None,
    config: ConvConfig | None = None,
    workspace: Tensor | None = None,
    implementation: Implementation = "kernel",
) -> Tensor:
    """Convolution, bias, activation and residual in one pass; fills `out` and returns it.

    source: view [B, H, W, I]. weight: [O, KH, KW, I], contiguous. bias: [O] float32.
    out, residual: views [B, OH, OW, O]; out may be the residual itself, but nothing that it reads
    otherwise. One dtype of float32, float16 and bfloat16 for all but the bias. stride: 1 or more;
    padding: zeros around the map, 0 or more; activation: see ops/activation.py.
    config: tiling of the kernel, by default the one that promises most on this device.
    workspace: for a config with split_k > 1, on the same device, contiguous, of at least
    `workspace_bytes(config, B * OH * OW, O)` bytes; allocated when None.
    Raises ValueError.
    """
    _check(source, weight, bias, out, stride, padding, activation, residual)
    if not uses_kernel(source, implementation):
        return out.copy_(
            convolution_reference(
                source,
                weight,
                bias,
                stride=stride,
                padding=padding,
                activation=activation,
                residual=residual,
            )
        )
    from yolov4_fast.ops.kernels import convolution as kernel

    config = config or default_config(source, weight, out)
    rows, filters = out.shape[:3].numel(), out.shape[3]
    sums = None if config.split_k == 1 else _sums(workspace, config, rows, filters, out)
    with torch.cuda.device_of(out):
        kernel.launch(
            source,
            weight,
            bias,
            residual,
            out,
            stride,
            padding,
            activation_code(activation),
            config,
            sums,
        )
    if sums is not None:
        mish_bn(sums, None, bias, activation, residual, out)
    return out


def convolution_reference(
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int,
    padding: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition in torch, on any device, in full float32: arguments as of `convolution`; a new
    tensor [B, OH, OW, O].
    """
    nchw, oihw = (x.float().permute(0, 3, 1, 2) for x in (source, weight))
    with full_precision():
        x = F.conv2d(nchw, oihw, bias, stride, padding)
    x = activate_reference(x.permute(0, 2, 3, 1), activation)
    return x if residual is None else x + residual.float()


def default_config(source: Tensor, weight: Tensor, out: Tensor) -> ConvConfig:
    """The tiling that promises most for these arguments of `convolution` on their device."""
    sm_count, sm = _device(source.device)
    rows, depth = out.shape[:3].numel(), weight[0].numel()
    return configs_for(rows, weight.shape[0], depth, sm_count, source.dtype, sm)[0]


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors and compute capability; of the smallest GPU for the interpreter's CPU."""
    if device.type != "cuda":
        return 1, 75
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _sums(
    workspace: Tensor | None, config: ConvConfig, rows: int, filters: int, out: Tensor
) -> Tensor:
    """float32 [split_k, rows, filters] in the workspace."""
    needed = workspace_bytes(config, rows, filters)
    if workspace is None:
        workspace = torch.empty(needed, dtype=torch.uint8, device=out.device)
    check_same_device((workspace, out))
    if not workspace.is_contiguous() or workspace.nbytes < needed or workspace.data_ptr() % 16:
        raise ValueError(
            f"split_k {config.split_k} needs a contiguous workspace of {needed} bytes at a "
            f"multiple of 16, not one of {workspace.nbytes} bytes with strides "
            f"{list(workspace.stride())} at {workspace.data_ptr():#x}"
        )
    flat = workspace.view(-1).view(torch.uint8)[:needed].view(torch.float32)
    return flat.view(config.split_k, rows, filters)


def _check(
    source: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    stride: int,
    padding: int,
    activation: str,
    residual: Tensor | None,
) -> None:
    activation_code(activation)
    row_stride(source, "the source")
    row_stride(out, "out")
    check_dtype(source, "the source", FLOATS)
    check_dtype(weight, "the weight", (source.dtype,))
    check_dtype(out, "out", (source.dtype,))
    check_dtype(bias, "the bias", (torch.float32,))
    if stride < 1 or padding < 0:
        raise ValueError(
            f"stride must be at least 1 and padding at least 0, not {stride} and {padding}"
        )
    batch, height, width, channels = source.shape
    if weight.ndim != 4 or weight.shape[3] != channels or not weight.is_contiguous():
        raise ValueError(
            f"the weight must be [filters, height, width, {channels}] for a source of {channels} "
            f"channels (groups are not taken), contiguous, not of shape {list(weight.shape)} and "
            f"strides {list(weight.stride())}"
        )
    filters, size_y, size_x, _ = weight.shape
    if bias.shape != (filters,) or not bias.is_contiguous():
        raise ValueError(
            f"the bias must be [{filters}] and contiguous, not {list(bias.shape)} with strides "
            f"{list(bias.stride())}"
        )
    out_height = (height + 2 * padding - size_y) // stride + 1
    out_width = (width + 2 * padding - size_x) // stride + 1
    if out.shape != (batch, out_height, out_width, filters):
        raise ValueError(
            f"out must be {[batch, out_height, out_width, filters]} for a source of "
            f"{list(source.shape)}, weight {list(weight.shape)}, stride {stride} and padding "
            f"{padding}, not {list(out.shape)}"
        )
    cells = batch * max(height * width, out_height * out_width)
    if max(cells, weight.numel()) >= 2**30:
        raise ValueError(
            f"a source of {list(source.shape)} or a weight of {list(weight.shape)} is too large: "
            "cells and weights must be fewer than 2^30"
        )
    if residual is not None:
        row_stride(residual, "the residual")
        check_dtype(residual, "the residual", (out.dtype,))
        if residual.shape != out.shape:
            raise ValueError(
                f"the residual {list(residual.shape)} and out {list(out.shape)} must have one shape"
            )
    check_same_device([t for t in (source, weight, bias, residual, out) if t is not None])
