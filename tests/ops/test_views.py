"""What is a view tensor, and what is refused."""

import pytest
import torch

from yolov4_fast.ops.views import check_dtype, check_same_device, row_stride, uses_kernel


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 5)])
def test_slices_of_channels_are_views(shape):
    buffer = torch.zeros(*shape[:3], 11)
    assert row_stride(buffer) == 11
    assert row_stride(buffer[..., 3:8]) == 11
    assert row_stride(buffer[..., 10:]) == 11
    assert row_stride(torch.zeros(shape)) == 5


def test_strides_of_sizes_one_mean_nothing():
    assert row_stride(torch.zeros(1, 1, 1, 5)) == 5
    assert row_stride(torch.zeros(60).as_strided((1, 3, 1, 5), (7, 10, 99, 1))) == 10
    assert row_stride(torch.zeros(60).as_strided((3, 1, 1, 5), (10, 98, 99, 1))) == 10
    assert row_stride(torch.zeros(60).as_strided((1, 1, 6, 1), (7, 98, 10, 3))) == 10


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 5, 3, 4).permute(0, 2, 3, 1),  # planes
        torch.zeros(2, 3, 7, 5)[:, :, ::2],  # every other column of an odd number: uneven
        torch.zeros(2, 6, 4, 5)[:, ::2],
        torch.zeros(2, 3, 6, 5)[:, :, :4],  # a part of each line
        torch.zeros(4, 3, 4, 5)[::2],
        torch.zeros(2, 3, 4, 10)[..., ::2],
        torch.zeros(1, 1, 1, 5).expand(2, 3, 4, 5),
    ],
)
def test_other_strides_are_refused(x):
    with pytest.raises(ValueError, match=r"the source must be a channel slice .* strides \["):
        row_stride(x, "the source")


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 0), (0, 3, 4, 5), (1, 2, 3, 4, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"out must be \[B, height, width, channels\]"):
        row_stride(torch.zeros(shape), "out")


def test_dtypes_and_devices_are_checked():
    with pytest.raises(ValueError, match=r"x must be torch\.float16 or torch\.float32, not .*int8"):
        check_dtype(torch.zeros(1, dtype=torch.int8), "x", (torch.float16, torch.float32))
    with pytest.raises(ValueError, match=r"one device, not on \['cpu', 'meta'\]"):
        check_same_device((torch.zeros(1), torch.zeros(1, device="meta")))


def test_the_kernel_needs_a_gpu_or_the_interpreter(monkeypatch):
    x = torch.zeros(1)
    assert not uses_kernel(x, "reference")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert uses_kernel(x, "kernel")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not uses_kernel(x, "reference")
    with pytest.raises(ValueError, match="runs on CUDA tensors, not on cpu"):
        uses_kernel(x, "kernel")
    with pytest.raises(ValueError, match="must be one of kernel, reference, not 'fast'"):
        uses_kernel(x, "fast")


def test_cells_must_be_countable_in_32_bits():
    with pytest.raises(ValueError, match="x has more than 1073741824 cells"):
        row_stride(torch.zeros(2**15, 2**15, 2, 4, device="meta"), "x")
