"""The loss of maps that are extreme, saturated, in bfloat16 or behind a logistic of their own."""

from dataclasses import replace
from math import prod

import pytest
import torch

from training.box_loss import BOX_LOSSES
from training.losses import LossConfig, detection_loss, linear_heads
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.layers import Head
from yolov4_fast.network.module import NetworkModule

ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0))


def head(**changes: object) -> Head:
    settings = {
        "inputs": (0,), "all_anchors": ANCHORS, "mask": (0, 1), "num_classes": 3, "stride": 8,
        "scale_x_y": 1.2, "ignore_thresh": 0.7, "iou_thresh": 0.213,
    }  # fmt: skip
    return Head(**(settings | changes))  # type: ignore[arg-type]


HEADS = (head(), head(mask=(2, 3), stride=16, scale_x_y=1.05))


def random_targets(classes=3):
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(25, 6, generator=generator)
    rows[:, 0], rows[:, 1] = (rows[:, 0] * 2).floor(), (rows[:, 1] * classes).floor()
    return rows * torch.tensor([1, 1, 1, 1, 0.6, 0.6])


def gradients(heads, maps, targets, config, **named):
    leaves = [raw.clone().requires_grad_() for raw in maps]
    losses = detection_loss(heads, leaves, targets, config, **named)
    return losses, torch.autograd.grad(losses.total, leaves)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", BOX_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_maps_are_finite(kind, gamma, dtype):
    heads = (*HEADS, head(new_coords=True, scale_x_y=2.0))
    config = LossConfig(
        box_loss=kind, focal_gamma=gamma, objectness_smooth=0.5, ciou_gradient="paper"
    )
    targets = random_targets()
    for values in ((1e4,), (-1e4,), (1e4, -1e4, 0.0, 30.0, -100.0)):
        shapes = [(2, h.channels, 64 // h.stride, 96 // h.stride) for h in heads]
        maps = [
            torch.tensor(values, dtype=dtype)[torch.arange(prod(s)) % len(values)].view(s)
            for s in shapes
        ]
        losses, grads = gradients(heads, maps, targets, config)
        assert all(term.isfinite() for term in losses), values
        assert all(grad.isfinite().all() for grad in grads), values


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_step_in_bfloat16_with_mish_is_finite_at_extreme_inputs(scale):
    """Pictures of huge values, and heads that answer with values of 1e4."""
    network = by_name("yolov4", num_classes=2, width=64, height=64, width_multiple=0.125,
                      depth_multiple=0.1, neck_activation="mish")  # fmt: skip
    torch.manual_seed(0)
    module = NetworkModule(network)
    for one in network.heads:
        torch.nn.init.normal_(module.layers[str(one.inputs[0])].conv.weight, std=scale)
    images = torch.randn(2, 3, 64, 64) * scale
    with torch.autocast("cpu", torch.bfloat16):
        maps = module(images)
    assert maps[0].dtype == torch.bfloat16 and maps[0].abs().max() > scale / 10
    losses = detection_loss(network.heads, maps, random_targets(classes=2), LossConfig())
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("value", [-1e30, -1e4, -40.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_cells_of_new_coords_heads_keep_their_gradient(value, dtype):
    """Objectness and classes that are wrong beyond what a probability could tell."""
    one = head(mask=(1,), iou_thresh=1.0, new_coords=True)
    raw = torch.zeros(1, 8, 8, 8, dtype=dtype)
    raw[0, 4:] = value
    in_cell_2_3 = torch.tensor([[0, 1, 20.4 / 64, 28.4 / 64, 23 / 64, 27 / 64]])
    _, (grad,) = gradients([one], [raw], in_cell_2_3, LossConfig(), positives=1)
    expected = torch.full((8, 8), float(value > 0))  # at all negatives, or at the object alone
    expected[3, 2] = -float(value < 0)
    torch.testing.assert_close(grad[0, 4].float(), expected)
    classes = torch.tensor([0.0, -1.0, 0.0] if value < 0 else [1.0, 0.0, 1.0])
    torch.testing.assert_close(grad[0, 5:, 3, 2].float(), classes)


def scaled_module():
    network = by_name(
        "yolov4-csp", num_classes=2, width=64, height=64, width_multiple=0.125, depth_multiple=0.1
    )
    torch.manual_seed(0)
    return network, NetworkModule(network)


def test_linear_heads_takes_the_logistic_off_the_module_alone():
    network, module = scaled_module()
    keys, images = list(module.state_dict()), torch.rand(1, 3, 64, 64)
    module.eval()
    with torch.no_grad():
        before = module(images)
        linear_heads(module)
        after = module(images)
    for probability, raw in zip(before, after, strict=True):
        torch.testing.assert_close(raw.sigmoid(), probability)
    assert list(module.state_dict()) == keys and module.network is network
    assert network.layers[network.heads[0].inputs[0]].activation == "logistic"


def test_linear_heads_leaves_other_networks_alone():
    network = by_name("yolov4-tiny", num_classes=2, width=64, height=64)
    module = NetworkModule(network)
    before = [getattr(block, "activation", None) for block in module.layers.values()]
    linear_heads(module)
    assert [getattr(block, "activation", None) for block in module.layers.values()] == before


def test_a_map_behind_its_logistic_is_refused():
    network, module = scaled_module()
    images, targets = torch.rand(2, 3, 64, 64), random_targets(classes=2)
    with pytest.raises(ValueError, match="call linear_heads"):
        detection_loss(network.heads, module(images), targets, LossConfig())
    linear_heads(module)
    detection_loss(network.heads, module(images), targets, LossConfig()).total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_linear_heads_refuses_new_coords_without_a_logistic():
    network, module = scaled_module()
    source = network.heads[0].inputs[0]
    layers = list(network.layers)
    layers[source] = replace(layers[source], activation="linear")
    module.network = replace(network, layers=tuple(layers))
    with pytest.raises(ValueError, match=f"layer {source}: .* activation=logistic"):
        linear_heads(module)
