"""combine's kernel against its definition, in the interpreter without a GPU."""

import math

import pytest
import torch

from yolov4_fast.ops.activation import ACTIVATION_CODES
from yolov4_fast.ops.combine import combine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One unit in the last place of a rounded result; float32's exponential is a little less exact, and
# a sum that cancels keeps the absolute error of its terms.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-5)}


def random_slice(shape: tuple[int, ...], dtype: torch.dtype, before: int) -> torch.Tensor:
    return torch.randn(*shape[:3], shape[3] + before + 5).to(dtype).to(DEVICE)[..., before:-5]


@pytest.mark.parametrize("activation", list(ACTIVATION_CODES))
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_slices(dtype, count, product, activation):
    torch.manual_seed(0)
    shape = (2, 5, 3, 37)
    sources = [random_slice(shape, dtype, index) for index in range(count)]
    buffer = torch.full((*shape[:3], 50), math.nan, dtype=dtype, device=DEVICE)
    out = buffer[..., 6:43]
    assert combine(sources, out, product, activation) is out
    expected = torch.empty_like(out)
    combine(sources, expected, product, activation, implementation="reference")
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    assert buffer[..., :6].isnan().all() and buffer[..., 43:].isnan().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 300), (1, 13, 13, 64)])
def test_in_place_and_other_shapes(shape):
    torch.manual_seed(0)
    first, second = (random_slice(shape, torch.float32, 2) for _ in range(2))
    expected = first + second
    combine([first, second], first, False, "linear")
    assert torch.equal(first, expected)


def test_the_reference_sums_in_order_and_multiplies():
    a, b, c = (torch.full((1, 1, 1, 3), value) for value in (1e8, 1.0, -1e8))
    out = torch.empty(1, 1, 1, 3)
    assert combine([a, b, c], out, False, "linear", implementation="reference").eq(0).all()
    assert combine([a, c, b], out, False, "linear", implementation="reference").eq(1).all()
    assert combine([b, c, b], out, True, "relu", implementation="reference").eq(0).all()
    assert combine([c, b, c], out, True, "linear", implementation="reference").eq(1e16).all()


def test_nan_is_not_hidden():
    x = torch.tensor([math.nan, 1.0], device=DEVICE).reshape(1, 1, 1, 2)
    for activation in ACTIVATION_CODES:
        out = combine([x, torch.ones_like(x)], torch.empty_like(x), True, activation)
        assert out.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": [torch.zeros(1, 2, 3, 4)]}, "2 to 4 sources, not 1"),
        ({"sources": [torch.zeros(1, 2, 3, 4)] * 5}, "2 to 4 sources, not 5"),
        ({"sources": [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)]}, "source 1 must be"),
        ({"sources": [torch.zeros(1, 2, 3, 4).half()] * 2}, r"source 0 must be .* torch\.float32"),
        ({"out": torch.zeros(1, 2, 3, 4).int()}, r"out must be torch\.float32 or"),
        ({"activation": "gelu"}, "must be one of linear"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {
        "sources": [torch.zeros(1, 2, 3, 4)] * 2,
        "out": torch.zeros(1, 2, 3, 4),
        "product": False,
        "activation": "linear",
    }
    with pytest.raises(ValueError, match=message):
        combine(**{**arguments, **change})
