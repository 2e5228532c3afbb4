"""The decode kernels on a GPU against the compiled operator on the CPU, at a network's size."""

import pytest
import torch

from yolov4_fast.ops import decode
from yolov4_fast.ops.kernels.decode import append

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SIZE, CLASSES, BATCH = 416, 80, 4
SCALES = (1.2, 1.1, 1.05)
ANCHORS = (
    ((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),
    ((36.0, 75.0), (76.0, 55.0), (72.0, 146.0)),
    ((142.0, 110.0), (192.0, 243.0), (459.0, 401.0)),
)


def random_maps(dtype=torch.float16, seed=0, new_coords=False):
    """Views [BATCH, h, w, 255] in rows of 256 whose last channel is NaN; few cells hold objects."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for stride in (8, 16, 32):
        cells = SIZE // stride
        raw = torch.randn((BATCH, cells, cells, 3, 5 + CLASSES), generator=generator)
        raw[..., 4] = raw[..., 4] * 2 - 4
        raw[..., 5:] = raw[..., 5:] * 2 - 3
        raw = raw.sigmoid() if new_coords else raw
        wide = torch.full((BATCH, cells, cells, 256), torch.nan, dtype=dtype)
        wide[..., :255] = raw.flatten(3)
        maps.append(wide.cuda()[..., :255])
    return maps


def buffers(room):
    boxes = torch.zeros((BATCH, room, 4), device="cuda")
    integers = torch.zeros((2, BATCH, room), dtype=torch.int32, device="cuda")
    counts = torch.full((BATCH,), 7, dtype=torch.int32, device="cuda")
    return boxes, torch.zeros((BATCH, room), device="cuda"), integers[0], integers[1], counts


def expected_of(maps, confidence, new_coords=False, placement=None):
    planes = [raw.permute(0, 3, 1, 2).float().cpu() for raw in maps]
    new = (new_coords,) * 3
    return decode(planes, ANCHORS, SCALES, new, SIZE, SIZE, confidence, placement)


def assert_same(found, expected):
    """exp of another library: a rounding to float32 may fall on the other side."""
    boxes, scores, class_ids, numbers, counts = (part.cpu() for part in found)
    assert torch.equal(counts, expected.counts)
    for image, count in enumerate(counts.tolist()):
        order = numbers[image, :count].argsort()
        close = {"rtol": 2.4e-7, "atol": 1e-7}
        torch.testing.assert_close(boxes[image, order], expected.boxes[image, :count], **close)
        torch.testing.assert_close(scores[image, order], expected.scores[image, :count], **close)
        assert torch.equal(class_ids[image, order], expected.class_ids[image, :count])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("confidence", [0.005, 0.25])
def test_matches_the_extension(dtype, new_coords, confidence):
    maps = random_maps(dtype, new_coords=new_coords)
    place = torch.rand(BATCH, 4) + 0.5
    expected = expected_of(maps, confidence, new_coords, place)
    assert int(expected.counts.min()) > 10
    found = buffers(int(expected.counts.max()))
    append(maps, ANCHORS, SCALES, (new_coords,) * 3, SIZE, SIZE, confidence, place.cuda(), *found)
    assert_same(found, expected)


def test_overflow_counts_all_and_keeps_within_the_room():
    maps = random_maps()
    expected = expected_of(maps, 0.05)
    room = int(expected.counts.min()) // 2
    wide = buffers(1 + room)
    found = tuple(part.flatten()[: part[:, :room].numel()].view(BATCH, room, *part.shape[2:])
                  for part in wide[:4])  # fmt: skip
    append(maps, ANCHORS, SCALES, (False,) * 3, SIZE, SIZE, 0.05, None, *found, wide[4])
    assert torch.equal(wide[4].cpu(), expected.counts)
    for part in wide[:4]:
        beyond = part.flatten()[part[:, :room].numel() :]
        assert len(beyond) and (beyond == 0).all()
    assert all(len(numbers.unique()) == room for numbers in found[3])


def test_a_graph_decodes_what_the_maps_hold_when_it_runs():
    maps = random_maps()
    found = buffers(60_000)
    arguments = (ANCHORS, SCALES, (False,) * 3, SIZE, SIZE, 0.1, None)
    append(maps, *arguments, *found)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(maps, *arguments, *found)
    for seed in (1, 2):
        for raw, new in zip(maps, random_maps(seed=seed), strict=True):
            raw.copy_(new)
        graph.replay()
        assert_same(found, expected_of(maps, 0.1))


@pytest.mark.parametrize("capacity", [0, 20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_decode_takes_cuda_maps(layout, capacity):
    planes = [raw.permute(0, 3, 1, 2).contiguous() for raw in random_maps(torch.float32)]
    place = torch.rand(BATCH, 4) + 0.5  # on the CPU, as `placement` makes it
    arguments = (ANCHORS, SCALES, (False,) * 3, SIZE, SIZE, 0.02, place, capacity)
    found = decode([raw.contiguous(memory_format=layout) for raw in planes], *arguments)
    expected = decode([raw.cpu() for raw in planes], *arguments)
    assert int(expected.counts.max()) > 1024  # more than the first guess
    assert all(part.is_cuda for part in found)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=2.4e-7, atol=1e-7)
