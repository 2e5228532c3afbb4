"""`slope` and `activate_fast` against float64, in the interpreter without a GPU."""

import math

import pytest
import torch
import triton
import triton.language as tl

from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference
from yolov4_fast.ops.kernels.activation_slope import activate_fast, slope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 1024
# numpy's, in the interpreter; infinity is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@triton.jit
def both(x, out, derivative, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + index, index < count, other=0.0)
    tl.store(out + index, activate_fast(values, ACTIVATION), index < count)
    tl.store(derivative + index, slope(values, ACTIVATION), index < count)


def run(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.to(DEVICE)
    out, derivative = (torch.full_like(x, math.nan) for _ in range(2))
    grid = (triton.cdiv(x.numel(), BLOCK),)
    both[grid](x, out, derivative, x.numel(), ACTIVATION_CODES[name], BLOCK)
    return out.cpu(), derivative.cpu()


def expected(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double().requires_grad_()
    y = activate_reference(x, name)
    return y.detach().float(), torch.autograd.grad(y.sum(), x)[0].float()


@pytest.mark.parametrize("name", list(ACTIVATION_CODES))
def test_equal_to_float64(name):
    """exp z of float32 is good to |z| + 2 units in the last place; a slope near 0 is a sum of two
    terms that cancel there.
    """
    x = torch.linspace(-80, 80, 5003)
    y, derivative = run(x, name)
    wanted, slopes = expected(x, name)
    torch.testing.assert_close(y, wanted, rtol=2e-5, atol=1e-35)
    torch.testing.assert_close(derivative, slopes, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(ACTIVATION_CODES))
def test_extremes_stay_finite_and_right(name):
    powers = 10.0 ** torch.arange(-45, 39, dtype=torch.float64)
    others = torch.tensor([20, 88, 89, 103, 104, 65504, 3.3895e38, torch.finfo().max])
    values = torch.cat([torch.zeros(1), powers, others]).float()
    x = torch.cat([values[values != 0], -values[values != 0]])  # denormals too
    y, derivative = run(x, name)
    wanted, slopes = expected(x, name)  # SELU makes infinity of the largest number
    assert torch.equal(y.isfinite(), wanted.isfinite()) and derivative.isfinite().all()
    torch.testing.assert_close(y, wanted, rtol=2e-5, atol=1e-35)
    torch.testing.assert_close(derivative, slopes, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(ACTIVATION_CODES))
def test_at_a_kink_the_slope_is_that_of_torch(name):
    x = torch.tensor([0.0, 6.0])
    torch.testing.assert_close(run(x, name)[1], expected(x, name)[1], rtol=2e-5, atol=1e-6)


def test_nan_stays_nan():
    for name in ACTIVATION_CODES:
        assert run(torch.tensor([math.nan, 1.0]), name)[0].isnan().tolist() == [True, False]
