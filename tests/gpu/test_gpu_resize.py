"""The resize kernel on a GPU: large pictures, each type, strides, streams and graphs."""

import numpy as np
import pytest
import torch

from yolov4_fast.ops import resize
from yolov4_fast.ops.kernels.resize import launch, table_row
from yolov4_fast.ops.resize import region

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SIZES = [(720, 1280), (1080, 1920), (1, 1), (333, 77), (240, 320), (2160, 3840)]
FLOAT32 = 2.0**-23  # the definition's lerp may round once or twice, see tests/ops/kernels


def pictures(sizes=SIZES):
    generator = np.random.default_rng(0)
    images = []
    for number, size in enumerate(sizes):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        image = torch.from_numpy(pixels)
        images.append(image.float() / 255 if number % 3 == 1 else image)
    return images


def table_of(images, height, width, mode):
    rows = [table_row(image, region(image.shape[:2], height, width, mode)) for image in images]
    return torch.tensor(rows, dtype=torch.int64, device="cuda")


def launched(images, height, width, mode, dtype):
    out = torch.full((len(images), height, width, 3), torch.nan, dtype=dtype, device="cuda")
    launch(table_of(images, height, width, mode), out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
@pytest.mark.parametrize("canvas", [(416, 416), (608, 352), (37, 61)])
def test_matches_the_reference(canvas, mode, dtype):
    """Equal after one rounding; where the definition is within FLOAT32 of a tie, either side."""
    images = pictures()
    on_gpu = [image.cuda() for image in images]
    expected = resize(images, *canvas, mode, implementation="reference").permute(0, 2, 3, 1).cuda()
    result = launched(on_gpu, *canvas, mode, dtype)
    low, high = (expected - FLOAT32).to(dtype), (expected + FLOAT32).to(dtype)
    assert ((low <= result) & (result <= high)).all()
    if dtype != torch.float32:
        assert (result != expected.to(dtype)).float().mean() < 0.002
    assert torch.equal(result, launched(on_gpu, *canvas, mode, dtype))


@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_resize_takes_cuda_images_in_place(mode):
    images = pictures()
    planes = [image.permute(2, 0, 1).contiguous().cuda().permute(1, 2, 0) for image in images]
    result = resize(planes, 320, 416, mode)
    assert result.is_cuda and result.shape == (len(images), 3, 320, 416)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.cpu(), resize(images, 320, 416, mode), rtol=0, atol=1e-6)


def test_one_graph_serves_images_of_every_size():
    first, second = (
        [image.cuda() for image in pictures(sizes)]
        for sizes in ([(480, 640), (50, 30)], [(90, 1300), (720, 405)])
    )
    table = table_of(first, 416, 416, "letterbox")
    out = torch.empty((2, 416, 416, 3), dtype=torch.float16, device="cuda")
    launch(table, out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(table, out)
    for images in (second, first):
        table.copy_(table_of(images, 416, 416, "letterbox"))
        graph.replay()
        assert torch.equal(out, launched(images, 416, 416, "letterbox", torch.float16))


def test_offsets_beyond_32_bits():
    far = torch.zeros(2**32 + 64, dtype=torch.uint8, device="cuda")
    image = far.as_strided((2, 3, 3), (2**32, 3, 1))
    near = pictures([(2, 3)])[0].cuda()
    image.copy_(near)
    results = (launched([x], 50, 40, "stretch", torch.float16) for x in (image, near))
    assert torch.equal(*results)


def test_writes_only_its_channels_of_a_wider_buffer():
    images = [image.cuda() for image in pictures()]
    buffer = torch.full((len(images), 64, 96, 8), torch.nan, dtype=torch.float16, device="cuda")
    launch(table_of(images, 64, 96, "stretch"), buffer[..., 3:6])
    assert torch.equal(buffer[..., 3:6], launched(images, 64, 96, "stretch", torch.float16))
    buffer[..., 3:6] = torch.nan
    assert buffer.isnan().all()
