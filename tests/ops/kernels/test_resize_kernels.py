"""The resize kernel against the definition in torch, which tests/ops/test_resize.py checks."""

import numpy as np
import pytest
import torch

from yolov4_fast.ops import resize
from yolov4_fast.ops.kernels.resize import launch, table_row
from yolov4_fast.ops.resize import region

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted there
SIZES = [(7, 5), (1, 1), (1, 9), (9, 1), (64, 33), (90, 20), (37, 111)]  # height, width
CANVASES = [(1, 1), (1, 8), (13, 1), (32, 32), (9, 45), (17, 33)]


def picture(height, width, dtype=torch.uint8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).to(DEVICE)
    return image if dtype == torch.uint8 else image.float() / 255


def pictures(sizes=SIZES):
    """Each size in uint8 and in float32."""
    kinds = [(size, dtype) for size in sizes for dtype in (torch.uint8, torch.float32)]
    return [picture(*size, dtype, seed) for seed, (size, dtype) in enumerate(kinds)]


def table_of(images, height, width, mode):
    rows = [table_row(image, region(image.shape[:2], height, width, mode)) for image in images]
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def launched(images, height, width, mode, dtype=torch.float32):
    out = torch.full((len(images), height, width, 3), torch.nan, dtype=dtype, device=DEVICE)
    launch(table_of(images, height, width, mode), out)
    return out


def reference(images, height, width, mode):
    result = resize(images, height, width, mode, implementation="reference")
    return result.permute(0, 2, 3, 1)


# The definition's lerp is one fused multiply-add on most machines and two roundings on others:
# each of three steps may differ by half a unit of a value below 1.
FLOAT32 = 2.0**-23


def assert_rounded(out, expected):
    """out is `expected` rounded once; where that is within FLOAT32 of a tie, either neighbour."""
    low, high = (expected - FLOAT32).to(out.dtype), (expected + FLOAT32).to(out.dtype)
    assert ((low <= out) & (out <= high)).all()
    different = out != expected.to(out.dtype)
    assert different.float().mean() <= 0.01 and out.isfinite().all()


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("canvas", CANVASES)
def test_batch_of_sizes_matches_the_reference(mode, canvas):
    images = pictures()
    expected = reference(images, *canvas, mode)
    result = launched(images, *canvas, mode)
    torch.testing.assert_close(result, expected, rtol=0, atol=FLOAT32)
    assert_rounded(launched(images, *canvas, mode, torch.float16), expected)


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_match_the_reference(seed):
    generator = np.random.default_rng(seed)
    sizes = [tuple(generator.integers(1, 120, 2).tolist()) for _ in range(2)]
    canvas = tuple(generator.integers(1, 50, 2).tolist())
    mode = ("stretch", "letterbox")[seed % 2]
    images = pictures(sizes)
    expected = reference(images, *canvas, mode)
    assert_rounded(launched(images, *canvas, mode, torch.float16), expected)


def test_every_byte_is_divided_exactly():
    image = torch.arange(256, dtype=torch.uint8, device=DEVICE)[None, :, None].expand(1, 256, 3)
    result = launched([image], 1, 256, "stretch")
    expected = torch.arange(256, dtype=torch.float32, device=DEVICE) / 255
    assert torch.equal(result, expected[None, None, :, None].expand_as(result))


def test_same_size_is_the_image_itself():
    image = picture(21, 50, torch.float32)
    assert torch.equal(launched([image], 21, 50, "letterbox")[0], image)


def test_strides_do_not_matter():
    """Planes, a cut-out, every other pixel, channels reversed in memory: read in place."""
    image = picture(20, 31)
    planes = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    space = torch.zeros(50, 90, 7, dtype=torch.uint8, device=DEVICE)
    cut = space[3:23, 5:36, 2:5].copy_(image)
    sparse = torch.zeros(40, 62, 3, dtype=torch.uint8, device=DEVICE)[::2, ::2].copy_(image)
    columns = image.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    repeated = image[:1].expand(20, 31, 3)
    same = [image, planes, cut, sparse, columns]
    assert len({view.stride() for view in same}) == len(same)
    result = launched([*same, repeated], 16, 24, "letterbox")
    assert (result[:5] == result[0]).all()
    assert torch.equal(result[5], launched([repeated.contiguous()], 16, 24, "letterbox")[0])


def test_offsets_beyond_32_bits():
    """Rows more than 2^31 bytes apart; the memory between them is never touched."""
    far = torch.empty(2**32 + 64, dtype=torch.uint8, device=DEVICE)
    image = far.as_strided((2, 3, 3), (2**32, 3, 1))
    image.copy_(picture(2, 3))
    assert torch.equal(
        launched([image], 5, 4, "stretch"), launched([picture(2, 3)], 5, 4, "stretch")
    )


@pytest.mark.parametrize("offset", [0, 2, 5])
def test_writes_only_its_channels_of_a_wider_buffer(offset):
    images = pictures([(9, 14), (30, 8)])
    buffer = torch.full((len(images), 19, 27, 8), torch.nan, dtype=torch.float16, device=DEVICE)
    launch(table_of(images, 19, 27, "letterbox"), buffer[..., offset : offset + 3])
    expected = launched(images, 19, 27, "letterbox", torch.float16)
    assert torch.equal(buffer[..., offset : offset + 3], expected)
    buffer[..., offset : offset + 3] = torch.nan
    assert buffer.isnan().all()


@pytest.mark.parametrize(
    ("image", "inside"),  # of a canvas 32 high and 40 wide: top, left, height, width
    [
        ((80, 80), (0, 4, 32, 32)),
        ((105, 60), (0, 11, 32, 18)),
        ((50, 155), (10, 0, 12, 40)),  # 12.9 rounds down
        ((1, 500), (15, 0, 1, 40)),  # never less than a row
    ],
)
def test_letterbox_fills_with_a_half(image, inside):
    top, left, height, width = inside
    result = launched([torch.zeros(*image, 3, device=DEVICE)], 32, 40, "letterbox")[0]
    assert (result[top : top + height, left : left + width] == 0).all()
    result[top : top + height, left : left + width] = 0.5
    assert (result == 0.5).all()


def test_last_row_is_the_last_input_row():
    """240 rows to 416: in float32 the last position rounds to just under 239."""
    image = picture(240, 2, torch.float32)
    assert torch.equal(launched([image], 416, 2, "stretch")[0, -1], image[-1])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_float_images_are_not_clipped_and_nan_stays_where_it_is():
    image = picture(6, 6, torch.float32) * 300 - 100
    image[2, 3, 1] = torch.nan
    image[5, 0, 0] = torch.inf
    result, expected = (f([image], 11, 9, "stretch") for f in (launched, reference))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-4, equal_nan=True)
    assert result.isnan().any() and not result.isnan().all()


def test_resize_itself_asks_for_the_kernel():
    images = pictures([(7, 5), (20, 30)])
    result = resize(images, 12, 10, "letterbox", implementation="kernel")
    assert result.shape == (4, 3, 12, 10) and result.dtype == torch.float32
    assert torch.equal(result, launched(images, 12, 10, "letterbox").permute(0, 3, 1, 2))
    assert resize([], 12, 10, "stretch", implementation="reference").shape == (0, 3, 12, 10)


def test_kernel_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA tensors, not on cpu"):
        resize([torch.zeros(4, 4, 3)], 8, 8, "stretch", implementation="kernel")


@pytest.mark.parametrize(
    ("table", "out", "words"),
    [
        ((1, 12), torch.zeros(2, 4, 4, 3), r"table must be \[2, 12\]"),
        ((1, 11), torch.zeros(1, 4, 4, 3), r"not \[1, 11\]"),
        ((1, 12), torch.zeros(1, 4, 4, 4), r"not \[1, 4, 4, 4\]"),
        ((1, 12), torch.zeros(1, 3, 4, 4).permute(0, 2, 3, 1), "channel slice"),
        ((1, 12), torch.zeros(1, 4, 4, 3).double(), "float64"),
        ((1, 12), torch.zeros(1, 4, 4, 3, device="meta"), "meta"),
    ],
)
def test_bad_arguments_of_the_launch_are_named(table, out, words):
    with pytest.raises(ValueError, match=words):
        launch(torch.zeros(table, dtype=torch.int64), out)


def test_images_must_be_on_one_device():
    with pytest.raises(ValueError, match="image 1 is on meta and the first is on cpu"):
        resize([torch.zeros(4, 4, 3), torch.zeros(4, 4, 3, device="meta")], 8, 8, "stretch")
    with pytest.raises(ValueError, match="extension runs on CPU tensors, not on meta"):
        resize([torch.zeros(4, 4, 3, device="meta")], 8, 8, "stretch", implementation="extension")
