"""diou_nms, each implementation against a loop over pairs, and against torchvision."""

import numpy as np
import pytest
import torch
import torchvision

from yolov4_fast.ops import diou_nms

IMPLEMENTATIONS = ("extension", "reference")


def clustered_boxes(count, seed=0, batch=1):
    """Boxes [batch, count, 4] in clusters, so that many pairs lie on either side of a threshold."""
    rng = np.random.default_rng(seed)
    clusters = max(1, count // 12)
    center = rng.uniform(0.1, 0.9, (batch, clusters, 2))
    size = rng.uniform(0.05, 0.3, (batch, clusters, 2))
    which = rng.integers(0, clusters, (batch, count))
    rows = np.arange(batch)[:, None]
    center = center[rows, which] + rng.normal(0, 0.03, (batch, count, 2))
    size = size[rows, which] * rng.uniform(0.7, 1.4, (batch, count, 2))
    return torch.from_numpy(np.concatenate((center - size / 2, center + size / 2), -1)).float()


def random_case(count, batch=1, classes=3, seed=0, distinct_scores=1000):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, distinct_scores, (batch, count), generator=generator) / 1000
    class_ids = torch.randint(0, classes, (batch, count), generator=generator, dtype=torch.int32)
    counts = torch.full((batch,), count, dtype=torch.int32)
    return clustered_boxes(count, seed, batch), scores, class_ids, counts


def definition(boxes, scores, class_ids, threshold, beta):
    """Numbers of the boxes of one image that are kept, in float64, pair by pair."""
    boxes, kept = boxes.double().tolist(), []
    for i in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        if all(
            class_ids[i] != class_ids[k] or overlap(boxes[k], boxes[i], beta) <= threshold
            for k in kept
        ):
            kept.append(i)
    return kept


def overlap(a, b, beta):
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    if shared == 0:
        return -1
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    if beta is None:
        return shared / union
    d2 = (a[0] + a[2] - b[0] - b[2]) ** 2 / 4 + (a[1] + a[3] - b[1] - b[3]) ** 2 / 4
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    return shared / union - (d2 / c2) ** beta


def kept_of(result):
    keep, kept = result
    assert keep.dtype == torch.int64 and kept.dtype == torch.int32
    for row, count in zip(keep, kept, strict=True):
        assert (row[count:] == -1).all() and (row[:count] >= 0).all()
    return [row[:count].tolist() for row, count in zip(keep, kept, strict=True)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [None, 1.0, 0.6, 0.0])
@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.7, 1.0])
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (63, 2), (64, 1), (65, 3), (200, 1)])
def test_matches_the_definition(implementation, beta, threshold, count, batch):
    case = random_case(count, batch)
    result = diou_nms(*case, threshold, beta, implementation=implementation)
    assert result[0].shape == (batch, count)
    boxes, scores, class_ids, _ = case
    assert kept_of(result) == [
        definition(boxes[b], scores[b], class_ids[b], threshold, beta) for b in range(batch)
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [None, 1.0, 0.6])
@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.6])
def test_pairs_that_straddle_the_threshold(implementation, beta, threshold):
    """The shift at which a pair just stays and the next representable one at which it just goes."""
    first = torch.tensor([0.25, 0.25, 0.75, 0.5])

    def shifted(x):
        return first + torch.tensor([x, 0.0, x, 0.0])

    def survives(x):
        return overlap(first.tolist(), shifted(x).tolist(), beta) <= threshold

    low, high = 0.0, 0.5  # goes at low, stays at high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if survives(middle) else (middle, high)
    assert not torch.equal(shifted(low), shifted(high))
    scores, ids = torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.int32)
    for x, expected in ((low, [0]), (high, [0, 1])):
        boxes = torch.stack((first, shifted(x)))[None]
        result = diou_nms(
            boxes, scores, ids, torch.tensor([2], dtype=torch.int32), threshold, beta,
            implementation=implementation,
        )  # fmt: skip
        assert kept_of(result) == [expected]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("beta", "threshold"), [(None, 0.5), (1.0, 0.5 - 1 / 32)])
def test_overlap_equal_to_the_threshold_stays(implementation, beta, threshold):
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 1, 0.5]]])  # IoU 1/2, d^2 1/16, c^2 2, all exact
    arguments = boxes, torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, dtype=torch.int32)
    counts = torch.tensor([2], dtype=torch.int32)
    for limit, expected in ((threshold, [0, 1]), (float(np.nextafter(threshold, 0)), [0])):
        result = diou_nms(*arguments, counts, limit, beta, implementation=implementation)
        assert kept_of(result) == [expected]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_distance_spares_a_neighbour_that_iou_drops(implementation):
    boxes = torch.tensor([[[0.0, 0, 0.4, 0.4], [0.12, 0, 0.52, 0.4], [0.0, 0, 0.38, 0.4]]])
    scores, ids = torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int32)
    counts = torch.tensor([3], dtype=torch.int32)
    plain = diou_nms(boxes, scores, ids, counts, 0.45, None, implementation=implementation)
    distance = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, implementation=implementation)
    assert kept_of(plain) == [[0]] and kept_of(distance) == [[0, 1]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("distinct_scores", [1, 3])
def test_ties_go_to_the_lower_number(implementation, distinct_scores):
    boxes, scores, ids, counts = random_case(150, distinct_scores=distinct_scores)
    scores[0, ::2] *= -1  # -0 and 0 are equal scores
    result = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, implementation=implementation)
    assert kept_of(result) == [definition(boxes[0], scores[0], ids[0], 0.45, 0.6)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("distinct_scores", [1, 4, 1000])
@pytest.mark.parametrize("low", [0, -(2**31)])
def test_numbers_stand_for_the_position(implementation, distinct_scores, low):
    """Candidates in any order of storage, with the numbers they had, give the same boxes."""
    boxes, scores, ids, counts = random_case(150, batch=3, distinct_scores=distinct_scores)
    expected = kept_of(diou_nms(boxes, scores, ids, counts, 0.45, 0.6))
    rows = torch.arange(3)[:, None]
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(150, generator=generator) for _ in range(3)])
    shuffled = (boxes[rows, places], scores[rows, places], ids[rows, places], counts)
    numbers = (low + places * 7).int()
    result = diou_nms(*shuffled, 0.45, 0.6, 0, numbers, implementation=implementation)
    assert [places[b][row].tolist() for b, row in enumerate(kept_of(result))] == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_numbers_go_by_position(implementation):
    boxes, scores, ids, counts = random_case(120, distinct_scores=2)
    numbers = torch.zeros(1, 120, dtype=torch.int32)
    result = diou_nms(
        boxes, scores, ids, counts, 0.45, 0.6, 0, numbers, implementation=implementation
    )
    assert kept_of(result) == [definition(boxes[0], scores[0], ids[0], 0.45, 0.6)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_counted_candidates(implementation):
    boxes, scores, ids, _ = random_case(90, batch=4)
    counts = torch.tensor([0, 1, 47, 1000], dtype=torch.int32)  # the last says "more than fit"
    result = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, implementation=implementation)
    assert kept_of(result) == [
        definition(boxes[b, :n], scores[b, :n], ids[b, :n], 0.45, 0.6)
        for b, n in enumerate([0, 1, 47, 90])
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("limit", [1, 5, 300])
def test_max_detections_are_the_best(implementation, limit):
    case = random_case(120, batch=2, classes=5)
    everything = kept_of(diou_nms(*case, 0.45, 0.6, implementation=implementation))
    result = diou_nms(*case, 0.45, 0.6, limit, implementation=implementation)
    assert result[0].shape == (2, limit)
    assert kept_of(result) == [image[:limit] for image in everything]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(implementation, shape):
    batch, count = shape
    case = random_case(count, batch) if count else None
    boxes, scores, ids, counts = case or (
        torch.zeros(batch, 0, 4),
        torch.zeros(batch, 0),
        torch.zeros(batch, 0, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32),
    )
    keep, kept = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, implementation=implementation)
    assert keep.shape == shape and kept.tolist() == [0] * batch
    keep, _ = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, 7, implementation=implementation)
    assert keep.shape == (batch, 7) and (keep == -1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [None, 0.6])
@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_boxes_without_area(implementation, beta, size):
    """Points, lines and, in float32, areas that underflow: only real overlap suppresses."""
    point = [0.0, 0.0, size, size]
    boxes = torch.tensor([[point, point, [0, 0, 1, 0], [0, 0, 1, 0], [2, 2, 1, 1], [0, 0, 1, 1]]])
    scores = torch.arange(6, 0, -1)[None] / 10
    ids, counts = torch.zeros(1, 6, dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    result = diou_nms(boxes, scores, ids, counts, 0.45, beta, implementation=implementation)
    assert kept_of(result) == [[0, 1, 2, 3, 4, 5] if size == 0 else [0, 2, 3, 4, 5]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_score_is_never_kept(implementation):
    boxes, scores, ids, counts = random_case(20)
    scores[0, [0, 7]] = torch.nan
    known = [i for i in range(20) if i not in (0, 7)]
    expected = definition(boxes[0, known], scores[0, known], ids[0, known], 0.45, 0.6)
    result = diou_nms(boxes, scores, ids, counts, 0.45, 0.6, implementation=implementation)
    assert kept_of(result) == [[known[i] for i in expected]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_class_ids_may_be_any_integers(implementation):
    boxes, scores, ids, counts = random_case(150, classes=6)
    names = torch.tensor([-(2**31), -1, 0, 7, 70_000, 2**31 - 1], dtype=torch.int32)
    small = diou_nms(boxes, scores, ids, counts, 0.45, 0.6)
    large = diou_nms(
        boxes, scores, names[ids.long()], counts, 0.45, 0.6, implementation=implementation
    )
    assert kept_of(small) == kept_of(large)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("threshold", [0.2, 0.45, 0.7])
def test_plain_iou_agrees_with_torchvision(implementation, threshold):
    boxes, scores, ids, counts = random_case(700, classes=4, seed=3)
    scores = torch.rand(1, 700, generator=torch.Generator().manual_seed(3))
    one_class = torch.zeros_like(ids)
    for classes, expected in (
        (one_class, torchvision.ops.nms(boxes[0], scores[0], threshold)),
        (ids, torchvision.ops.batched_nms(boxes[0], scores[0], ids[0], threshold)),
    ):
        result = diou_nms(
            boxes, scores, classes, counts, threshold, None, implementation=implementation
        )
        assert kept_of(result) == [expected.tolist()]


def test_strides_and_threads_do_not_change_the_result():
    boxes, scores, ids, counts = random_case(400, batch=3, classes=20)
    expected = kept_of(diou_nms(boxes, scores, ids, counts, 0.45, 0.6))
    views = (
        boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        scores.T.contiguous().T,
        ids.T.contiguous().T,
    )
    before = torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        result = diou_nms(*views, counts, 0.45, 0.6)
        torch.set_num_threads(before)
        assert kept_of(result) == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("boxes", torch.zeros(2, 5), r"\[2, 5\]"),
        ("boxes", torch.zeros(2, 5, 4).double(), "float64"),
        ("scores", torch.zeros(2, 4), r"scores must be \[2, 5\]"),
        ("class_ids", torch.zeros(2, 5, dtype=torch.int64), "int64"),
        ("counts", torch.zeros(1, dtype=torch.int32), r"counts must be \[2\]"),
        ("iou_threshold", 45, "45"),
        ("beta", -1.0, "-1"),
        ("beta", float("inf"), "inf"),
        ("max_detections", -3, "-3"),
        ("numbers", torch.zeros(2, 4, dtype=torch.int32), r"numbers must be \[2, 5\]"),
        ("numbers", torch.zeros(2, 5, dtype=torch.int64), "int64"),
        ("implementation", "gpu", "gpu"),
    ],
)
def test_bad_arguments_are_named(name, value, words):
    boxes, scores, class_ids, counts = random_case(5, batch=2)
    arguments = {
        "boxes": boxes, "scores": scores, "class_ids": class_ids, "counts": counts,
        "iou_threshold": 0.45, "beta": 0.6,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        diou_nms(**(arguments | {name: value}))


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 5, 3), r"\[2, 5, 3\]"),
        (1, torch.zeros(2, 6), r"scores must be \[2, 5\], not \[2, 6\]"),
        (2, torch.zeros(2, 5), "class_ids must be Int, not Float"),
        (4, 1.5, "not 1.5"),
        (7, torch.zeros(2, 5), "numbers must be Int, not Float"),
        (7, torch.zeros(2, 6, dtype=torch.int32), r"numbers must be \[2, 5\], not \[2, 6\]"),
    ],
)
def test_the_operator_itself_refuses_what_does_not_fit(position, value, words):
    arguments = [*random_case(5, batch=2), 0.45, 0.6, 0, None]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.yolov4_fast.diou_nms(*arguments)


@pytest.mark.parametrize("max_detections", [0, 9])
@pytest.mark.parametrize("beta", [None, 0.6])
@pytest.mark.parametrize("numbered", [False, True])
def test_opcheck(beta, max_detections, numbered):
    numbers = torch.arange(80, 0, -1, dtype=torch.int32).reshape(2, 40) if numbered else None
    arguments = (*random_case(40, batch=2), 0.45, beta, max_detections, numbers)
    torch.library.opcheck(torch.ops.yolov4_fast.diou_nms.default, arguments)
