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


@pytest.mark.parametrize("activation", ["linear", "mish", "prelu"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_weighted_sums(dtype, count, activation):
    torch.manual_seed(0)
    shape = (2, 5, 3, 137)  # channels of two programs
    sources = [random_slice(shape, dtype, index) for index in range(count)]
    weights = torch.randn(count, 137, device=DEVICE)
    slopes = torch.randn(137, device=DEVICE) if activation == "prelu" else None
    buffer = torch.full((*shape[:3], 150), math.nan, dtype=dtype, device=DEVICE)
    out = buffer[..., 6:143]
    combine(sources, out, False, activation, weights=weights, slopes=slopes)
    expected = torch.empty_like(out)
    vectors = {"weights": weights, "slopes": slopes}
    combine(sources, expected, False, activation, **vectors, implementation="reference")
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)
    exact = sum(w.double() * x.double() for w, x in zip(weights, sources, strict=True))
    if activation == "prelu":
        exact = torch.where(exact > 0, exact, slopes.double() * exact)
    elif activation == "mish":
        exact = torch.nn.functional.mish(exact)
    torch.testing.assert_close(out.double(), exact, rtol=2 * rtol, atol=atol)
    assert buffer[..., :6].isnan().all() and buffer[..., 143:].isnan().all()


@pytest.mark.parametrize("product", [False, True])
def test_prelu_of_each_channel(product):
    x = torch.tensor([[2.0, -2.0, -2.0, 0.0, math.nan]], device=DEVICE).reshape(1, 1, 1, 5)
    slopes = torch.tensor([9.0, 0.25, -3.0, 9.0, 9.0], device=DEVICE)
    out = combine([x], torch.empty_like(x), product, "prelu", slopes=slopes)
    assert out.flatten()[:4].tolist() == [2.0, -0.5, 6.0, 0.0] and out[..., 4].isnan().all()


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
        ({"sources": []}, "1 to 4 sources, not 0"),
        ({"sources": [torch.zeros(1, 2, 3, 4)] * 5}, "1 to 4 sources, not 5"),
        ({"sources": [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)]}, "source 1 must be"),
        ({"sources": [torch.zeros(1, 2, 3, 4).half()] * 2}, r"source 0 must be .* torch\.float32"),
        ({"out": torch.zeros(1, 2, 3, 4).int()}, r"out must be torch\.float32 or"),
        ({"activation": "gelu"}, "must be one of linear"),
        ({"activation": "prelu"}, "activation prelu needs slopes"),
        ({"slopes": torch.zeros(4)}, "activation linear takes no slopes"),
        ({"activation": "prelu", "slopes": torch.zeros(5)}, r"slopes must be \[4\]"),
        ({"weights": torch.ones(2, 4), "product": True}, "a product takes none"),
        ({"weights": torch.ones(3, 4)}, r"weights must be \[2, 4\]"),
        ({"weights": torch.ones(4, 2).t()}, "weights must be .* contiguous"),
        ({"weights": torch.ones(2, 4).half()}, r"weights must be torch\.float32"),
        ({"weights": torch.ones(2, 4, device="meta")}, "one device"),
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
