"""diou_nms's CUDA kernels, run on the CPU, against the CPU's operator."""

import ctypes

import numpy as np
import pytest
import torch

from yolov4_fast.ops.diou_nms import MAX_CANDIDATES, diou_nms, workspace_bytes

SEEDS = (0, 1, 2)  # orders of threads and blocks: forward, backward, random

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def clustered_case(count, batch=1, classes=3, seed=0, distinct_scores=1000, boxes_each=12) -> Case:
    """Candidates in clusters, so that many pairs lie on either side of a threshold."""
    rng = np.random.default_rng(seed)
    clusters = max(1, count // boxes_each)
    which = rng.integers(0, clusters, (batch, count))
    rows = np.arange(batch)[:, None]
    center = rng.uniform(0.1, 0.9, (batch, clusters, 2))[rows, which]
    center = center + rng.normal(0, 0.02, (batch, count, 2))
    size = rng.uniform(0.05, 0.3, (batch, clusters, 2))[rows, which]
    size = size * rng.uniform(0.7, 1.4, (batch, count, 2))
    boxes = np.concatenate((center - size / 2, center + size / 2), -1).astype(np.float32)
    scores = rng.integers(0, distinct_scores, (batch, count)).astype(np.float32) / 1000
    class_ids = rng.integers(0, classes, (batch, count), dtype=np.int32)
    counts = np.full(batch, count, dtype=np.int32)
    return tuple(map(torch.from_numpy, (boxes, scores, class_ids, counts)))


def scattered_case(count, seed=0) -> Case:
    """Small boxes of one class, few of which touch: nearly all are kept."""
    _, scores, class_ids, counts = clustered_case(count, classes=1, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(1, count, 2, generator=generator)
    return torch.cat((corner, corner + 0.01), -1), scores, class_ids, counts


def best(case: Case, numbers=None) -> tuple[Case, torch.Tensor, torch.Tensor | None]:
    """The best MAX_CANDIDATES of each image in order, their positions and their numbers."""
    boxes, scores, class_ids, counts = case
    rows = torch.arange(len(boxes))[:, None]
    order = []
    for image, count in enumerate(counts.tolist()):
        known = scores[image, : max(count, 0)].tolist()
        number = range(len(known)) if numbers is None else numbers[image].tolist()
        order.append(
            sorted(
                (i for i in range(len(known)) if known[i] == known[i]),
                key=lambda i: (-known[i], number[i]),
            )[:MAX_CANDIDATES]
        )
    counts = torch.tensor([len(image) for image in order], dtype=torch.int32)
    order = torch.tensor([image + [0] * (MAX_CANDIDATES - len(image)) for image in order])
    chosen = boxes[rows, order], scores[rows, order], class_ids[rows, order], counts
    return chosen, order, None if numbers is None else numbers[rows, order]


def assert_same(actual, expected, context="") -> None:
    for image, (a, b) in enumerate(zip(actual[0].tolist(), expected[0].tolist(), strict=True)):
        assert a == b, f"image {image} {context}"
    assert actual[1].tolist() == expected[1].tolist(), context


def test_the_number_of_candidates_is_the_documented_one(kernels):
    assert kernels().library.max_candidates() == MAX_CANDIDATES


@pytest.mark.parametrize("beta", [None, 0.0, 0.3, 0.6, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.7, 1.0])
def test_matches_the_cpu(kernels, beta, threshold):
    for count, batch in ((1, 1), (2, 3), (63, 1), (64, 2), (65, 1), (129, 2), (333, 1)):
        case = clustered_case(count, batch, seed=count)
        expected = diou_nms(*case, threshold, beta)
        for seed in SEEDS:
            actual = kernels(seed).diou_nms(*case, threshold, beta)
            assert_same(actual, expected, f"{count} candidates, seed {seed}")


@pytest.mark.parametrize("classes", [1, 2, 20, 400])
@pytest.mark.parametrize("multiprocessors", [1, 7])
def test_classes_and_grids(kernels, classes, multiprocessors):
    """Classes that span many tiles, or many that share one; blocks with much to do, or little."""
    case = clustered_case(1000, batch=3, classes=classes, seed=classes)
    case[3][:] = torch.tensor([1000, 0, 513])
    actual = kernels(2, multiprocessors).diou_nms(*case, 0.45, 0.6)
    assert_same(actual, diou_nms(*case, 0.45, 0.6))


def test_the_most_candidates(kernels):
    for classes, boxes_each in ((1, 8), (1, 200), (80, 12)):
        case = clustered_case(MAX_CANDIDATES, 2, classes, boxes_each=boxes_each)
        case[3][1] = 3000
        expected = diou_nms(*case, 0.45, 0.6)
        assert_same(kernels(2).diou_nms(*case, 0.45, 0.6), expected)


def test_scattered(kernels):
    case = scattered_case(2500)
    expected = diou_nms(*case, 0.45, 0.6)
    assert expected[1] > 2000
    assert_same(kernels(2).diou_nms(*case, 0.45, 0.6), expected)


def test_the_same_box_over_and_over(kernels):
    case = clustered_case(700, classes=2)
    case[0][:] = torch.tensor([0.2, 0.3, 0.5, 0.9])
    for threshold, beta in ((0.45, 0.6), (1.0, 0.6), (1.0, None), (0.9999999, 0.6)):
        expected = diou_nms(*case, threshold, beta)
        assert_same(kernels(2).diou_nms(*case, threshold, beta), expected)


@pytest.mark.parametrize("count", [64, 200])
def test_a_chain(kernels, count):
    """Each box overlaps its neighbours only: every other one is kept, and each waits for the one
    before.
    """
    left = torch.arange(count) * 0.3
    boxes = torch.stack((left, torch.zeros(count), left + 1, torch.ones(count)), 1)[None]
    scores = torch.arange(count, 0, -1)[None] / count
    case = boxes, scores, torch.zeros(1, count).int(), torch.tensor([count], dtype=torch.int32)
    actual = kernels(1).diou_nms(*case, 0.5, None)
    assert actual[0][0, : actual[1]].tolist() == list(range(0, count, 2))


@pytest.mark.parametrize("distinct_scores", [1, 3, 1000])
@pytest.mark.parametrize("low", [0, -(2**31), 2**31 - 2000])
def test_ties_go_by_number(kernels, distinct_scores, low):
    case = clustered_case(300, 2, distinct_scores=distinct_scores)
    case[1][0, ::2] *= -1  # -0 and 0 are equal scores
    generator = torch.Generator().manual_seed(5)
    numbers = torch.stack([torch.randperm(300, generator=generator) * 5 + low for _ in range(2)])
    for given in (None, numbers.int(), torch.full_like(numbers, low).int()):
        expected = diou_nms(*case, 0.45, 0.6, 0, given)
        for seed in SEEDS:
            assert_same(kernels(seed).diou_nms(*case, 0.45, 0.6, 0, given), expected)


@pytest.mark.parametrize(
    ("candidates", "count", "distinct_scores"),
    [
        (MAX_CANDIDATES + 1, MAX_CANDIDATES, 1000),
        (MAX_CANDIDATES + 1, MAX_CANDIDATES + 1, 1000),
        (6000, 6000, 1),
        (6000, 5500, 1000),
        (20_000, 20_000, 10_000_000),
        (20_000, 20_000, 3),
    ],
)
@pytest.mark.parametrize("numbered", [False, True])
def test_more_than_the_most_keeps_to_the_best(
    kernels, candidates, count, distinct_scores, numbered
):
    case = clustered_case(candidates, 2, 9, seed=count, distinct_scores=distinct_scores)
    case[3][:] = torch.tensor([count, 4500])
    numbers = None
    if numbered:
        generator = torch.Generator().manual_seed(count)
        numbers = torch.stack([torch.randperm(candidates, generator=generator) for _ in range(2)])
        numbers = numbers.int() - 3000
    chosen, positions, chosen_numbers = best(case, numbers)
    for seed, threshold in ((0, 0.45), (1, 0.45), (2, 1.0)):  # at 1 all are kept
        expected, kept = diou_nms(*chosen, threshold, 0.6, MAX_CANDIDATES, chosen_numbers)
        expected = torch.where(expected >= 0, positions.gather(1, expected.clamp(min=0)), -1)
        actual = kernels(seed).diou_nms(*case, threshold, 0.6, MAX_CANDIDATES, numbers)
        assert_same(actual, (expected, kept), f"seed {seed}")


def test_nan_and_infinite_scores(kernels):
    for count, nans in ((100, 30), (100, 100), (6000, 100), (6000, 5990)):
        case = clustered_case(count, seed=nans)
        scores = case[1]
        scores[0, :4] = torch.tensor([torch.inf, -torch.inf, 1e-45, -3.0])
        where = torch.randperm(count, generator=torch.Generator().manual_seed(nans))[:nans]
        scores[0, where] = torch.nan
        scores[0, where[: nans // 2]] *= -1
        chosen, positions, _ = best(case)
        expected, kept = diou_nms(*chosen, 0.45, 0.6, 90)
        expected = torch.where(expected >= 0, positions.gather(1, expected.clamp(min=0)), -1)
        assert_same(kernels(2).diou_nms(*case, 0.45, 0.6, 90), (expected, kept))


def test_counts(kernels):
    case = clustered_case(90, 7)
    case[3][:] = torch.tensor([0, 1, 47, 90, 1000, -3, 2**31 - 1])
    assert_same(kernels().diou_nms(*case, 0.45, 0.6), diou_nms(*case, 0.45, 0.6))


def test_no_candidates(kernels):
    case = clustered_case(1, 3)
    empty = case[0][:, :0], case[1][:, :0], case[2][:, :0], torch.zeros(3, dtype=torch.int32)
    keep, kept = kernels().diou_nms(*empty, 0.45, 0.6, 5)
    assert (keep == -1).all() and keep.shape == (3, 5) and kept.tolist() == [0, 0, 0]


@pytest.mark.parametrize("limit", [1, 5, 300, 5000])
def test_max_detections_are_the_best(kernels, limit):
    case = clustered_case(400, 2, classes=5)
    expected = diou_nms(*case, 0.45, 0.6, limit)
    assert_same(kernels().diou_nms(*case, 0.45, 0.6, limit), expected)


def test_class_ids_may_be_any_integers(kernels):
    boxes, scores, ids, counts = clustered_case(300, classes=6)
    names = torch.tensor([-(2**31), -1, 0, 7, 70_000, 2**31 - 1], dtype=torch.int32)
    case = boxes, scores, names[ids.long()], counts
    assert_same(kernels().diou_nms(*case, 0.45, 0.6), diou_nms(*case, 0.45, 0.6))


@pytest.mark.parametrize("beta", [None, 0.6, 1.0])
@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6])
def test_pairs_that_straddle_the_threshold(kernels, beta, threshold):
    """Pairs whose overlap is at every distance from the threshold, down to none."""
    first = torch.tensor([0.25, 0.25, 0.75, 0.5])
    low, high = 0.0, 0.5
    shifts = []
    for _ in range(60):
        middle = (low + high) / 2
        shifts.append(middle)
        boxes = torch.stack((first, first + torch.tensor([middle, 0.0, middle, 0.0])))[None]
        case = boxes, torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2).int(), torch.tensor([2]).int()
        low, high = (low, middle) if diou_nms(*case, threshold, beta)[1] == 2 else (middle, high)
    count = 2 * len(shifts)
    offsets = torch.tensor([shift for shift in shifts for shift in (0.0, shift)])
    boxes = first + offsets[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    # A class for each pair.
    classes = torch.arange(count) // 2
    case = (
        boxes[None],
        torch.linspace(1, 0.5, count)[None],
        classes[None].int(),
        torch.tensor([count], dtype=torch.int32),
    )
    expected = diou_nms(*case, threshold, beta)
    assert count // 2 < int(expected[1]) < count
    assert_same(kernels().diou_nms(*case, threshold, beta), expected)


@pytest.mark.parametrize(
    "scale", [0.0, 1e-25, 3e-22, 1e-21, 1e-18, 1e-10, 1e3, 1e15, 1e18, 1e19, 1e20, 3e37]
)
@pytest.mark.parametrize("beta", [None, 0.5, 0.6, 4.0])
def test_boxes_of_any_size(kernels, scale, beta):
    """Areas that underflow or overflow in single precision are decided as the CPU decides them."""
    boxes, scores, ids, counts = clustered_case(400, classes=2)
    for stretch in ([1, 1, 1, 1], [1, 1e-15, 1, 1e-15], [1, 1e-30, 1, 1e-30]):
        case = (boxes * torch.tensor(stretch) * scale), scores, ids, counts
        expected = diou_nms(*case, 0.45, beta)
        assert_same(kernels().diou_nms(*case, 0.45, beta), expected)


@pytest.mark.parametrize("beta", [0.05, 0.2, 8.0])
def test_exponents_out_of_the_common(kernels, beta):
    """Boxes of one centre but for roundings, which a small exponent magnifies."""
    rng = np.random.default_rng(3)
    _, scores, ids, counts = clustered_case(300, classes=30)
    half = rng.uniform(0.03, 0.25, (1, 300, 2))
    center = np.array([0.001, 0.002])
    boxes = torch.from_numpy(np.concatenate((center - half, center + half), -1)).float()
    for threshold in (0.01, 0.05, 0.1, 0.2, 0.45):
        expected = diou_nms(boxes, scores, ids, counts, threshold, beta)
        actual = kernels().diou_nms(boxes, scores, ids, counts, threshold, beta)
        assert_same(actual, expected)


def test_boxes_that_are_none(kernels):
    """NaN, infinite and inverted boxes."""
    case = clustered_case(200, classes=2)
    boxes = case[0]
    boxes[0, ::7, 1] = torch.nan
    boxes[0, ::11, 2] = torch.inf
    boxes[0, ::13, 0] = -torch.inf
    boxes[0, ::17] = boxes[0, ::17][:, [2, 3, 0, 1]]
    for beta in (None, 0.6):
        expected = diou_nms(*case, 0.45, beta)
        assert_same(kernels().diou_nms(*case, 0.45, beta), expected)


@pytest.mark.parametrize("candidates", [0, 1, 64, 65, 1000, 4095, 4096, 4097, 8192, 10**6])
def test_the_workspace_is_as_large_as_python_says(library, candidates: int) -> None:
    for batch in (1, 3):
        there = library.workspace_bytes(ctypes.c_int64(batch), ctypes.c_int64(candidates))
        assert there == batch * workspace_bytes(candidates)
