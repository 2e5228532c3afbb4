"""diou_nms and pack on a GPU against the CPU's: the same kept boxes, captured, without waiting."""

import pytest
import torch

from yolov4_fast.ops import library
from yolov4_fast.ops.diou_nms import MAX_CANDIDATES, diou_nms
from yolov4_fast.ops.pack import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def clustered_case(count, batch=1, classes=3, seed=0, distinct_scores=1000, boxes_each=12):
    """Candidates in clusters, so that many pairs lie on either side of a threshold."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    clusters = max(1, count // boxes_each)
    which = torch.randint(0, clusters, (batch, count), generator=generator)
    rows = torch.arange(batch)[:, None]
    center = uniform(0.1, 0.9, batch, clusters, 2)[rows, which]
    center = center + 0.02 * torch.randn(batch, count, 2, generator=generator)
    size = uniform(0.05, 0.3, batch, clusters, 2)[rows, which] * uniform(0.7, 1.4, batch, count, 2)
    scores = torch.randint(0, distinct_scores, (batch, count), generator=generator) / 1000
    class_ids = torch.randint(0, classes, (batch, count), generator=generator, dtype=torch.int32)
    counts = torch.full((batch,), count, dtype=torch.int32)
    return torch.cat((center - size / 2, center + size / 2), -1).float(), scores, class_ids, counts


def on_gpu(case):
    return tuple(None if tensor is None else tensor.cuda() for tensor in case)


def assert_same(actual, expected):
    assert torch.equal(actual[1].cpu(), expected[1])
    assert torch.equal(actual[0].cpu(), expected[0])


def test_the_operators_have_their_kernels():
    assert library.has_cuda()


@pytest.mark.parametrize("beta", [None, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.7, 1.0])
@pytest.mark.parametrize(
    ("count", "batch"), [(1, 1), (63, 2), (64, 1), (65, 8), (700, 32), (4096, 3)]
)
def test_matches_the_cpu(beta, threshold, count, batch):
    for classes in (1, 80):
        case = clustered_case(count, batch, classes, seed=count)
        assert_same(diou_nms(*on_gpu(case), threshold, beta), diou_nms(*case, threshold, beta))


@pytest.mark.parametrize("distinct_scores", [1, 3, 1000])
def test_ties_in_any_order_of_storage(distinct_scores):
    case = clustered_case(2000, 4, distinct_scores=distinct_scores)
    generator = torch.Generator().manual_seed(1)
    numbers = torch.stack([torch.randperm(2000, generator=generator) for _ in range(4)]).int()
    expected = diou_nms(*case, 0.45, 0.6, 0, numbers)
    assert_same(diou_nms(*on_gpu(case), 0.45, 0.6, 0, numbers.cuda()), expected)


def test_crowds_and_scattered_boxes():
    crowd = clustered_case(4096, 2, classes=1, boxes_each=2000)
    scattered = clustered_case(4096, 2, classes=1)
    corner = torch.rand(2, 4096, 2, generator=torch.Generator().manual_seed(1))
    scattered = torch.cat((corner, corner + 0.01), -1), *scattered[1:]
    same = torch.tensor([0.2, 0.3, 0.5, 0.9]).expand(2, 4096, 4), *crowd[1:]
    for case in (crowd, scattered, same):
        for threshold in (0.45, 1.0):
            assert_same(diou_nms(*on_gpu(case), threshold, 0.6), diou_nms(*case, threshold, 0.6))


@pytest.mark.parametrize("count", [MAX_CANDIDATES + 1, 6000, 100_000])
@pytest.mark.parametrize("distinct_scores", [3, 10_000_000])
def test_more_than_the_most_keeps_to_the_best(count, distinct_scores):
    boxes, scores, ids, counts = clustered_case(count, 2, 30, distinct_scores=distinct_scores)
    order = scores.sort(descending=True, stable=True).indices[:, :MAX_CANDIDATES]
    rows = torch.arange(2)[:, None]
    best = boxes[rows, order], scores[rows, order], ids[rows, order], counts
    expected, kept = diou_nms(*best, 0.45, 0.6, 3000)
    expected = torch.where(expected >= 0, order.gather(1, expected.clamp(min=0)), -1)
    actual = diou_nms(*on_gpu((boxes, scores, ids, counts)), 0.45, 0.6, 3000)
    assert_same(actual, (expected, kept))


def test_counts_limits_nan_and_strides():
    boxes, scores, ids, counts = clustered_case(400, 6)
    counts[:] = torch.tensor([0, 1, 47, 400, 2**31 - 1, -5])
    scores[:, ::9] = torch.nan
    views = (
        boxes.cuda().permute(2, 1, 0).contiguous().permute(2, 1, 0),
        scores.cuda().T.contiguous().T,
        ids.cuda().T.contiguous().T,
        counts.cuda(),
    )
    for limit in (0, 1, 30, 1000):
        expected = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, limit)
        assert_same(diou_nms(*views, 0.45, 0.6, limit), expected)


def test_boxes_that_lie_anywhere_in_memory():
    """A view whose rows are not aligned to the 16 bytes of a box."""
    case = clustered_case(300, 2)
    storage = torch.empty(2 * 300 * 4 + 1, device="cuda")
    boxes = storage[1:].view(2, 300, 4)
    boxes.copy_(case[0])
    actual = diou_nms(boxes, *on_gpu(case[1:]), 0.45, 0.6)
    assert_same(actual, diou_nms(*case, 0.45, 0.6))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape):
    batch, count = shape
    case = (
        torch.zeros(batch, count, 4),
        torch.zeros(batch, count),
        torch.zeros(batch, count, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
    )
    for limit in (0, 7):
        expected = diou_nms(*case, 0.45, 0.6, limit)
        actual = diou_nms(*on_gpu(case), 0.45, 0.6, limit)
        assert_same(actual, expected)
        assert torch.equal(pack(*on_gpu(case), *actual).cpu(), pack(*case, *expected))


@pytest.mark.parametrize("limit", [0, 5, 1000])
def test_pack_matches_the_cpu(limit):
    case = clustered_case(500, 9, classes=80)
    case[3][:3] = torch.tensor([0, 1, 100_000])
    kept = diou_nms(*case, 0.45, 0.6, limit)
    packed = pack(*on_gpu(case), *on_gpu(kept))
    assert torch.equal(packed.cpu(), pack(*case, *kept))


def test_pack_does_not_read_what_is_not_there():
    boxes, scores, ids, counts = on_gpu(clustered_case(5))
    keep = torch.tensor([[5, 1, -1, 2**40]], device="cuda")
    kept = torch.tensor([4], dtype=torch.int32, device="cuda")
    packed = pack(boxes, scores, ids, counts, keep, kept)
    assert packed[0, [1, 3, 4]].isnan().all() and torch.equal(packed[0, 2, :4], boxes[0, 1])


def test_captured_on_a_stream_and_replayed_with_other_candidates():
    cases = [clustered_case(600, 4, 20, seed=seed) for seed in range(3)]
    for seed, case in enumerate(cases):
        case[3][seed] = 10 * seed
    held = on_gpu(cases[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        diou_nms(*held, 0.45, 0.6, 300)  # whatever the first call loads
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep, kept = diou_nms(*held, 0.45, 0.6, 300)
            packed = pack(*held, keep, kept)
    for case in cases:
        for place, tensor in zip(held, case, strict=True):
            place.copy_(tensor)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        expected = diou_nms(*case, 0.45, 0.6, 300)
        assert_same((keep, kept), expected)
        assert torch.equal(packed.cpu(), pack(*case, *expected))


def test_nothing_waits_for_the_gpu():
    case = on_gpu(clustered_case(600, 4, 20))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pack(*case, *diou_nms(*case, 0.45, 0.6, 300))
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_same_every_time():
    case = on_gpu(clustered_case(20_000, 4, 2, distinct_scores=50))
    first = diou_nms(*case, 0.45, 0.6, 4000)
    for _ in range(20):
        again = diou_nms(*case, 0.45, 0.6, 4000)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu():
    case = clustered_case(600, 4, 20)
    moved = tuple(tensor.to("cuda:1") for tensor in case)
    result = diou_nms(*moved, 0.45, 0.6)
    assert result[0].device.index == 1 and torch.cuda.current_device() == 0
    assert_same(result, diou_nms(*case, 0.45, 0.6))
    with pytest.raises(RuntimeError, match="scores must be on cuda:1 like the other arguments"):
        diou_nms(moved[0], case[1].to("cuda:0"), *moved[2:], 0.45, 0.6)


def test_arguments_on_different_devices_are_named():
    boxes, scores, ids, counts = on_gpu(clustered_case(10))
    for position, name in enumerate(("scores", "class_ids", "counts"), 1):
        case = [boxes, scores, ids, counts]
        case[position] = case[position].cpu()
        with pytest.raises(RuntimeError, match=f"{name} must be on the GPU"):
            diou_nms(*case, 0.45, 0.6)


def test_opcheck():
    case = on_gpu(clustered_case(40, 2))
    torch.library.opcheck(torch.ops.yolov4_fast.diou_nms.default, (*case, 0.45, 0.6, 9))
    kept = diou_nms(*case, 0.45, 0.6, 9)
    torch.library.opcheck(torch.ops.yolov4_fast.pack.default, (*case, *kept))
