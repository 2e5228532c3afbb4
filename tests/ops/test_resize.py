"""resize and placement, each implementation against the definition written out in numpy."""

import numpy as np
import pytest
import torch

from yolov4_fast.ops import placement, resize

IMPLEMENTATIONS = ("extension", "reference")
SIZES = [(7, 5), (1, 1), (1, 9), (9, 1), (64, 33), (300, 20), (37, 411)]  # height, width
CANVASES = [(1, 1), (1, 8), (13, 1), (32, 32), (31, 45), (64, 33)]


def picture(height, width, dtype=torch.uint8, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels)
    return image if dtype == torch.uint8 else image.float() / 255


def bilinear(image, height, width):
    """Aligned corners in float64, cell by cell; the last is the last input cell."""
    rows, columns = image.shape[:2]
    out = np.empty((height, width, 3))
    for i in range(height):
        y = i * (rows - 1) / (height - 1) if i < height - 1 else rows - 1
        for j in range(width):
            x = j * (columns - 1) / (width - 1) if j < width - 1 else columns - 1
            below, right = min(int(y) + 1, rows - 1), min(int(x) + 1, columns - 1)
            dy, dx = y - int(y), x - int(x)
            top = (1 - dx) * image[int(y), int(x)] + dx * image[int(y), right]
            bottom = (1 - dx) * image[below, int(x)] + dx * image[below, right]
            out[i, j] = (1 - dy) * top + dy * bottom
    return out


def definition(image, height, width, mode):
    image = image.numpy().astype(float) / (255 if image.dtype == torch.uint8 else 1)
    canvas = np.full((height, width, 3), 0.5)
    new_height, new_width = height, width
    if mode == "letterbox":
        rows, columns = image.shape[:2]
        if width / columns < height / rows:
            new_height = max(1, rows * width // columns)
        else:
            new_width = max(1, columns * height // rows)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    inside = bilinear(image, new_height, new_width)
    canvas[top : top + new_height, left : left + new_width] = inside
    return torch.from_numpy(canvas.transpose(2, 0, 1)).float()


# Positions are float32 (Darknet's), the definition's float64: over 411 columns they differ by up to
# 3e-5 of a pixel, and neighbouring pixels by at most 1.
TOLERANCE = 5e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("canvas", CANVASES)
def test_batch_of_sizes_matches_the_definition(implementation, mode, canvas):
    images = [
        picture(*size, dtype=dtype, seed=seed)
        for seed, (size, dtype) in enumerate(
            (size, dtype) for size in SIZES for dtype in (torch.uint8, torch.float32)
        )
    ]
    result = resize(images, *canvas, mode, implementation=implementation)
    assert result.shape == (len(images), 3, *canvas) and result.dtype == torch.float32
    for image, out in zip(images, result, strict=True):
        expected = definition(image, *canvas, mode)
        torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_large_image_matches_the_reference(mode):
    image = picture(720, 1280)
    fast = resize([image], 416, 416, mode)
    slow = resize([image], 416, 416, mode, implementation="reference")
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_matter(implementation):
    image = picture(21, 34)
    expected = resize([image], 16, 20, "letterbox", implementation=implementation)
    wide = torch.zeros(42, 68, 4, dtype=torch.uint8)
    wide[::2, ::2, :3] = image
    views = [
        image.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        image.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        wide[::2, ::2, :3],
    ]
    for view in views:
        assert not view.is_contiguous()
        result = resize([view], 16, 20, "letterbox", implementation=implementation)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flipped_channels_of_one_colour_stay(implementation):
    image = torch.tensor([10, 128, 255], dtype=torch.uint8).expand(6, 9, 3)
    result = resize([image], 12, 7, "stretch", implementation=implementation)
    expected = torch.tensor([10, 128, 255])[None, :, None, None].expand(1, 3, 12, 7) / 255
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_last_row_is_the_last_input_row(implementation):
    """240 rows to 416: in float32 the last position rounds to just under 239."""
    image = picture(240, 8, torch.float32)
    result = resize([image], 416, 8, "stretch", implementation=implementation)
    torch.testing.assert_close(result[0, :, -1], image[-1].T, rtol=0, atol=1e-6)


def test_number_of_threads_does_not_change_the_result():
    images = [picture(90, 120, seed=1), picture(50, 35, torch.float32, seed=2)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(resize(images, 96, 128, "letterbox"))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_images(implementation):
    assert resize([], 8, 6, "stretch", implementation=implementation).shape == (0, 3, 8, 6)
    assert placement([], 8, 6, "letterbox").shape == (0, 4)


@pytest.mark.parametrize(
    ("image", "inside"),  # of a canvas 128 high and 160 wide: top, left, height, width
    [
        ((320, 320), (0, 16, 128, 128)),
        ((420, 240), (0, 43, 128, 73)),  # an odd margin of 87: 43 before, 44 after
        ((200, 620), (38, 0, 51, 160)),  # 51.6 rounds down
        ((1, 5000), (63, 0, 1, 160)),  # never less than a row
    ],
)
def test_letterbox_geometry(image, inside):
    top, left, height, width = inside
    result = resize([torch.zeros(*image, 3)], 128, 160, "letterbox")[0]
    assert (result[:, top : top + height, left : left + width] == 0).all()
    result[:, top : top + height, left : left + width] = 0.5
    assert (result == 0.5).all()


def test_placement_is_darknets():
    """x' = (x - (net - new) / 2 / net) / (new / net), and the same for y."""
    got = placement([(420, 240), (200, 620)], 128, 160, "letterbox")
    for row, (new_height, new_width) in zip(got.tolist(), [(128, 73), (51, 160)], strict=True):
        for x, y in [(0.0, 0.0), (0.25, 0.9), (1.0, 1.0)]:
            expected_x = (x - (160 - new_width) / 2 / 160) / (new_width / 160)
            expected_y = (y - (128 - new_height) / 2 / 128) / (new_height / 128)
            assert x * row[0] + row[2] == pytest.approx(expected_x, abs=1e-6)
            assert y * row[1] + row[3] == pytest.approx(expected_y, abs=1e-6)
    assert placement([(420, 240)], 128, 160, "stretch").tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: resize([picture(4, 4).double()], 8, 8, "stretch"), "float64"),
        (lambda: resize([torch.zeros(3, 4, 4)], 8, 8, "stretch"), r"\[3, 4, 4\]"),
        (lambda: resize([torch.zeros(0, 4, 3)], 8, 8, "stretch"), r"\[0, 4, 3\]"),
        (lambda: resize([picture(4, 4)], 0, 8, "stretch"), "not 0 and 8"),
        (lambda: resize([picture(4, 4)], 8, 8, "crop"), "crop"),
        (lambda: resize([picture(4, 4)], 8, 8, "stretch", implementation="fast"), "fast"),
        (lambda: placement([(0, 4)], 8, 8, "stretch"), "4x0"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("regions", "words"),
    [([0, 0, 8], "regions must hold 4 numbers"), ([1, 0, 8, 8], "does not lie within 8x8")],
)
def test_the_operator_itself_refuses_bad_regions(regions, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.yolov4_fast.resize([picture(4, 4)], regions, 8, 8)


def test_opcheck():
    images = [picture(5, 7), picture(9, 4, torch.float32)]
    arguments = (images, [0, 0, 8, 8, 2, 0, 4, 8], 8, 8)
    torch.library.opcheck(torch.ops.yolov4_fast.resize.default, arguments)
