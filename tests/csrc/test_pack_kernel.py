"""pack's CUDA kernel, run on the CPU, against the CPU's operator."""

import pytest
import torch

from yolov4_fast.ops.pack import pack, pack_reference


def candidates_of(count, batch=1):
    generator = torch.Generator().manual_seed(count)
    class_ids = torch.randint(0, 80, (batch, count), generator=generator, dtype=torch.int32)
    counts = torch.randint(0, 100_000, (batch,), generator=generator, dtype=torch.int32)
    boxes = torch.randn(batch, count, 4, generator=generator)
    return boxes, torch.rand(batch, count, generator=generator), class_ids, counts


@pytest.mark.parametrize(
    ("candidates", "detections", "kept"),
    [(1, 1, [1]), (5, 5, [0, 5, 3]), (100, 7, [7, 2]), (3, 400, [3, 1, 0, 2]), (7, 0, [0, 0])],
)
def test_pack(kernels, candidates, detections, kept):
    generator = torch.Generator().manual_seed(candidates)
    keep = torch.full((len(kept), detections), -1)
    for image, count in enumerate(kept):
        keep[image, :count] = torch.randperm(candidates, generator=generator)[:count]
    kept = torch.tensor(kept, dtype=torch.int32)
    case = (*candidates_of(candidates, len(kept)), keep, kept)
    actual = kernels(2).pack(*case)
    assert torch.equal(actual, pack(*case)) and torch.equal(actual, pack_reference(*case))


def test_pack_does_not_read_what_is_not_there(kernels):
    boxes, scores, class_ids, counts = candidates_of(5)
    keep = torch.tensor([[5, 1, -1, 2**40]])
    packed = kernels().pack(
        boxes, scores, class_ids, counts, keep, torch.tensor([4], dtype=torch.int32)
    )
    assert packed[0, [1, 3, 4]].isnan().all()
    assert torch.equal(packed[0, 2, :4], boxes[0, 1])
