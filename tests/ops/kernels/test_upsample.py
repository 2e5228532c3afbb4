"""upsample's kernel against its definition, in the interpreter without a GPU: bits are moved."""

import pytest
import torch
import torch.nn.functional as F

from yolov4_fast.ops.upsample import upsample, upsample_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 2, 130), (1, 13, 13, 32)]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern of the dtype, NaN among them."""
    last = shape[3] * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (*shape[:3], last), dtype=torch.uint8, generator=generator)
    return data.view(dtype).to(DEVICE)


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_slice_to_slice(shape, dtype, factor):
    batch, height, width, channels = shape
    bits = BITS[dtype.itemsize]
    source = random_bits((batch, height, width, channels + 3), dtype)[..., 2 : 2 + channels]
    buffer = random_bits((batch, height * factor, width * factor, channels + 9), dtype)
    before, out = buffer.clone(), buffer[..., 4 : 4 + channels]
    assert upsample(source, out, factor) is out
    expected = source.view(bits).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert torch.equal(out.view(bits), expected)
    assert torch.equal(buffer[..., :4].view(bits), before[..., :4].view(bits))
    after = slice(4 + channels, None)
    assert torch.equal(buffer[..., after].view(bits), before[..., after].view(bits))


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_the_reference_is_nearest_neighbour(factor):
    source = torch.randn(2, 3, 4, 5)
    expected = F.interpolate(source.permute(0, 3, 1, 2), scale_factor=factor, mode="nearest")
    assert torch.equal(upsample_reference(source, factor), expected.permute(0, 2, 3, 1))
    out = torch.empty(2, 3 * factor, 4 * factor, 5)
    assert upsample(source, out, factor, implementation="reference") is out
    assert torch.equal(out, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0}, "factor must be at least 1, not 0"),
        ({"out": torch.zeros(1, 4, 7, 4)}, r"out must be \[1, 4, 6, 4\] torch.float32"),
        ({"out": torch.zeros(1, 4, 6, 4).half()}, "out must be .* torch.float32"),
        ({"source": torch.zeros(1, 4, 2, 3).permute(0, 2, 3, 1)}, "source must be a channel slice"),
        ({"out": torch.zeros(1, 4, 6, 4, device="meta")}, "one device"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"source": torch.zeros(1, 2, 3, 4), "out": torch.zeros(1, 4, 6, 4), "factor": 2}
    with pytest.raises(ValueError, match=message):
        upsample(**{**arguments, **change})


def test_eight_bytes_are_too_many():
    with pytest.raises(ValueError, match=r"1, 2 or 4 bytes, not torch\.float64"):
        upsample(torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 2, 2, 1).double(), 2)
