"""ONNX export: every layer kind and activation equals the torch module in ONNX Runtime, at any
batch size.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from yolov4_fast.engines.onnx_export import export_onnx, output_names
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    IMAGE,
    SHORTCUT_NORMALIZATIONS,
    Conv,
    Head,
    MaxPool,
    Network,
    Route,
    Sam,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import ConvBlock, NetworkModule


def random_module(network: Network) -> NetworkModule:
    """A module whose normalisation statistics, slopes and weights of shortcuts are not those that
    it begins with.
    """
    torch.manual_seed(0)
    module = NetworkModule(network).eval()
    for name, parameter in module.named_parameters():
        if name.endswith((".slope", ".weights")):
            torch.nn.init.uniform_(parameter, -0.5, 1.5)
    for block in module.layers.values():
        if isinstance(block, ConvBlock) and block.bn is not None:
            for values in (block.bn.weight, block.bn.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
            for values in (block.bn.bias, block.bn.running_mean):
                torch.nn.init.normal_(values, std=0.2)
    return module


def assert_equal_in_onnxruntime(network: Network) -> None:
    module = random_module(network)
    model = export_onnx(network, module.state_dict())
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert [output.name for output in session.get_outputs()] == list(output_names(network))
    for batch in (1, 3):
        images = torch.rand(batch, network.channels, network.height, network.width)
        with torch.inference_mode():
            expected = module(images)
        maps = session.run(None, {"images": images.numpy()})
        assert len(maps) == len(expected)
        for ours, theirs in zip(maps, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


def backbone(*layers: object, size: tuple[int, int] = (24, 16)) -> Network:
    return Network(layers, width=size[0], height=size[1])


def test_mini(mini) -> None:
    assert_equal_in_onnxruntime(mini.network)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_normalize", [True, False])
def test_convolution(activation: str, batch_normalize: bool) -> None:
    conv = Conv(
        inputs=(IMAGE,), filters=6, size=3, stride=2, groups=3,
        activation=activation, batch_normalize=batch_normalize,
    )  # fmt: skip
    assert_equal_in_onnxruntime(backbone(conv))


def test_convolution_without_padding() -> None:
    assert_equal_in_onnxruntime(backbone(Conv(inputs=(IMAGE,), filters=4, size=3, padding=0)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [2, 3])
def test_shortcut(activation: str, count: int) -> None:
    convs = [Conv(inputs=(IMAGE,), filters=4) for _ in range(count)]
    shortcut = Shortcut(inputs=tuple(range(count)), activation=activation)
    assert_equal_in_onnxruntime(backbone(*convs, shortcut))


@pytest.mark.parametrize("activation", ["linear", "mish", "prelu"])
@pytest.mark.parametrize("normalization", SHORTCUT_NORMALIZATIONS)
@pytest.mark.parametrize("weights", ["per_feature", "per_channel"])
def test_weighted_shortcut(weights: str, normalization: str, activation: str) -> None:
    convs = [Conv(inputs=(IMAGE,), filters=4) for _ in range(3)]
    shortcut = Shortcut(
        inputs=(2, 0, 1), activation=activation, weights=weights, normalization=normalization
    )
    assert_equal_in_onnxruntime(backbone(*convs, shortcut))


@pytest.mark.parametrize(
    ("activation", "kinds"),
    [
        ("relu6", ["Clip"]),
        ("selu", ["Selu"]),
        ("hard_swish", ["HardSigmoid", "Mul"]),  # TensorRT has no HardSwish in bfloat16
        ("prelu", ["PRelu"]),
        ("mish", ["Softplus", "Tanh", "Mul"]),
    ],
)
def test_activations_are_operators_of_onnx(activation: str, kinds: list[str]) -> None:
    network = backbone(Conv(inputs=(IMAGE,), filters=4, activation=activation))
    model = export_onnx(network, NetworkModule(network).state_dict())
    assert [node.op_type for node in model.graph.node] == ["Conv", *kinds]
    assert model.graph.node[-1].name == "layer_0"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("input_size", [(8, 6), (9, 7)])
def test_max_pool_pads_as_darknet(size: int, stride: int, input_size: tuple[int, int]) -> None:
    assert_equal_in_onnxruntime(
        backbone(MaxPool(inputs=(IMAGE,), size=size, stride=stride), size=input_size)
    )


@pytest.mark.parametrize("inputs", [(0,), (0, 1)])
@pytest.mark.parametrize(("groups", "group"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_route(inputs: tuple[int, ...], groups: int, group: int) -> None:
    convs = [Conv(inputs=(IMAGE,), filters=filters) for filters in (8, 4)]
    assert_equal_in_onnxruntime(backbone(*convs, Route(inputs=inputs, groups=groups, group=group)))


@pytest.mark.parametrize("stride", [2, 3])
def test_upsample(stride: int) -> None:
    assert_equal_in_onnxruntime(
        backbone(Conv(inputs=(IMAGE,), filters=4), Upsample(inputs=(0,), stride=stride))
    )


def test_sam() -> None:
    convs = [
        Conv(inputs=(IMAGE,), filters=4, activation=activation)
        for activation in ("leaky", "logistic")
    ]
    assert_equal_in_onnxruntime(backbone(*convs, Sam(inputs=(0, 1))))


def test_two_heads_of_one_stride_may_read_one_map() -> None:
    conv = Conv(inputs=(IMAGE,), filters=7, size=3, stride=2, batch_normalize=False)
    head = Head(inputs=(0,), all_anchors=((4.0, 5.0),), mask=(0,), num_classes=2, stride=2)
    network = backbone(conv, head, head)
    assert output_names(network) == ("map_2", "map_2_1")
    model = export_onnx(network, random_module(network).state_dict())
    assert [node.op_type for node in model.graph.node] == ["Conv", "Identity", "Identity"]
    assert_equal_in_onnxruntime(network)


def test_names_are_stable_and_batch_is_dynamic(mini) -> None:
    model = export_onnx(mini.network, mini.state)
    assert model.SerializeToString() == export_onnx(mini.network, mini.state).SerializeToString()
    (images,) = model.graph.input
    assert images.name == "images"
    dimensions = images.type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dimensions] == ["N", 3, 128, 160]
    assert [output.name for output in model.graph.output] == ["map_16", "map_8"]


def test_writes_the_file(mini, tmp_path) -> None:
    model = export_onnx(mini.network, mini.state, tmp_path / "mini.onnx")
    assert onnx.load(tmp_path / "mini.onnx") == model
    assert [path.name for path in tmp_path.iterdir()] == ["mini.onnx"]


def test_input_size_is_the_networks(mini) -> None:
    assert_equal_in_onnxruntime(mini.network.resized(96, 64))
