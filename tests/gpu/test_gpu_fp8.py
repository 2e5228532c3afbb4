"""FP8 on a GPU: cuDNN's fused convolutions against the emulation that the CPU tests use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from yolov4_fast.engines.cuda.cudnn_graphs import Cudnn, FusedConvolution, available
from yolov4_fast.engines.cuda.cudnn_problem import FP8, Problem
from yolov4_fast.engines.cuda.fp8 import (
    calibrate,
    quantise_weights,
    quantised_kernel,
    run_quantised,
    step_scales,
)
from yolov4_fast.engines.cuda.lower import lower
from yolov4_fast.engines.cuda.plan import Convolution, View
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Conv
from yolov4_fast.network.module import NetworkModule


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (9, 0):
        return "needs a GPU with FP8 (Hopper or newer)"
    return available()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def test_every_convolution_of_yolov4() -> None:
    """Each of a small YOLOv4's, from random stored values, in the first plans that cuDNN has."""
    network = by_name("yolov4", num_classes=3, width=96, height=64, width_multiple=0.5)
    layers = (
        replace(layer, batch_normalize=False) if isinstance(layer, Conv) else layer
        for layer in network.layers
    )
    network = replace(network, layers=tuple(layers))
    plan = lower(network)
    torch.manual_seed(0)
    state = {name: v.cuda() for name, v in NetworkModule(network).state_dict().items()}
    scales = calibrate(plan, state, [torch.rand(2, 3, 64, 96, device="cuda")], "cuda")
    weights = quantise_weights(plan, state, scales, "cuda")
    dtypes = scales.dtypes()
    cudnn = Cudnn(torch.device("cuda", torch.cuda.current_device()))

    def buffer(number: int, batch: int) -> Tensor:
        found = plan.buffers[number]
        shape = (batch, found.height, found.width, found.channels)
        values = torch.randn(shape, device="cuda") * (40 if dtypes[number] == FP8 else 1)
        return values.to(dtypes[number])

    seen = set()
    for step in plan.steps:
        if not isinstance(step, Convolution):
            continue
        views = (*step.reads, *step.writes)
        buffers = {view.buffer: buffer(view.buffer, 2) for view in views}

        def tensor(view: View, buffers: dict[int, Tensor] = buffers) -> Tensor:
            return buffers[view.buffer][..., view.offset : view.offset + view.channels]

        own, out = weights[step.weights[0]], tensor(step.out)
        residual = None if step.residual is None else tensor(step.residual)
        problem = Problem.of(
            tensor(step.source),
            own.weight,
            out,
            stride=step.stride,
            padding=step.padding,
            activation=step.activation,
            residual=residual,
        )
        if problem in seen:
            continue
        seen.add(problem)
        sources = {number: values.clone() for number, values in buffers.items()}
        quantised_kernel(step, tensor, weights, scales)()
        expected = out.float().clone()
        for name in cudnn.plan_names(problem)[:2]:
            for number, values in sources.items():
                buffers[number].copy_(values)
            fused = FusedConvolution(cudnn, problem, name)
            workspace = torch.empty(fused.workspace_bytes, dtype=torch.uint8, device="cuda")
            fused.run(
                tensor(step.source),
                own.weight,
                own.bias,
                out,
                residual,
                workspace,
                step_scales(step, own, scales),
            )
            torch.cuda.synchronize()
            found = out.float()
            assert not bool(found.isnan().any()), f"{name}: {step}"
            # Sums of another order, and of fewer bits in Hopper's FP8, may round to a neighbour.
            torch.testing.assert_close(
                found, expected, rtol=2**-3, atol=0.02 * float(expected.abs().max()),
                msg=lambda text, name=name, step=step: f"{name}: {step}: {text}",
            )  # fmt: skip
            assert float((found - expected).std()) < 0.03 * float(expected.std())
    assert len({(problem.dtype, problem.out_dtype) for problem in seen}) == 4


def test_emulation_is_the_same_on_both_devices() -> None:
    network = by_name("yolov4-tiny", num_classes=3, width=64, height=64)
    layers = (
        replace(layer, batch_normalize=False) if isinstance(layer, Conv) else layer
        for layer in network.layers
    )
    network = replace(network, layers=tuple(layers))
    plan = lower(network)
    torch.manual_seed(0)
    state = NetworkModule(network).state_dict()
    images = torch.rand(2, 3, 64, 64)
    scales = calibrate(plan, state, [images])
    there = calibrate(plan, state, [images.cuda()], "cuda")
    assert scales.dtypes() == there.dtypes()
    for one, other in zip(scales.values, there.values, strict=True):
        assert (one or 1.0) == pytest.approx(other or 1.0, rel=1e-4)
    maps = [
        run_quantised(
            plan, quantise_weights(plan, state, scales, device), scales, images.to(device)
        )
        for device in ("cpu", "cuda")
    ]
    for one, other in zip(*maps, strict=True):
        assert float((one - other.cpu()).std()) < 0.1 * float(one.std())
