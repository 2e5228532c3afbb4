"""NetworkModule against plain numpy: every kind of layer, by Darknet's definition of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from yolov4_fast.darknet.cfg import parse_cfg
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    IMAGE,
    SHORTCUT_NORMALIZATIONS,
    Conv,
    Head,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import (
    BN_EPS,
    NetworkModule,
    activate,
    coefficients,
    max_pool,
)

SCALARS = {
    "linear": lambda x: x,
    "leaky": lambda x: x if x > 0 else 0.1 * x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "logistic": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "hard_swish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
}


def activated(x: np.ndarray, name: str, slope: np.ndarray | None = None) -> np.ndarray:
    """x: [C, H, W] where a slope [C] is given, which is for prelu."""
    if name == "prelu":
        assert slope is not None
        return np.where(x > 0, x, slope[:, None, None] * x)
    return np.vectorize(SCALARS[name], otypes=[np.float64])(x)


def normalised(weights: np.ndarray, normalization: str) -> np.ndarray:
    """Darknet's loop over the inputs, for each channel."""
    table = weights.reshape(len(weights), -1)
    out = table.copy()
    for channel in range(table.shape[1]):
        column = table[:, channel]
        if normalization == "relu":
            positive = [max(w, 0.0) for w in column]
        elif normalization == "softmax":
            positive = [math.exp(w - max(column)) for w in column]
        else:
            continue
        out[:, channel] = [value / (0.0001 + sum(positive)) for value in positive]
    return out


def convolved(x: np.ndarray, weight: np.ndarray, stride: int, pad: int, groups: int) -> np.ndarray:
    """x: [C, H, W], weight: [F, C / groups, k, k]."""
    filters, depth, size, _ = weight.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    rows = (padded.shape[1] - size) // stride + 1
    columns = (padded.shape[2] - size) // stride + 1
    out = np.zeros((filters, rows, columns))
    for f in range(filters):
        first = f // (filters // groups) * depth
        for i in range(rows):
            for j in range(columns):
                window = padded[first : first + depth, i * stride :, j * stride :]
                out[f, i, j] = (window[:, :size, :size] * weight[f]).sum()
    return out


def pooled(x: np.ndarray, size: int, stride: int, padding: int) -> np.ndarray:
    """Darknet's loop: windows begin at -padding / 2, and cells outside the map do not count."""
    channels, height, width = x.shape
    rows, columns = (height + padding - size) // stride + 1, (width + padding - size) // stride + 1
    out = np.full((channels, rows, columns), -np.inf)
    for i in range(rows):
        for j in range(columns):
            for n in range(size):
                for m in range(size):
                    row, column = i * stride + n - padding // 2, j * stride + m - padding // 2
                    if 0 <= row < height and 0 <= column < width:
                        out[:, i, j] = np.maximum(out[:, i, j], x[:, row, column])
    return out


def randomised(network: Network) -> NetworkModule:
    generator = torch.Generator().manual_seed(0)
    module = NetworkModule(network).eval()
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(values.abs() + 0.5 if "running_var" in name else values)
    return module


@pytest.mark.parametrize("name", SCALARS)
def test_activations(name: str) -> None:
    x = torch.linspace(-12, 12, 241)
    expected = activated(x.double().numpy(), name)
    np.testing.assert_allclose(activate(x, name).numpy(), expected, rtol=2e-6, atol=1e-7)


def test_prelu_has_a_slope_for_each_channel() -> None:
    assert set(SCALARS) | {"prelu"} == set(ACTIVATIONS)
    x = torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.0, -2.0]])[None]  # [B, C, L]
    slope = torch.tensor([0.25, -1.0, 2.0])
    assert activate(x, "prelu", slope)[0].tolist() == [[1.0, -0.25], [1.0, 1.0], [0.0, -4.0]]
    assert activate(x.half(), "prelu", slope).dtype == torch.float16
    with pytest.raises(ValueError, match="prelu takes a slope"):
        activate(x, "prelu")


def test_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'gelu'"):
        activate(torch.zeros(1), "gelu")
    with pytest.raises(NetworkError, match="'gelu' is not one of"):
        Conv(inputs=(IMAGE,), filters=1, activation="gelu")


@pytest.mark.parametrize("batch_normalize", [True, False])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"),
    [(1, 1, None, 1), (3, 1, None, 1), (3, 2, None, 2), (5, 2, 0, 1), (2, 1, 1, 2), (1, 2, 2, 4)],
)
def test_convolution(
    size: int, stride: int, padding: int | None, groups: int, batch_normalize: bool
) -> None:
    spec = Conv(
        inputs=(IMAGE,),
        filters=4,
        size=size,
        stride=stride,
        padding=padding,
        groups=groups,
        batch_normalize=batch_normalize,
        activation="mish",
    )
    network = Network((spec,), width=7, height=6, channels=4)
    module = randomised(network)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    image = torch.randn(1, 4, 6, 7)
    out = convolved(
        image[0].double().numpy(), state["layers.0.conv.weight"], stride, spec.pad, groups
    )
    if batch_normalize:
        gamma, beta, mean, variance = (
            state[f"layers.0.bn.{key}"][:, None, None]
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        out = (out - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    else:
        out = out + state["layers.0.conv.bias"][:, None, None]
    with torch.inference_mode():
        (ours,) = module(image)
    assert tuple(ours.shape[1:]) == network.shapes()[0]
    np.testing.assert_allclose(ours[0].numpy(), activated(out, "mish"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [(6, 6), (7, 7), (6, 9), (5, 4), (1, 1)])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (2, 2, None),  # pads nothing on even sides, one cell after on odd ones
        (2, 1, None),  # YOLOv3-tiny's
        (5, 1, None),
        (9, 1, None),  # SPP
        (13, 1, None),
        (3, 2, None),
        (3, 2, 0),
        (3, 3, 1),
        (4, 2, 3),
        (1, 1, None),
    ],
)
def test_max_pooling_pads_as_darknet_does(
    size: int, stride: int, padding: int | None, side: tuple[int, int]
) -> None:
    layer = MaxPool(inputs=(IMAGE,), size=size, stride=stride, padding=padding)
    x = torch.randn(1, 3, *side) - 5  # below zero: zeros of padding would win
    expected = pooled(x[0].numpy(), size, stride, layer.pad)
    if min(expected.shape) < 1:
        with pytest.raises(NetworkError, match="its output would be"):
            Network((layer,), side[1], side[0])
        return
    ours = max_pool(x, layer)
    assert tuple(ours.shape[1:]) == layer.output_shape((3, *side))
    np.testing.assert_array_equal(ours[0].numpy(), expected)


def run(layers: tuple, image: torch.Tensor) -> torch.Tensor:
    network = Network(layers, image.shape[3], image.shape[2], image.shape[1])
    with torch.inference_mode():
        (out,) = NetworkModule(network).eval()(image)
    assert tuple(out.shape[1:]) == network.shapes()[-1]
    return out


def test_upsampling_repeats_cells() -> None:
    image = torch.arange(12.0).reshape(1, 2, 2, 3)
    out = run((Upsample(inputs=(IMAGE,), stride=3),), image)
    assert torch.equal(out[0], torch.from_numpy(image[0].numpy().repeat(3, 1).repeat(3, 2)))


def test_routes_join_in_the_order_of_their_inputs() -> None:
    image = torch.randn(1, 4, 2, 3)
    up = Upsample(inputs=(IMAGE,), stride=1)
    pool = MaxPool(inputs=(IMAGE,), size=2)
    out = run((up, pool, Route(inputs=(1, IMAGE, 0))), image)
    assert torch.equal(out, torch.cat((max_pool(image, pool), image, image), 1))


@pytest.mark.parametrize("group", [0, 1, 2])
def test_grouped_routes_take_a_part_of_each_input(group: int) -> None:
    image = torch.arange(6.0).reshape(1, 6, 1, 1)
    double = Shortcut(inputs=(IMAGE, IMAGE))
    out = run((double, Route(inputs=(0, IMAGE), groups=3, group=group)), image)
    first = 2.0 * group
    assert out.flatten().tolist() == [2 * first, 2 * (first + 1), first, first + 1]


def test_shortcuts_add_all_their_inputs_and_then_activate() -> None:
    image = torch.randn(1, 3, 2, 2)
    up = Upsample(inputs=(IMAGE,), stride=1)
    out = run((up, Shortcut(inputs=(0, IMAGE, 0), activation="leaky")), image)
    torch.testing.assert_close(out, torch.nn.functional.leaky_relu(3 * image, 0.1))


def test_sam_multiplies() -> None:
    image = torch.randn(1, 3, 2, 2)
    double = Shortcut(inputs=(IMAGE, IMAGE))
    assert torch.equal(run((double, Sam(inputs=(0, IMAGE))), image), 2 * image * image)


@pytest.mark.parametrize("normalization", SHORTCUT_NORMALIZATIONS)
@pytest.mark.parametrize("weights", ["per_feature", "per_channel"])
@pytest.mark.parametrize("count", [2, 3])
def test_weighted_shortcuts_against_numpy(count: int, weights: str, normalization: str) -> None:
    convs = [Conv(inputs=(IMAGE,), filters=5, activation="prelu") for _ in range(count)]
    shortcut = Shortcut(
        inputs=tuple(range(count)), activation="prelu", weights=weights, normalization=normalization
    )
    network = Network((*convs, shortcut), 4, 3)
    module = randomised(network)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    assert state[f"layers.{count}.weights"].shape == (
        (count,) if weights == "per_feature" else (count, 5)
    )
    image = torch.randn(2, 3, 3, 4)
    with torch.inference_mode():
        (ours,) = module(image)
    for sample in range(2):
        outputs: list[np.ndarray] = []
        by_hand(network, state, image[sample].double().numpy(), outputs)
        np.testing.assert_allclose(ours[sample].numpy(), outputs[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", SHORTCUT_NORMALIZATIONS)
def test_coefficients_by_hand(normalization: str) -> None:
    """Inputs of weights 1 and 3; then -1 and 2, of which relu leaves the second alone."""
    found = coefficients(torch.tensor([[1.0, -1.0], [3.0, 2.0]]), normalization)
    e2, e3 = math.exp(-2), math.exp(-3)
    expected = {
        "none": [[1.0, -1.0], [3.0, 2.0]],
        "relu": [[1 / 4.0001, 0], [3 / 4.0001, 2 / 2.0001]],
        "softmax": [
            [e2 / (1.0001 + e2), e3 / (1.0001 + e3)],
            [1 / (1.0001 + e2), 1 / (1.0001 + e3)],
        ],
    }[normalization]
    torch.testing.assert_close(found, torch.tensor(expected))
    huge = coefficients(torch.tensor([200.0, 100.0]), normalization)
    assert huge.isfinite().all()


@pytest.mark.parametrize("normalization", SHORTCUT_NORMALIZATIONS)
@pytest.mark.parametrize("weights", ["per_feature", "per_channel"])
def test_gradients_reach_weights_and_slopes(weights: str, normalization: str) -> None:
    network = Network(
        (
            Conv(inputs=(IMAGE,), filters=4, activation="prelu"),
            Conv(inputs=(0,), filters=4, activation="mish"),
            Shortcut(
                inputs=(1, 0), activation="prelu", weights=weights, normalization=normalization
            ),
        ),
        6,
        5,
    )
    torch.manual_seed(0)
    module = NetworkModule(network).double()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes["layers.2.weights"] == ((2,) if weights == "per_feature" else (2, 4))
    assert shapes["layers.0.slope"] == shapes["layers.2.slope"] == (4,)
    assert module.state_dict()["layers.0.slope"].tolist() == [0.25] * 4
    assert module.state_dict()["layers.2.weights"].eq(1).all()
    image = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    factors = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for name in ("layers.2.weights", "layers.0.slope", "layers.2.slope"):
        parameter = module.get_parameter(name)
        with torch.no_grad():
            parameter += 0.3 * torch.rand_like(parameter)  # no ties, where max has no derivative
        (gradient,) = torch.autograd.grad((module(image)[0] * factors).sum(), parameter)
        flat, step = parameter.data.view(-1), 1e-6
        for position in range(flat.numel()):
            sums = []
            for sign in (1, -1):
                flat[position] += sign * step
                with torch.no_grad():
                    sums.append(float((module(image)[0] * factors).sum()))
                flat[position] -= sign * step
            slope = (sums[0] - sums[1]) / (2 * step)
            assert float(gradient.flatten()[position]) == pytest.approx(slope, rel=1e-5, abs=1e-6)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_stays_so_under_autocast(activation: str) -> None:
    """Neither weights nor slopes, which are float32, make the maps float32."""
    network = Network(
        (
            Conv(inputs=(IMAGE,), filters=4, activation=activation),
            Conv(inputs=(0,), filters=4, activation=activation),
            Shortcut(inputs=(1, 0), weights="per_channel", normalization="softmax"),
            Shortcut(inputs=(2, 1), weights="per_feature", activation=activation),
        ),
        6,
        5,
    )
    module = NetworkModule(network).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        (out,) = module(torch.rand(1, 3, 5, 6))
    assert out.dtype == torch.bfloat16


def test_shortcuts_without_parameters_have_no_module() -> None:
    network = Network((Conv(inputs=(IMAGE,), filters=4), Shortcut(inputs=(0, 0))), 6, 5)
    assert set(NetworkModule(network).layers) == {"0"}


def test_weights_of_shortcuts_that_do_not_exist() -> None:
    with pytest.raises(NetworkError, match="weights 'both' is not one of none, per_feature"):
        Shortcut(inputs=(0, 1), weights="both")
    with pytest.raises(NetworkError, match="normalization 'max' is not one of none, relu"):
        Shortcut(inputs=(0, 1), weights="per_feature", normalization="max")
    with pytest.raises(NetworkError, match="softmax has nothing to normalise"):
        Shortcut(inputs=(0, 1), normalization="softmax")
    with pytest.raises(ValueError, match="unknown normalization 'max'"):
        coefficients(torch.ones(2), "max")


def test_a_network_of_every_layer_against_numpy() -> None:
    network = parse_cfg(
        "[net]\nwidth=8\nheight=6\nchannels=3\n"
        "[convolutional]\nbatch_normalize=1\nfilters=4\nsize=3\npad=1\nactivation=mish\n"
        "[convolutional]\nbatch_normalize=1\nfilters=4\ngroups=2\nactivation=leaky\n"
        "[shortcut]\nfrom=-2\n"
        "[convolutional]\nfilters=4\nactivation=logistic\n"
        "[sam]\nfrom=2\n"
        "[maxpool]\nsize=2\nstride=2\n"
        "[upsample]\n"
        "[route]\nlayers=-1,2\ngroups=2\ngroup_id=1\n"
        "[convolutional]\nfilters=8\nactivation=linear\n"
        "[yolo]\nanchors=1,2\nclasses=3\n"
        "[route]\nlayers=5\n"
        "[convolutional]\nfilters=16\nactivation=linear\n"
        "[yolo]\nanchors=1,2, 3,4\nnum=2\nclasses=3\n"
    )
    module = randomised(network)
    state = {key: value.double().numpy() for key, value in module.state_dict().items()}
    image = torch.randn(2, 3, 6, 8)
    with torch.inference_mode():
        maps = module(image)
    assert len(maps) == 2
    for sample in range(2):
        outputs: list[np.ndarray] = []
        fine, coarse = by_hand(network, state, image[sample].double().numpy(), outputs)
        np.testing.assert_allclose(maps[0][sample].numpy(), fine, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(maps[1][sample].numpy(), coarse, rtol=1e-4, atol=1e-4)


def by_hand(
    network: Network, state: dict[str, np.ndarray], image: np.ndarray, outputs: list[np.ndarray]
) -> list[np.ndarray]:
    """Keeps every output, unlike NetworkModule; returns the maps."""
    maps = []
    for index, layer in enumerate(network.layers):
        x = [image if source == IMAGE else outputs[source] for source in layer.inputs]
        match layer:
            case Conv():
                key = f"layers.{index}"
                out = convolved(
                    x[0], state[f"{key}.conv.weight"], layer.stride, layer.pad, layer.groups
                )
                if layer.batch_normalize:
                    scale = state[f"{key}.bn.weight"] / np.sqrt(
                        state[f"{key}.bn.running_var"] + BN_EPS
                    )
                    mean = state[f"{key}.bn.running_mean"][:, None, None]
                    out = (out - mean) * scale[:, None, None]
                    out += state[f"{key}.bn.bias"][:, None, None]
                else:
                    out += state[f"{key}.conv.bias"][:, None, None]
                out = activated(out, layer.activation, state.get(f"{key}.slope"))
            case Shortcut():
                weights = state.get(f"layers.{index}.weights")
                if weights is not None:
                    factors = normalised(weights, layer.normalization)
                    x = [a * f.reshape(-1, 1, 1) for a, f in zip(x, factors, strict=True)]
                slope = state.get(f"layers.{index}.slope")
                out = activated(sum(x[1:], x[0]), layer.activation, slope)
            case Sam():
                out = x[0] * x[1]
            case MaxPool():
                out = pooled(x[0], layer.size, layer.stride, layer.pad)
            case Upsample():
                out = x[0].repeat(layer.stride, 1).repeat(layer.stride, 2)
            case Route():
                parts = [len(a) // layer.groups for a in x]
                out = np.concatenate(
                    [
                        a[layer.group * n : (layer.group + 1) * n]
                        for a, n in zip(x, parts, strict=True)
                    ]
                )
            case Head():
                out = x[0]
                maps.append(out)
            case _:
                raise AssertionError(layer)
        outputs.append(out)
    return maps


def test_other_input_sizes_and_channels_last() -> None:
    network = parse_cfg(
        "[net]\nwidth=32\nheight=32\nchannels=3\n"
        "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\nstride=2\npad=1\nactivation=mish\n"
        "[convolutional]\nfilters=8\nactivation=linear\n[yolo]\nanchors=1,2\nclasses=3\n"
    )
    module = randomised(network)
    image = torch.rand(1, 3, 48, 16)
    with torch.inference_mode():
        (plain,) = module(image)
        (last,) = module.to(memory_format=torch.channels_last)(
            image.to(memory_format=torch.channels_last)
        )
    assert plain.shape == (1, 8, 24, 8)
    torch.testing.assert_close(plain, last)


def test_a_fresh_network_finds_nothing() -> None:
    network = parse_cfg(
        "[net]\nwidth=32\nheight=32\nchannels=3\n"
        "[convolutional]\nfilters=16\nactivation=linear\n"
        "[yolo]\nanchors=1,2, 3,4\nnum=2\nclasses=3\n"
    )
    with torch.inference_mode():
        (raw,) = NetworkModule(network).eval()(torch.rand(1, 3, 32, 32))
    objectness = raw.unflatten(1, (2, 8))[:, :, 4].sigmoid()
    assert 0.005 < objectness.min() and objectness.max() < 0.02


def test_a_layer_cannot_read_a_head() -> None:
    conv = Conv(inputs=(IMAGE,), filters=8, batch_normalize=False)
    head = Head(inputs=(0,), all_anchors=((1, 2),), mask=(0,), num_classes=3, stride=1)
    with pytest.raises(NetworkError, match=r"layer 2 \(upsample\): it reads layer 1, a head"):
        Network((conv, head, Upsample(inputs=(1,))), 8, 8)
