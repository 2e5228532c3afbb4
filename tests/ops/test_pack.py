"""pack, each implementation against a loop over rows."""

import pytest
import torch

from yolov4_fast.ops.pack import pack

IMPLEMENTATIONS = ("extension", "reference")


def random_case(candidates, detections, kept, seed=0):
    """Arguments of `pack`; what lies past the kept ones is -1, as `diou_nms` leaves it."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(kept)
    boxes = torch.randn(batch, candidates, 4, generator=generator)
    scores = torch.rand(batch, candidates, generator=generator)
    class_ids = torch.randint(0, 80, (batch, candidates), generator=generator, dtype=torch.int32)
    counts = torch.randint(0, 100_000, (batch,), generator=generator, dtype=torch.int32)
    keep = torch.full((batch, detections), -1)
    for image, count in enumerate(kept):
        keep[image, :count] = torch.randperm(candidates, generator=generator)[:count]
    return boxes, scores, class_ids, counts, keep, torch.tensor(kept, dtype=torch.int32)


def rows_of(boxes, scores, class_ids, counts, keep, kept):
    rows = []
    for b in range(len(kept)):
        image = [[float(kept[b]), float(counts[b]), 0.0, 0.0, 0.0, 0.0]]
        for d in range(keep.shape[1]):
            if d < kept[b]:
                i = keep[b, d]
                image.append([*boxes[b, i].tolist(), float(scores[b, i]), float(class_ids[b, i])])
            else:
                image.append([0.0] * 6)
        rows.append(image)
    return rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("candidates", "detections", "kept"),
    [(1, 1, [1]), (5, 5, [0, 5, 3]), (100, 7, [7, 2]), (3, 40, [3, 1, 0, 2]), (300, 300, [211])],
)
def test_matches_the_definition(implementation, candidates, detections, kept):
    case = random_case(candidates, detections, kept)
    packed = pack(*case, implementation=implementation)
    assert packed.shape == (len(kept), detections + 1, 6) and packed.dtype == torch.float32
    assert packed.tolist() == rows_of(*case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "candidates"), [(0, 4), (3, 0), (0, 0)])
def test_empty(implementation, batch, candidates):
    case = random_case(candidates, 0, [0] * batch)
    packed = pack(*case, implementation=implementation)
    assert packed.tolist() == rows_of(*case) and packed.shape == (batch, 1, 6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_whole_numbers_are_exact(implementation):
    boxes, scores, class_ids, counts, keep, kept = random_case(3, 3, [3])
    class_ids[0] = torch.tensor([2**24, 2**24 - 1, -5])
    counts[0] = 2**24 - 3
    packed = pack(boxes, scores, class_ids, counts, keep, kept, implementation=implementation)
    assert packed[0, 1:, 5].tolist() == class_ids[0, keep[0]].tolist()
    assert packed[0, 0].tolist() == [3, 2**24 - 3, 0, 0, 0, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_change_the_result(implementation):
    boxes, scores, class_ids, counts, keep, kept = random_case(30, 9, [9, 4])
    views = (
        boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        scores.T.contiguous().T,
        class_ids.T.contiguous().T,
        counts,
        keep.T.contiguous().T,
        kept,
    )
    expected = pack(boxes, scores, class_ids, counts, keep, kept)
    assert torch.equal(pack(*views, implementation=implementation), expected)


@pytest.mark.parametrize(
    ("position", "value", "name", "words"),
    [
        (0, torch.zeros(2, 5), "boxes", r"must be \[batch, candidates, 4\], not \[2, 5\]"),
        (1, torch.zeros(2, 6), "scores", r"must be \[2, 5\] torch.float32, not \[2, 6\]"),
        (2, torch.zeros(2, 5, dtype=torch.int64), "class_ids", ".*int64"),
        (3, torch.zeros(3, dtype=torch.int32), "counts", r"must be \[2\]"),
        (4, torch.zeros(2, dtype=torch.int64), "keep", r"must be \[2, detections\], not \[2\]"),
        (4, torch.zeros(2, 4, dtype=torch.int32), "keep", ".*int32"),
        (5, torch.zeros(2), "kept", ".*not .*float32"),
    ],
)
def test_bad_arguments_are_named(position, value, name, words):
    arguments = list(random_case(5, 4, [2, 4]))
    arguments[position] = value
    with pytest.raises(ValueError, match=f"{name} {words}"):
        pack(*arguments)
    with pytest.raises(RuntimeError, match=f"{name} must be"):  # called past the wrapper
        torch.ops.yolov4_fast.pack(*arguments)


@pytest.mark.parametrize(("name", "value"), [("keep", 5), ("keep", -1), ("kept", 5), ("kept", -2)])
def test_what_points_outside_is_refused(name, value):
    boxes, scores, class_ids, counts, keep, kept = random_case(5, 4, [2, 4])
    {"keep": keep[1, 1:], "kept": kept[1:]}[name][0] = value
    with pytest.raises(RuntimeError, match=rf"{name} must be in 0\.\.4.*not {value} of image 1"):
        pack(boxes, scores, class_ids, counts, keep, kept)


def test_opcheck():
    torch.library.opcheck(torch.ops.yolov4_fast.pack.default, random_case(40, 9, [9, 0, 4]))
