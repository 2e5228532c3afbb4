"""The switches of the YOLOv4 family: what each changes, and that all of it can be trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from yolov4_fast.darknet.cfg import parse_cfg, write_cfg
from yolov4_fast.network.architectures import NAMES, Switches, by_name, settings_of, yolov4
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    Conv,
    Head,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shortcut,
)
from yolov4_fast.network.module import NetworkModule

FAMILY = ("yolov4", "yolov4-nano", "yolov4-seed-leaky", "yolov4-seed-mish")
# Settings, and how many convolutions and layers yolov4 then has.
SWITCHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "no pooling": ({"spp": False}, 109, 155),
    "top-down only": ({"pan": False}, 98, 148),
    "residual stages": ({"csp": False}, 90, 132),
    "attention": ({"sam": True}, 113, 168),
    "attention, top-down": ({"sam": True, "pan": False}, 101, 154),
    "attention, no pooling": ({"sam": True, "spp": False, "pan": False}, 100, 147),
    "weighted, relu": ({"weighted_shortcuts": "relu"}, 110, 162),
    "weighted, softmax": ({"weighted_shortcuts": "softmax"}, 110, 162),
    "prelu": ({"activation": "prelu", "neck_activation": "prelu"}, 110, 162),
    "all": (
        {
            "activation": "hard_swish",
            "neck_activation": "selu",
            "csp": False,
            "sam": True,
            "weighted_shortcuts": "softmax",
            "scale_x_y": (1.0, 1.0, 1.0),
        },
        93,
        138,
    ),
}


def layers_of(network: Network, kind: type) -> list[Any]:
    return [layer for layer in network.layers if isinstance(layer, kind)]


@pytest.mark.parametrize("name", FAMILY)
def test_the_defaults_change_nothing(name: str) -> None:
    own = {"neck_activation": "mish"} if name == "yolov4-seed-mish" else {}
    assert by_name(name, **(asdict(Switches()) | own)) == by_name(name)


@pytest.mark.parametrize("case", SWITCHED)
def test_counts_and_the_round_trip(case: str) -> None:
    switches, convolutions, layers = SWITCHED[case]
    network = yolov4(**switches)
    assert len(list(network.convolutions())) == convolutions
    assert len(network.layers) == layers
    assert [head.stride for head in network.heads] == [8, 16, 32]
    assert [head.mask for head in network.heads] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    assert parse_cfg(write_cfg(network)) == network


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_backbone_and_neck(activation: str) -> None:
    plain, network = yolov4(), yolov4(activation=activation)
    changed = [
        ours.activation
        for ours, theirs in zip(network.layers, plain.layers, strict=True)
        if isinstance(ours, Conv) and isinstance(theirs, Conv) and theirs.activation == "mish"
    ]
    assert changed == [activation] * 72
    assert Counter(
        conv.activation for _, conv in yolov4(neck_activation=activation).convolutions()
    )[activation] == 35 + {"mish": 72, "linear": 3}.get(activation, 0)


def test_residual_stages_are_darknet_53() -> None:
    ours, theirs = yolov4(csp=False), by_name("yolov3", width=608, height=608)
    for index in range(75):
        layer = theirs.layers[index]
        expected = replace(layer, activation="mish") if isinstance(layer, Conv) else layer
        assert ours.layers[index] == expected
    assert not any(isinstance(layer, Route) for layer in ours.layers[:75])
    assert yolov4(csp=False, depth_multiple=0.34).parameters() < ours.parameters()


def test_without_pooling_five_convolutions_lead_to_the_neck() -> None:
    network = yolov4(spp=False)
    assert not layers_of(network, MaxPool) and len(layers_of(yolov4(), MaxPool)) == 3
    block = network.layers[105:110]
    assert [(layer.filters, layer.size) for layer in block] == [  # type: ignore[attr-defined]
        (512, 1), (1024, 3), (512, 1), (1024, 3), (512, 1),
    ]  # fmt: skip


def test_without_path_aggregation_nothing_goes_down_again() -> None:
    network = yolov4(pan=False)
    strides = [layer.stride for layer in network.layers[105:] if isinstance(layer, Conv)]
    assert set(strides) == {1}
    assert sum(conv.stride == 2 for conv in layers_of(yolov4(), Conv)) == 7
    # Each head reads the block of its stride: 512, 256 and 128 channels, then twice as many.
    inputs = network.input_shapes()
    for index, layer in enumerate(network.layers):
        if isinstance(layer, Head):
            before = inputs[index - 2][0]
            assert before == (16 * layer.stride, 608 // layer.stride, 608 // layer.stride)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("pan", [True, False])
@pytest.mark.parametrize("spp", [True, False])
def test_attention_stands_before_each_head(name: str, pan: bool, spp: bool) -> None:
    """As in yolov4-sam-mish.cfg: 3x3, its attention, 1x1, 3x3, the head's 1x1."""
    network = by_name(name, sam=True, pan=pan, spp=spp)
    shapes = network.shapes()
    heads = [index for index, layer in enumerate(network.layers) if isinstance(layer, Head)]
    products = [index for index, layer in enumerate(network.layers) if isinstance(layer, Sam)]
    assert len(products) == 3
    read_by_heads = set()
    for index in heads:
        last = index - 2  # the head's convolution and the 3x3 before it
        source = network.layers[last].inputs[0]
        while isinstance(network.layers[source], Route):
            (source,) = network.layers[source].inputs
        read_by_heads.add(source - 1)
    assert read_by_heads == set(products)
    for index in products:
        before, gate, after = (network.layers[index + offset] for offset in (-2, -1, 1))
        assert isinstance(before, Conv) and isinstance(gate, Conv) and isinstance(after, Conv)
        assert (before.size, gate.size, after.size) == (3, 1, 1)
        assert gate.activation == "logistic" and gate.batch_normalize
        assert network.layers[index].inputs == (index - 1, index - 2)
        assert gate.inputs == (index - 2,) and shapes[index - 1] == shapes[index - 2]


def test_attention_counts_layers_as_the_cfg_does() -> None:
    """The concatenations of yolov4-sam-mish.cfg, relative to where they stand."""
    network = yolov4(width=512, height=512, sam=True, neck_activation="mish")
    joins = [
        tuple(source - index for source in layer.inputs)
        for index, layer in enumerate(network.layers)
        if isinstance(layer, Route) and len(layer.inputs) == 2 and index > 114
    ]
    assert joins == [(-1, -3), (-1, -3), (-1, -18), (-1, -41)]


def test_weighted_shortcuts_have_a_weight_an_input() -> None:
    plain, network = yolov4(), yolov4(weighted_shortcuts="softmax")
    for shortcut in layers_of(network, Shortcut):
        assert (shortcut.weights, shortcut.normalization) == ("per_feature", "softmax")
    assert network.parameters() == plain.parameters() + 2 * 23
    assert network.operations() > plain.operations()
    names = {name for name in network.tensors() if name.endswith(".weights")}
    assert len(names) == 23


@pytest.mark.parametrize("name", FAMILY)
def test_settings_of_the_heads(name: str) -> None:
    plain = by_name(name)
    network = by_name(name, scale_x_y=(1.3, 1.0, 2.0), iou_thresh=0.4, ignore_thresh=0.6)
    assert [head.scale_x_y for head in network.heads] == [1.3, 1.0, 2.0]
    assert {(head.iou_thresh, head.ignore_thresh) for head in network.heads} == {(0.4, 0.6)}
    restored = tuple(
        replace(ours, scale_x_y=old.scale_x_y, iou_thresh=0.213, ignore_thresh=0.7)
        for ours, old in zip(network.heads, plain.heads, strict=True)
    )
    assert restored == plain.heads
    assert {head.iou_thresh for head in by_name(name, iou_thresh=0.0).heads} == {0.0}


def test_settings_that_do_not_exist_or_do_not_fit() -> None:
    for name in NAMES:
        assert ("sam" in settings_of(name)) == (name in FAMILY)
        if name not in FAMILY:
            with pytest.raises(ValueError, match=f"{name} takes no 'sam', but num_classes"):
                by_name(name, sam=True)
    with pytest.raises(ValueError, match=r"yolov4 takes no .switches., but .*, activation, neck"):
        by_name("yolov4", switches=1)
    with pytest.raises(NetworkError, match="'gelu' is not one of linear"):
        by_name("yolov4", activation="gelu")
    with pytest.raises(NetworkError, match="weighted_shortcuts 'max' is not one of none, relu"):
        by_name("yolov4", weighted_shortcuts="max")
    for scales in ((1.0, 1.0), (1.0, 1.0, 0.0), (1.0, float("nan"), 1.0), ()):
        with pytest.raises(NetworkError, match="scale_x_y takes three positive numbers"):
            by_name("yolov4", scale_x_y=scales)


@pytest.mark.parametrize("case", SWITCHED)
def test_a_step_of_training_reaches_every_parameter(case: str) -> None:
    switches, _, _ = SWITCHED[case]
    torch.manual_seed(0)
    network = yolov4(
        num_classes=2, width=64, height=96, width_multiple=0.125, depth_multiple=0.3, **switches
    )
    module = NetworkModule(network)
    assert sum(p.numel() for p in module.parameters()) == network.parameters()
    maps = module(torch.rand(2, 3, 96, 64))
    assert [raw.shape[1:] for raw in maps] == [
        (21, 96 // head.stride, 64 // head.stride) for head in network.heads
    ]
    sum(raw.square().mean() for raw in maps).backward()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.abs().sum() > 0), name
        assert not torch.equal(parameter, before[name]) or parameter.grad.abs().max() < 1e-6, name
