"""mish_bn's kernel against its definition, in the interpreter without a GPU."""

import math

import pytest
import torch

from yolov4_fast.ops.activation import ACTIVATION_CODES
from yolov4_fast.ops.kernels import mish_bn as kernel
from yolov4_fast.ops.mish_bn import mish_bn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One unit in the last place of a rounded result; float32's exponential is a little less exact, and
# a sum that cancels keeps the absolute error of its terms.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-5)}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 13, 13, 32), (3, 1, 4, 255), (1, 2, 3, 300)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(shape)).to(dtype).to(DEVICE)


def sliced(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN and the view of `shape` in the middle of its channels."""
    buffer = torch.full((*shape[:3], shape[3] + 12), math.nan, dtype=dtype, device=DEVICE)
    return buffer, buffer[..., 8 : 8 + shape[3]]


def check(out, x, scale, bias, activation, residual):
    expected = mish_bn(
        *(x, scale, bias, activation, residual, torch.empty_like(out)), implementation="reference"
    )
    rtol, atol = TOLERANCES[out.dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_of_odd_shapes(shape, dtype, activation):
    buffer, out = sliced(shape, dtype)
    _, x = sliced(shape, dtype)
    _, residual = sliced(shape, dtype)
    x.copy_(random(*shape)), residual.copy_(random(*shape))
    bias = random(shape[3])
    assert mish_bn(x, None, bias, activation, residual, out) is out
    check(out, x, None, bias, activation, residual)
    assert buffer[..., :8].isnan().all() and buffer[..., 8 + shape[3] :].isnan().all()


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float32])
def test_each_part_may_be_absent(scale, bias, residual, x_dtype):
    shape = (2, 3, 4, 19)
    x = random(*shape, dtype=x_dtype)
    out = random(*shape, dtype=torch.float16)
    parts = (random(19) if scale else None, random(19) if bias else None, "mish")
    added = random(*shape, dtype=torch.float16) if residual else None
    mish_bn(x, *parts, added, out)
    check(out, x, *parts, added)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_partial_sums(splits, dtype):
    shape = (2, 3, 5, 20)
    workspace = random(splits, 30, 24)  # rows wider than the map's: only strides tell
    partial = workspace[..., :20]
    _, out = sliced(shape, dtype)
    bias, residual = random(20), random(*shape, dtype=dtype)
    mish_bn(partial, None, bias, "mish", residual, out)
    check(out, partial, None, bias, "mish", residual)


def test_partial_sums_are_added_in_order():
    """1e8 + 1 is 1e8 in float32: the sum tells the order."""
    partial = torch.tensor([1e8, 1.0, -1e8, 2.0], device=DEVICE)[:, None, None].repeat(1, 3, 5)
    out = torch.empty(1, 1, 3, 5, device=DEVICE)
    assert mish_bn(partial, None, None, "linear", None, out).eq(2.0).all()
    assert mish_bn(partial.flip(0), None, None, "linear", None, out).eq(0.0).all()


def test_in_place():
    for dtype in TOLERANCES:
        _, x = sliced((2, 3, 5, 40), dtype)
        x.copy_(random(2, 3, 5, 40))
        before, scale, bias = x.clone(), random(40), random(40)
        mish_bn(x, scale, bias, "mish", x, x)
        check(x, before, scale, bias, "mish", before)


@pytest.mark.slow
def test_large_maps_take_the_larger_tile():
    shape = (1, 64, kernel.LARGE // 64 // 128 + 1, 128)
    x, out, bias = random(*shape), torch.empty(shape, device=DEVICE), random(128)
    mish_bn(x, None, bias, "mish", None, out)
    check(out, x, None, bias, "mish", None)


@pytest.mark.filterwarnings("ignore:overflow encountered in")  # numpy's; infinity is right
def test_extreme_values_stay_finite_in_half_precision():
    x = torch.tensor([65504.0, -65504, 6e-8, -6e-8, 0, 20, -20, 88], device=DEVICE).half()
    x = x.reshape(1, 1, 1, 8)
    for activation in ACTIVATION_CODES:
        out = mish_bn(x, None, None, activation, None, torch.empty_like(x))
        largest = math.inf if activation == "selu" else 65504  # whose slope is 1.05
        assert out.max() <= largest and not out.isnan().any()
        check(out, x, None, None, activation, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "must be one of linear"),
        ({"x": torch.zeros(1, 2, 3, 5)}, "must have one shape"),
        ({"x": torch.zeros(1, 2, 3, 4).double()}, "x must be torch.float32"),
        ({"x": torch.zeros(2, 5, 4)}, r"must be \[splits, 6, 4\]"),
        ({"x": torch.zeros(2, 6, 4).half()}, "partial sums must be torch.float32"),
        ({"x": torch.zeros(2, 4, 6).mT}, "contiguous rows"),
        ({"scale": torch.zeros(5)}, r"scale must be \[4\]"),
        ({"bias": torch.zeros(4).half()}, "bias must be torch.float32"),
        ({"bias": torch.zeros(8)[::2]}, "bias must be .* contiguous"),
        ({"residual": torch.zeros(1, 2, 4, 4)}, "the residual .* must have one shape"),
        ({"residual": torch.zeros(1, 2, 3, 4).half()}, "the residual must be torch.float32"),
        ({"out": torch.zeros(1, 2, 3, 4).int()}, "out must be torch.float32 or"),
        ({"out": torch.zeros(1, 4, 2, 3).permute(0, 2, 3, 1)}, "out must be a channel slice"),
        ({"implementation": "fast"}, "implementation must be one of"),
        ({"x": torch.zeros(1, 2, 3, 4, device="meta")}, "one device"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "x": torch.zeros(1, 2, 3, 4),
        "scale": None,
        "bias": torch.zeros(4),
        "activation": "mish",
        "residual": None,
        "out": torch.zeros(1, 2, 3, 4),
    }
    with pytest.raises(ValueError, match=message):
        mish_bn(**{**arguments, **change})
