"""`activate` against its definition, in the interpreter without a GPU."""

import math

import pytest
import torch
import triton
import triton.language as tl

from yolov4_fast.network.layers import ACTIVATIONS
from yolov4_fast.network.module import activate as activate_in_network
from yolov4_fast.ops.activation import ACTIVATION_CODES, activate_reference, activation_code
from yolov4_fast.ops.kernels.activation import activate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 1024


@triton.jit
def activate_all(x, out, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + index, index < count, other=0.0)
    tl.store(out + index, activate(values, ACTIVATION), index < count)


def run(x: torch.Tensor, name: str) -> torch.Tensor:
    x = x.to(DEVICE)
    out = torch.full_like(x, math.nan)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    activate_all[grid](x, out, x.numel(), ACTIVATION_CODES[name], BLOCK)
    return out.cpu()


def extremes() -> torch.Tensor:
    """Zeros, denormals, where exponentials under- and overflow, the largest of each type."""
    powers = 10.0 ** torch.arange(-45, 39, dtype=torch.float64)
    others = torch.tensor([20, 88, 89, 103, 104, 65504, 3.3895e38, torch.finfo().max])
    values = torch.cat([torch.zeros(1), powers, others]).float()
    return torch.cat([values, -values])


def test_there_is_a_code_for_every_activation_of_a_network():
    assert set(ACTIVATION_CODES) == set(ACTIVATIONS) - {"prelu"}  # whose slopes are no number
    assert sorted(ACTIVATION_CODES.values()) == list(range(len(ACTIVATION_CODES)))
    with pytest.raises(ValueError, match=r"must be one of linear, .*, not 'gelu'"):
        activation_code("gelu")
    with pytest.raises(ValueError, match="not 'gelu'"):
        activate_reference(torch.zeros(1), "gelu")


@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_the_reference_is_what_networks_are_run_with(name):
    x = torch.linspace(-30, 30, 1001)
    assert torch.equal(activate_reference(x, name), activate_in_network(x, name))


@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_equal_to_float64(name):
    """Relative to the result, as far as float32's exponential reaches: below -80 it is nearly 0."""
    x = torch.linspace(-80, 80, 5003)
    expected = activate_reference(x.double(), name).float()
    # exp x of float32 is good to |x| + 2 units in the last place.
    torch.testing.assert_close(run(x, name), expected, rtol=2e-5, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in")  # numpy's; infinity is right
@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_extreme_values_stay_finite(name):
    """Only SELU makes the largest of all larger."""
    x = extremes()[extremes() < 3.3e38] if name == "selu" else extremes()
    out = run(x, name)
    assert out.isfinite().all(), x[~out.isfinite()]
    torch.testing.assert_close(
        out, activate_reference(x.double(), name).float(), rtol=2e-5, atol=1e-35
    )


@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_nan_stays_nan(name):
    out = run(torch.tensor([math.nan, 1.0, -math.nan]), name)
    assert out.isnan().tolist() == [True, False, True]


def test_infinity():
    x = torch.tensor([math.inf])
    for name in ("linear", "leaky", "mish", "swish", "relu", "selu", "hard_swish"):
        assert run(x, name).item() == math.inf
    assert run(x, "logistic").item() == 1
    assert run(x, "relu6").item() == 6
    assert run(-x, "relu6").item() == 0
    assert run(-x, "selu").item() == pytest.approx(-1.7580993)
    assert run(-x, "logistic").item() == 0
    assert run(-x, "relu").item() == 0
