"""The architectures: counts that Darknet itself reports, and what can be varied."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from yolov4_fast.network.architectures import ARCHITECTURES, NAMES, by_name, yolov4
from yolov4_fast.network.layers import Conv, Network, NetworkError, Route, Shortcut
from yolov4_fast.network.module import NetworkModule

# name: layers, convolutions, trainable parameters, input, Gops at that input (as Darknet counts)
COUNTS = {
    "yolov4": (162, 110, 64_363_101, 608, 128.46),
    "yolov4-tiny": (38, 21, 6_056_606, 416, 6.91),
    "yolov4-tiny-3l": (45, 24, 6_327_453, 608, 17.74),
    "yolov4-csp": (175, 115, 52_921_437, 512, 77.00),
    "yolov4x-mish": (203, 137, 99_751_053, 640, 221.99),
    "yolov3": (107, 75, 61_949_149, 416, 65.88),
    "yolov3-spp": (114, 76, 62_998_749, 608, 141.53),
    "yolov3-tiny": (24, 13, 8_852_366, 416, 5.57),
}
# Sizes in bytes of the published files, all with a header of 20 bytes.
FILES = {
    "yolov4": 257_717_640,
    "yolov4-tiny": 24_251_276,
    "yolov3": 248_007_048,
    "yolov3-spp": 252_209_544,
    "yolov3-tiny": 35_434_956,
}


def normalised_channels(network: Network) -> int:
    return sum(conv.filters for _, conv in network.convolutions() if conv.batch_normalize)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_darknets(name: str) -> None:
    layers, convolutions, parameters, size, operations = COUNTS[name]
    network = by_name(name)
    assert (network.width, network.height, network.num_classes) == (size, size, 80)
    assert len(network.layers) == layers
    assert len(list(network.convolutions())) == convolutions
    assert network.parameters() == parameters
    assert network.operations() / 1e9 == pytest.approx(operations, abs=0.005)


@pytest.mark.parametrize("name", FILES)
def test_weights_files_are_as_long_as_the_published_ones(name: str) -> None:
    network = by_name(name)
    floats = network.parameters() + 2 * normalised_channels(network)
    assert 20 + 4 * floats == FILES[name]


def test_yolov4_in_detail() -> None:
    network = yolov4(width=416, height=416)
    assert network.operations() / 1e9 == pytest.approx(60.1, abs=0.05)
    assert normalised_channels(network) == 33_152
    activations = Counter(conv.activation for _, conv in network.convolutions())
    assert activations == {"mish": 72, "leaky": 35, "linear": 3}
    inputs = network.input_shapes()
    shapes = {(conv, inputs[index]) for index, conv in network.convolutions()}
    kinds = {(c.filters, c.size, c.stride, shape) for c, shape in shapes}
    assert len(kinds) == 37
    shapes_out = network.shapes()
    boxes = [
        len(head.mask) * shapes_out[head.inputs[0]][1] * shapes_out[head.inputs[0]][2]
        for head in network.heads
    ]
    assert sum(boxes) == 10_647
    assert [(head.stride, head.scale_x_y) for head in network.heads] == [
        (8, 1.2),
        (16, 1.1),
        (32, 1.05),
    ]
    assert network.heads[0].anchors == ((12, 16), (19, 36), (40, 28))
    assert network.nms_beta == 0.6


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_module(name: str) -> None:
    network = by_name(name, width=32, height=32)
    with torch.device("meta"):
        module = NetworkModule(network)
    assert sum(p.numel() for p in module.parameters()) == network.parameters()


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_computes_maps_of_its_shapes(name: str) -> None:
    settings = {} if name == "yolov4-nano" else {"width_multiple": 0.125}
    network = by_name(name, num_classes=7, width=96, height=64, **settings)
    with torch.inference_mode():
        maps = NetworkModule(network).eval()(torch.rand(2, 3, 64, 96))
    assert [tuple(raw.shape) for raw in maps] == [
        (2, 36, 64 // head.stride, 96 // head.stride) for head in network.heads
    ]
    assert {head.num_classes for head in network.heads} == {7}


@pytest.mark.parametrize("name", NAMES)
def test_every_anchor_of_a_head_exists_once(name: str) -> None:
    masks = [index for head in by_name(name).heads for index in head.mask]
    if name == "yolov4-tiny":  # as it was trained: anchor 3 at both strides, anchor 0 at none
        assert masks == [3, 4, 5, 1, 2, 3]
    else:
        assert sorted(masks) == list(range(len(by_name(name).heads[0].all_anchors)))


@pytest.mark.parametrize("name", ["yolov4-csp", "yolov4x-mish"])
def test_scaled_heads_read_logistic_convolutions(name: str) -> None:
    network = by_name(name)
    assert network.letter_box and network.nms_beta == 0.6
    for head in network.heads:
        conv = network.layers[head.inputs[0]]
        assert isinstance(conv, Conv) and conv.activation == "logistic"
        assert head.new_coords and head.scale_x_y == 2.0 and head.nms_kind == "diounms"


def test_yolov3_is_suppressed_by_plain_iou() -> None:
    assert by_name("yolov3").nms_beta is None
    assert {head.scale_x_y for head in by_name("yolov3").heads} == {1.0}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "yolov4-nano"])
def test_width_scales_every_convolution_but_the_heads(name: str) -> None:
    full, half = by_name(name), by_name(name, width_multiple=0.5)
    heads = {head.inputs[0] for head in full.heads}
    for (index, wide), (_, narrow) in zip(full.convolutions(), half.convolutions(), strict=True):
        if index in heads:
            assert wide.filters == narrow.filters
        else:
            assert abs(narrow.filters - max(8, wide.filters / 2)) <= 4 and narrow.filters % 8 == 0


@pytest.mark.parametrize("name", ["yolov4", "yolov4-csp", "yolov4x-mish", "yolov3", "yolov3-spp"])
def test_depth_scales_the_residual_blocks(name: str) -> None:
    full, shallow = by_name(name), by_name(name, depth_multiple=0.34)
    counts = [
        sum(isinstance(layer, Shortcut) for layer in network.layers) for network in (full, shallow)
    ]
    assert counts == [23, 9] if name != "yolov4x-mish" else counts == [29, 10]
    assert [head.stride for head in full.heads] == [head.stride for head in shallow.heads]


def test_nano_is_yolov4_at_a_quarter_of_the_width() -> None:
    assert by_name("yolov4-nano") == yolov4(width=416, height=416, width_multiple=0.25)
    assert 4e6 < by_name("yolov4-nano").parameters() < 4.2e6


class TestSeeds:
    """The two re-implementations, against yolov4."""

    def test_the_leaky_one_differs_in_its_heads_only(self) -> None:
        network = by_name("yolov4-seed-leaky")
        reference = yolov4(num_classes=20, width=416, height=416)
        heads = [index for index, layer in enumerate(network.layers) if layer.name == "yolo"]
        for index, (ours, theirs) in enumerate(zip(network.layers, reference.layers, strict=True)):
            assert (ours == theirs) == (index not in heads)
        assert {head.scale_x_y for head in network.heads} == {1.0}
        assert network.nms_beta == 1.0
        assert network.heads[0].anchors[0] == pytest.approx((0.02 * 416, 0.03 * 416))
        wide = by_name("yolov4-seed-leaky", width=608, height=416)
        assert wide.heads[2].anchors[2] == pytest.approx((0.9 * 608, 0.78 * 416))

    def test_the_mish_one_has_its_own_pooling(self) -> None:
        network = by_name("yolov4-seed-mish")
        assert {conv.activation for _, conv in network.convolutions()} == {"mish", "linear"}
        wide = [index for index, conv in network.convolutions() if conv.filters == 2048]
        assert len(wide) == 1
        assert network.input_shapes()[wide[0]][0][0] == 2048
        pooled = network.layers[wide[0] - 1]
        assert isinstance(pooled, Route)
        assert list(pooled.inputs) == sorted(pooled.inputs)  # the map itself first, then 5, 9, 13
        assert network.parameters() == 63_315_549
        assert network.nms_beta == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_other_anchors(name: str) -> None:
    count = len(by_name(name).heads[0].all_anchors)
    anchors = tuple((float(i + 1), 2.0 * i + 1) for i in range(count))
    assert {head.all_anchors for head in by_name(name, anchors=anchors).heads} == {anchors}
    with pytest.raises(NetworkError, match=f"takes {count} anchors, not {count - 1}"):
        by_name(name, anchors=anchors[1:])


@pytest.mark.parametrize(("width", "height"), [(600, 608), (608, 0), (31, 32), (-32, 32)])
def test_sizes_that_do_not_fit(width: int, height: int) -> None:
    with pytest.raises(NetworkError, match=f"{width}x{height} does not fit: .* multiples of 32"):
        by_name("yolov4", width=width, height=height)


def test_names_and_settings_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="'yolov5'; there are yolov4, yolov4-tiny"):
        by_name("yolov5")
    with pytest.raises(ValueError, match="yolov4-tiny takes no 'depth_multiple', but num_classes"):
        by_name("yolov4-tiny", depth_multiple=0.5)
    with pytest.raises(NetworkError, match="0 classes"):
        by_name("yolov4", num_classes=0)
    for setting in ("width_multiple", "depth_multiple"):
        for value in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(NetworkError, match=f"a {setting} of {value} is not positive"):
                by_name("yolov4", **{setting: value})
    assert tuple(ARCHITECTURES) == NAMES
