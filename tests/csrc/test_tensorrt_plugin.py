"""The plugin YoloV4Detect, asked and run as TensorRT would, its kernels on the CPU; compiled with a
stand-in for TensorRT's header.
"""

import pytest
import torch
from plugin_library import (
    attributes_of,
    expected_of,
    maps_for,
    small,
)

from yolov4_fast import ops
from yolov4_fast.engines.tensorrt.plugins import (
    OUTPUTS,
    DetectionOutputs,
    detect_node,
)
from yolov4_fast.network.architectures import yolov4, yolov4_csp, yolov4_tiny

SEEDS = (0, 1, 2)  # orders of threads and blocks: forward, backward, random


def assert_equal(actual, expected):
    for name, a, b in zip(OUTPUTS, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a, b), f"{name}: {(a != b).sum()} differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("network", "outputs"),
    [
        (small(yolov4(80)), DetectionOutputs(beta=0.6)),
        (small(yolov4_csp(33)), DetectionOutputs(beta=1.0, confidence=0.1, max_detections=7)),
        (small(yolov4_tiny(1)), DetectionOutputs(iou=0.6, max_detections=1000)),
    ],
    ids=["yolov4", "csp", "tiny"],
)
def test_finds_what_decode_and_nms_find(plugins, network, outputs, dtype):
    maps = maps_for(network, 2, dtype)
    expected = expected_of(network, maps, outputs)
    assert expected[0].min() > 3
    node = detect_node(network, outputs, [f"map_{i}" for i in range(len(maps))])
    plugin = plugins.create(attributes_of(node))
    for seed in SEEDS if dtype == torch.float32 else SEEDS[2:]:
        assert_equal(plugin.detect(maps, outputs.max_detections, seed), expected)


def test_nothing_found(plugins):
    network = small(yolov4_tiny(3))
    plugin = plugins.create(attributes_of(detect_node(network, DetectionOutputs(), "ab")))
    maps = [raw - 50 for raw in maps_for(network, 3)]
    found, boxes, scores, classes = plugin.detect(maps, 300)
    assert found.tolist() == [[0], [0], [0]]
    assert not boxes.any() and not scores.any() and (classes == -1).all()


def test_values_that_are_no_numbers(plugins):
    network = small(yolov4_tiny(3))
    outputs = DetectionOutputs(confidence=0.2)
    maps = maps_for(network, 1, objects=80)
    for raw in maps:
        values = raw.flatten()
        which = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
        for part, value in zip(
            which.chunk(16), (torch.nan, torch.inf, -torch.inf, 300.0), strict=False
        ):
            values[part[:60]] = value
    plugin = plugins.create(attributes_of(detect_node(network, outputs, "ab")))
    assert_equal(plugin.detect(maps, 300, 2), expected_of(network, maps, outputs))


def test_more_candidates_than_nms_looks_at(plugins):
    """The best of them all, whatever the order in which they were found."""
    network = small(yolov4_tiny(20), 256, 128)
    outputs = DetectionOutputs(confidence=0.0, iou=1.0, max_detections=4096)
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, head.channels, network.height // head.stride, network.width // head.stride,
                    generator=generator).mul(4).round().div(4)  # many equal scores
        for head in network.heads
    ]  # fmt: skip
    decoded = ops.decode(
        maps, [h.anchors for h in network.heads], [h.scale_x_y for h in network.heads],
        [False, False], network.height, network.width, 0.0,
    )  # fmt: skip
    assert decoded.counts > 4096
    order = decoded.scores[0].sort(descending=True, stable=True).indices[:4096]
    plugin = plugins.create(attributes_of(detect_node(network, outputs, "ab")))
    _, boxes, scores, classes = plugin.detect(maps, 4096, 2)
    assert torch.equal(scores[0], decoded.scores[0, order])
    assert torch.equal(classes[0], decoded.class_ids[0, order])
    assert torch.equal(boxes[0], decoded.boxes[0, order])


def test_a_new_size_at_run_time(plugins):
    """The input's size follows from the maps'."""
    network, larger = small(yolov4_tiny(3)), small(yolov4_tiny(3), 160, 128)
    plugin = plugins.create(attributes_of(detect_node(network, DetectionOutputs(), "ab")))
    maps = maps_for(larger, 1)
    assert_equal(plugin.detect(maps, 300), expected_of(larger, maps, DetectionOutputs()))


def test_clones_and_what_was_serialized_find_the_same(plugins):
    network = small(yolov4(5))
    outputs = DetectionOutputs(beta=0.6, max_detections=20)
    maps = maps_for(network, 1)
    expected = expected_of(network, maps, outputs)
    plugin = plugins.create(attributes_of(detect_node(network, outputs, "abc")))
    others = [plugin.clone(), plugin.attach()]
    others.append(others[0].clone())
    others.append(plugin.reload().reload())  # the first is gone from here on
    for other in others:
        assert_equal(other.detect(maps, 20), expected)
        other.destroy()
