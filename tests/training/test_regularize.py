"""DropBlock: what is dropped, how much of it, what becomes of the rest, and where."""

import pytest
import torch
from torch.nn.functional import max_pool2d

from training.regularize import attach_dropblock, drop_block, places
from yolov4_fast.network.architectures import NAMES, by_name
from yolov4_fast.network.layers import Conv, Network
from yolov4_fast.network.module import NetworkModule


def dropped(shape, probability, size, seed=0):
    """The mask of what is 0 of a map of ones."""
    torch.manual_seed(seed)
    return drop_block(torch.ones(shape), probability, size) == 0


@pytest.mark.parametrize(("height", "width"), [(13, 13), (8, 21), (5, 5)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_whole_blocks_are_dropped(size, height, width):
    """Every cell that is dropped lies in a square of dropped cells: the opening of the mask by the
    block is the mask itself.
    """
    mask = dropped((2, 30, height, width), 0.1, size).float()
    eroded = -max_pool2d(-mask, size, stride=1)
    opened = torch.zeros_like(mask)
    for y in range(size):
        for x in range(size):
            part = opened[:, :, y : y + eroded.shape[2], x : x + eroded.shape[3]]
            part.copy_(torch.maximum(part, eroded))
    assert 0 < mask.mean() < 0.5
    torch.testing.assert_close(opened, mask)


@pytest.mark.parametrize(("height", "width", "size"), [(26, 26, 7), (13, 20, 3), (19, 19, 1)])
def test_seeds_are_as_frequent_as_equation_1_says(height, width, size):
    """A probability so low that blocks hardly overlap: then the share that is dropped is p."""
    mask = dropped((8, 400, height, width), 0.02, size)
    assert mask.float().mean().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("probability", [0.1, 0.3])
def test_the_share_that_is_dropped_follows_the_probability(probability):
    """Less than p by what blocks overlap: of n blocks that each cover a cell with chance q, the
    expectation in the middle of the map is 1 - (1 - gamma)^(b^2).
    """
    gamma = probability / 49 * 26**2 / 20**2
    mask = dropped((8, 300, 26, 26), probability, 7)[:, :, 7:-7, 7:-7]
    assert mask.float().mean().item() == pytest.approx(1 - (1 - gamma) ** 49, rel=0.05)


def test_the_border_is_dropped_less_often_than_the_middle():
    share = dropped((8, 300, 26, 26), 0.1, 7).float().mean((0, 1))
    gamma = 0.1 / 49 * 26**2 / 20**2
    assert share[0, 0].item() == pytest.approx(gamma, rel=0.3)  # one seed reaches a corner
    assert share[13, 13] > 10 * share[0, 0]


def test_what_is_left_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(4, 50, 13, 13) + 1
    y = drop_block(x, 0.2, 3)
    kept = y != 0
    factor = kept.numel() / kept.sum()
    torch.testing.assert_close(y[kept], x[kept] * factor)
    assert y.mean().item() == pytest.approx(x.mean().item(), rel=0.01)


def test_each_channel_and_picture_is_dropped_from_for_itself():
    mask = dropped((3, 4, 13, 13), 0.5, 3).flatten(0, 1)
    assert len(mask.flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 9)])
def test_maps_smaller_than_the_block(height, width):
    """The block is as large as the map then: a map of 2 x 2 is dropped whole or not at all."""
    y = dropped((4, 200, height, width), 0.2, 7).float()
    assert y.shape == (4, 200, height, width) and 0 < y.mean() < 0.5
    if height == width:
        assert ((y.mean((2, 3)) == 0) | (y.mean((2, 3)) == 1)).all()
        assert y.mean().item() == pytest.approx(0.2, abs=0.05)


def test_a_map_that_is_dropped_whole_is_zero_and_not_nan():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = drop_block(x, 1.0, 7)
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0).all()


def test_the_gradient_passes_where_the_map_does():
    torch.manual_seed(0)
    x = torch.rand(2, 5, 13, 13, dtype=torch.float64, requires_grad=True)
    y = drop_block(x, 0.3, 3)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_type_and_layout_stay_and_the_layout_does_not_matter(dtype, layout):
    x = torch.randn(2, 8, 13, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.manual_seed(1)
    y = drop_block(x.contiguous(memory_format=layout), 0.2, 3)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    torch.manual_seed(1)
    torch.testing.assert_close(y, drop_block(x, 0.2, 3), rtol=0, atol=0)


def test_it_is_a_function_of_the_seed():
    first, again, other = (dropped((2, 8, 13, 13), 0.2, 3, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_a_probability_of_0_draws_nothing():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 5)
    state = torch.get_rng_state()
    assert drop_block(x, 0.0, 3) is x
    assert (torch.get_rng_state() == state).all()


def small() -> tuple[Network, NetworkModule]:
    network = by_name(
        "yolov4", num_classes=2, width=64, height=64, width_multiple=0.125, depth_multiple=0.1
    )
    torch.manual_seed(0)
    return network, NetworkModule(network)


def test_attached_it_acts_in_training_mode_with_a_probability_only():
    _, module = small()
    images = torch.rand(2, 3, 64, 64)
    keys = list(module.state_dict())
    plain = [raw.detach() for raw in module(images)]
    blocks = attach_dropblock(module, 3)

    def same() -> bool:
        return all((a == b).all() for a, b in zip(module(images), plain, strict=True))

    assert list(module.state_dict()) == keys
    assert blocks.probability == 0 and same()
    blocks.probability = 0.3
    assert not same()
    module.eval()
    quiet = [raw.detach() for raw in module(images)]
    assert all((a == b).all() for a, b in zip(module(images), quiet, strict=True))
    module.train()
    blocks.remove()
    assert same()


def test_attached_it_drops_from_the_outputs_of_its_places():
    _, module = small()
    blocks = attach_dropblock(module, 1)
    blocks.probability, seen = 0.5, {}
    for index in blocks.places:
        module.layers[str(index)].register_forward_hook(
            lambda _module, _inputs, output, index=index: seen.update({index: output})
        )
    module(torch.rand(2, 3, 64, 64))
    assert tuple(sorted(seen)) == blocks.places and len(seen) == 5
    assert all(0.2 < (output == 0).float().mean() < 0.8 for output in seen.values())


def test_attached_it_is_a_function_of_the_seed():
    _, module = small()
    attach_dropblock(module, 3).probability = 0.3
    images = torch.rand(2, 3, 64, 64)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(images)[0].detach())
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()


def test_places_of_yolov4():
    """The 1x1 convolutions that end the last two stages, and those before the heads' own."""
    network = by_name("yolov4")
    shapes = network.shapes()
    assert places(network) == (85, 104, 137, 148, 159)
    assert [shapes[i] for i in (85, 104)] == [(512, 38, 38), (1024, 19, 19)]
    assert [head.inputs[0] for head in network.heads] == [138, 149, 160]


def test_places_of_residual_stages_are_the_last_branches():
    network = by_name("yolov3")
    ends = places(network)[:2]
    assert all(network.layers[i].size == 3 for i in ends)
    assert all(i in network.layers[i + 1].inputs for i in ends)
    assert [network.shapes()[i][0] for i in ends] == [512, 1024]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_places_whatever_its_size(name):
    network = by_name(name, width=96, height=64)
    found = places(network)
    assert len(found) >= len(network.heads)
    assert all(isinstance(network.layers[i], Conv) for i in found)
    assert found == places(by_name(name))


def test_a_network_without_places_and_a_size_of_0_are_refused():
    backbone = Network((Conv(inputs=(-1,), filters=8),), 64, 64)
    with pytest.raises(ValueError, match="no place for DropBlock"):
        attach_dropblock(NetworkModule(backbone), 7)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        attach_dropblock(small()[1], 0)
