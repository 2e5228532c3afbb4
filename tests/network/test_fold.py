"""Folding batch normalisation changes numbers by rounding only."""

from __future__ import annotations

import pytest
import torch

from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.fold import fold
from yolov4_fast.network.module import NetworkModule


def trained_like(name: str) -> NetworkModule:
    """Statistics of a batch, as training would leave them, and uneven scales."""
    torch.manual_seed(0)
    settings = {} if name == "yolov4-nano" else {"width_multiple": 0.25}
    network = by_name(name, num_classes=3, width=96, height=64, **settings)
    module = NetworkModule(network, bn_momentum=1.0)
    for block in module.layers.values():
        if block.bn is not None:
            torch.nn.init.uniform_(block.bn.weight, 0.5, 1.5)
            torch.nn.init.normal_(block.bn.bias, std=0.3)
    module.train()
    with torch.no_grad():
        module(torch.rand(4, 3, 64, 96))
    return module.eval()


@pytest.mark.parametrize("name", ["yolov4-nano", "yolov4-tiny", "yolov4-csp", "yolov3-spp"])
def test_outputs_stay_within_rounding(name: str) -> None:
    module = trained_like(name)
    network, state = fold(module.network, module.state_dict())
    assert not any(conv.batch_normalize for _, conv in network.convolutions())
    folded = NetworkModule(network).eval()
    folded.load_state_dict(state)
    image = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        exact = module.double()(image.double())
        difference = [a - b for a, b in zip(folded(image), exact, strict=True)]
    for error, truth in zip(difference, exact, strict=True):
        assert error.abs().max() <= 1e-4 * truth.abs().max()


def test_folding_twice_changes_nothing() -> None:
    module = trained_like("yolov4-nano")
    network, state = fold(module.network, module.state_dict())
    again, again_state = fold(network, state)
    assert again == network
    assert all(torch.equal(again_state[key], state[key]) for key in state)


def test_half_precision_weights_are_folded_in_double() -> None:
    module = trained_like("yolov4-nano")
    halved = {
        key: value.half() if value.is_floating_point() else value
        for key, value in module.state_dict().items()
    }
    _, state = fold(module.network, halved)
    _, exact = fold(module.network, {key: value.double() for key, value in halved.items()})
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[key], exact[key]) for key in exact)
