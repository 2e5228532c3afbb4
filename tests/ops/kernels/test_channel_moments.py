"""Moments and statistics, kernel and reference, against float64; interpreted without a GPU."""

import math

import pytest
import torch
from torch import Tensor

from yolov4_fast.ops.channel_moments import batch_statistics, join_moments, partial_moments
from yolov4_fast.ops.kernels import channel_moments as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("kernel", "reference")
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 1, 300),
    (2, 3, 5, 7),
    (1, 13, 13, 32),
    (3, 1, 4, 255),
    (2, 40, 37, 3),  # more tiles than programs
    (5, 40, 37, 24),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moments(x: Tensor) -> Tensor:
    """[3, C] in float64, by the definition."""
    rows = x.double().reshape(-1, x.shape[-1]).cpu()
    mean = rows.mean(0)
    return torch.stack(
        [mean, (rows - mean).square().sum(0), torch.full_like(mean, float(len(rows)))]
    )


def check(found: Tensor, x: Tensor, rtol: float = 2e-6) -> None:
    mean, squares, count = moments(x)
    spread = (squares / count).sqrt() + mean.abs()
    assert found.dtype == torch.float32 and found.shape == (3, x.shape[-1])
    assert ((found[0].cpu() - mean).abs() <= rtol * spread).all()
    torch.testing.assert_close(found[1].cpu().double(), squares, rtol=2 * rtol, atol=1e-10)
    assert torch.equal(found[2].cpu().double(), count)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_of_odd_shapes(shape, dtype, implementation):
    buffer = torch.full((*shape[:3], shape[3] + 12), math.nan, dtype=dtype, device=DEVICE)
    x = buffer[..., 8 : 8 + shape[3]]
    x.copy_(3 * torch.randn(shape) + torch.arange(shape[3]))
    parts = partial_moments(x, implementation=implementation)
    assert parts.shape[0] == 1 or implementation == "kernel"
    check(join_moments(parts, implementation=implementation), x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_mean_far_from_zero_costs_no_digits_of_the_spread(mean, implementation):
    """Sums of squares about zero would leave nothing of a spread of 1 here: 1e8 + 1 in float32."""
    x = (mean + torch.randn(3, 40, 37, 20)).to(DEVICE)
    found = join_moments(partial_moments(x, implementation=implementation))
    expected = moments(x)
    torch.testing.assert_close(found[1].cpu().double(), expected[1], rtol=1e-4, atol=0)
    assert (found[0].cpu() - expected[0]).abs().max() < 1.5e-7 * abs(mean)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_outlier_costs_no_digits_of_the_others(implementation):
    """Wherever it lies: a shift by the first value would make its distance everyone's."""
    for place in (0, -1, 700):
        x = torch.randn(4, 20, 20, 4, device=DEVICE)
        x.view(-1, 4)[place] = 1e4
        x.view(-1, 4)[place, 1:] = 0
        check(join_moments(partial_moments(x, implementation=implementation)), x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_constant_channel_has_no_spread(implementation):
    x = torch.full((2, 31, 17, 5), 0.1, device=DEVICE)
    mean, squares, _ = join_moments(partial_moments(x, implementation=implementation))
    assert (squares < 1e-9).all() and (mean - 0.1).abs().max() < 1e-7


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("count", [1, 2, 5, 128, 300])
def test_parts_of_any_size_are_joined(count, channels, implementation):
    values = torch.randn(2000, channels, device=DEVICE) * 5 + 100
    cuts = torch.randperm(1999)[: count - 1].add(1).sort().values.tolist()
    pieces = [
        values[a:b].view(-1, 1, 1, channels) for a, b in zip([0, *cuts], [*cuts, 2000], strict=True)
    ]
    parts = torch.stack(
        [join_moments(partial_moments(piece, implementation="reference")) for piece in pieces]
    )
    check(join_moments(parts, implementation=implementation), values.view(-1, 1, 1, channels))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_and_running_ones_are_those_of_torch(implementation):
    x = (2 + 3 * torch.randn(3, 5, 6, 19)).to(DEVICE)
    running = torch.randn(19, device=DEVICE), torch.rand(19, device=DEVICE) + 0.5
    other = running[0].clone(), running[1].clone()
    torch.nn.functional.batch_norm(
        x.permute(0, 3, 1, 2), *other, training=True, momentum=0.3, eps=1e-3
    )
    parts = partial_moments(x, implementation=implementation)
    statistics = batch_statistics(parts, 1e-3, running, 0.3, implementation=implementation)
    mean, squares, count = moments(x)
    expected = torch.stack([mean, (squares / count + 1e-3).rsqrt(), count]).float()
    torch.testing.assert_close(statistics.cpu(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_alone_move_nothing(implementation):
    x = torch.randn(2, 3, 3, 4, device=DEVICE)
    parts = partial_moments(x)
    before = parts.clone()
    statistics = batch_statistics(parts, 1e-5, implementation=implementation)
    assert torch.equal(parts, before)
    torch.testing.assert_close(statistics[1], 1 / (parts[0, 1] / 18 + 1e-5).sqrt())


def test_one_value_has_no_spread_and_a_finite_inverse():
    x = torch.full((1, 1, 1, 3), 7.0, device=DEVICE)
    for implementation in IMPLEMENTATIONS:
        running = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        statistics = batch_statistics(
            partial_moments(x, implementation=implementation),
            1e-5,
            running,
            0.5,
            implementation=implementation,
        )
        assert (statistics[0] == 7).all() and (statistics[2] == 1).all()
        torch.testing.assert_close(statistics[1], torch.full((3,), 1e5**0.5, device=DEVICE))
        assert running[0].tolist() == [3.5] * 3 and running[1].tolist() == [0.5] * 3


def test_the_same_bits_in_every_run():
    x = torch.randn(3, 40, 37, 40, device=DEVICE).half()
    first = partial_moments(x, implementation="kernel")
    assert first.shape[0] > 1
    for _ in range(2):
        assert torch.equal(partial_moments(x, implementation="kernel"), first)


def test_nan_stays_in_its_channel():
    x = torch.randn(2, 8, 8, 20, device=DEVICE)
    x[1, 3, 5, 7] = math.nan
    found = join_moments(partial_moments(x, implementation="kernel"))
    assert found[:2].isnan().any(0).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (10816, 1024), (11075584, 32), (100, 300)])
@pytest.mark.parametrize("most", [8, 528])
def test_programs_share_the_tiles_evenly(rows, channels, most):
    x = torch.empty(rows, 1, 1, channels, device="meta", dtype=torch.float16)
    block_m, block_c, parts, grid = kernel.tiling(x, 2048, most)
    blocks = math.ceil(channels / block_c)
    tiles = math.ceil(rows / block_m)
    assert block_m * block_c == 2048 and grid == parts * blocks
    assert 1 <= parts <= tiles and (grid <= most or parts == 1)
    each = math.ceil(tiles / parts)
    assert (parts - 1) * each < tiles, "a program would have none"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partial_moments(torch.zeros(2, 3)), r"x must be \[B, height, width, channels\]"),
        (lambda: partial_moments(torch.zeros(0, 1, 1, 3)), "no size 0"),
        (lambda: partial_moments(torch.zeros(1, 2, 3, 4).int()), "x must be torch.float32"),
        (
            lambda: partial_moments(
                torch.zeros(1, 2, 3, 4, device=DEVICE).double(), implementation="kernel"
            ),
            "not torch.float64",
        ),
        (lambda: partial_moments(torch.zeros(1, 4, 2, 3).permute(0, 2, 3, 1)), "channel slice"),
        (lambda: join_moments(torch.zeros(2, 4, 3)), r"moments must be \[parts, 3, C\]"),
        (lambda: join_moments(torch.zeros(0, 3, 3)), "not empty"),
        (lambda: join_moments(torch.zeros(3, 3, 3).mT), "contiguous"),
        (lambda: join_moments(torch.zeros(1, 3, 3).half()), "moments must be torch.float32"),
        (
            lambda: batch_statistics(torch.ones(1, 3, 3), 0.1, (torch.ones(3), torch.ones(4))),
            r"the running variance must be \[3\]",
        ),
        (
            lambda: batch_statistics(
                torch.ones(1, 3, 3), 0.1, (torch.ones(3).half(), torch.ones(3))
            ),
            "the running mean must be torch.float32",
        ),
        (
            lambda: partial_moments(torch.zeros(1, 2, 3, 4), implementation="fast"),
            "implementation must be one of",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
