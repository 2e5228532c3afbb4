"""Assignment by hand, and the search for overlapping boxes against comparing every box with every
object.
"""

import pytest
import torch
from torchvision.ops import box_convert, box_iou

from training.assign import assign, count_positives, overlapping, shape_iou
from training.box_loss import decode_boxes
from yolov4_fast.network.layers import Head

ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0))


def head(**changes: object) -> Head:
    settings = {
        "inputs": (0,), "all_anchors": ANCHORS, "mask": (0, 1), "num_classes": 3, "stride": 8,
        "scale_x_y": 1.2, "ignore_thresh": 0.7, "iou_thresh": 0.213,
    }  # fmt: skip
    return Head(**(settings | changes))  # type: ignore[arg-type]


def two_heads(iou_thresh: float) -> tuple[Head, Head]:
    return head(iou_thresh=iou_thresh), head(mask=(2, 3), stride=16, iou_thresh=iou_thresh)


def target(image, class_id, x, y, width, height, size=64):
    """One row of targets from pixels of a square input."""
    return [image, class_id, x / size, y / size, width / size, height / size]


def random_targets(count: int, images: int, largest: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, images, (count, 1), generator=generator).float()
    center = torch.rand(count, 2, generator=generator)
    size = torch.rand(count, 2, generator=generator) * largest + 0.01
    return torch.cat([image, torch.zeros(count, 1), center, size], 1)


def test_shape_iou_by_hand():
    iou = shape_iou(torch.tensor([[10.0, 10.0]]), torch.tensor([[10.0, 10.0], [20.0, 5.0]]))
    torch.testing.assert_close(iou, torch.tensor([[1.0, 50 / 150]]))


def test_best_anchor_of_all_heads_and_those_above_the_threshold():
    # 23x27 fits anchor 1 exactly; anchors 0 and 2 have shape IoU 0.23 and 0.29; anchor 3 0.09
    targets = torch.tensor([target(1, 2, 32, 16, 23, 27)])
    fine, coarse = assign(two_heads(0.213), targets, 64, 64)
    assert fine.anchor.tolist() == [0, 1] and coarse.anchor.tolist() == [0]
    assert fine.image.tolist() == [1, 1] and fine.classes.tolist() == [2, 2]
    assert (fine.x[0].item(), fine.y[0].item()) == (4, 2)
    assert (coarse.x.item(), coarse.y.item()) == (2, 1)
    torch.testing.assert_close(coarse.boxes_cxcywh, torch.tensor([[32.0, 16.0, 23.0, 27.0]]))


@pytest.mark.parametrize(
    ("iou_thresh", "anchors"), [(1.0, [1]), (0.28, [1, 2]), (0.2, [0, 1, 2]), (0.0, [0, 1, 2, 3])]
)
def test_iou_thresh_decides_how_many_anchors_an_object_has(iou_thresh, anchors):
    targets = torch.tensor([target(0, 0, 32, 16, 23, 27)])
    fine, coarse = assign(two_heads(iou_thresh), targets, 64, 64)
    assert fine.anchor.tolist() + (coarse.anchor + 2).tolist() == anchors
    assert count_positives(two_heads(iou_thresh), targets, 64, 64) == len(anchors)


def test_best_anchor_is_positive_even_below_the_threshold():
    targets = torch.tensor([target(0, 0, 63.9, 64, 2, 2)])
    fine, coarse = assign(two_heads(1.0), targets, 64, 64)
    assert fine.anchor.tolist() == [0] and len(coarse.anchor) == 0
    assert (fine.x.item(), fine.y.item()) == (7, 7)  # on the border: the last cell


def test_of_equally_good_anchors_the_first_is_positive():
    heads = (
        head(all_anchors=((20.0, 10.0), (10.0, 20.0)), mask=(0,), iou_thresh=1.0),
        head(all_anchors=((20.0, 10.0), (10.0, 20.0)), mask=(1,), iou_thresh=1.0, stride=16),
    )
    fine, coarse = assign(heads, torch.tensor([target(0, 0, 32, 32, 10, 10)]), 64, 64)
    assert len(fine.anchor) == 1 and len(coarse.anchor) == 0


def test_an_object_without_size_has_one_positive():
    targets = torch.tensor([target(0, 0, 32, 32, 0, 0)])
    assert count_positives(two_heads(0.213), targets, 64, 64) == 1


def test_an_anchor_that_no_head_uses_is_not_the_best_of_any():
    heads = (head(mask=(0,), iou_thresh=1.0), head(mask=(2, 3), stride=16, iou_thresh=1.0))
    fine, coarse = assign(heads, torch.tensor([target(0, 0, 32, 16, 23, 27)]), 64, 64)
    assert len(fine.anchor) == 0 and coarse.anchor.tolist() == [0]


def test_an_anchor_of_two_heads_is_positive_in_both():
    heads = (head(mask=(0, 1), iou_thresh=1.0), head(mask=(1, 2), stride=16, iou_thresh=1.0))
    fine, coarse = assign(heads, torch.tensor([target(0, 0, 32, 16, 23, 27)]), 64, 64)
    assert fine.anchor.tolist() == [1] and coarse.anchor.tolist() == [0]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_count_positives_is_what_assign_gives(count):
    targets = random_targets(count, 3, 0.9, seed=count)
    positives = assign(two_heads(0.213), targets, 128, 64)
    assert count_positives(two_heads(0.213), targets, 128, 64) == sum(
        len(p.image) for p in positives
    )


def test_heads_with_different_anchors_are_refused():
    with pytest.raises(ValueError, match="must share one list of anchors"):
        assign((head(), head(all_anchors=ANCHORS[:2])), torch.zeros(0, 6), 64, 64)


def every_box_with_every_object(one: Head, raw: torch.Tensor, targets: torch.Tensor):
    """Where any predicted box overlaps an object of its image by more than the threshold."""
    batch, count, _, rows, columns = raw.shape
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    boxes = decode_boxes(
        raw[:, :, :4].permute(0, 1, 3, 4, 2).float(), one,
        torch.tensor(one.anchors)[:, None, None], torch.stack([x, y], -1),
    )  # fmt: skip
    result = torch.zeros(batch, count, rows, columns, dtype=torch.bool)
    size = torch.tensor([columns, rows, columns, rows]) * one.stride
    for image in range(batch):
        objects = targets[targets[:, 0] == image, 2:] * size
        iou = box_iou(
            *(box_convert(b, "cxcywh", "xyxy") for b in (boxes[image].view(-1, 4), objects))
        )
        result[image] = (iou > one.ignore_thresh).any(1).view(count, rows, columns)
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ignore_thresh": 0.5, "scale_x_y": 1.0},
        {"ignore_thresh": 0.2, "scale_x_y": 2.0},
        {"ignore_thresh": 0.0},
        {"new_coords": True, "scale_x_y": 2.0, "ignore_thresh": 0.5},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "largest"), [(8, 8, 0.5), (5, 9, 1.5), (1, 1, 1.0)])
def test_overlapping_finds_what_comparing_all_boxes_finds(changes, dtype, rows, columns, largest):
    one = head(**changes)
    raw = torch.randn(3, 2, 8, rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = random_targets(300, 2, largest, seed=2)  # the third picture has none
    found = overlapping(one, raw, targets)
    expected = every_box_with_every_object(one, raw, targets)
    assert expected.any() or rows == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(("further", "expected"), [(-0.1, True), (0.1, False)])
def test_overlapping_reaches_as_far_as_a_box_can(side, further, expected, scale):
    """The box that keeps most of IoU t with an object of width w whose centre is w (1 - t) / (2 t)
    away from its own just covers it: here 32 px, t = 1/2 and 16 px.
    """
    one = head(all_anchors=((64.0, 32.0),), mask=(0,), ignore_thresh=0.5, scale_x_y=scale)
    raw = torch.zeros(1, 1, 8, 16, 16)
    raw[0, 0, 0] = -30.0  # centres as far left of each cell as can be
    center = 64 - 4 * (scale - 1)  # of cell 8
    raw[0, 0, 2] = torch.log(torch.tensor(1 + 2 * further / 64))
    targets = torch.tensor([target(0, 0, center + side * (16 + further), 68, 32, 32, size=128)])
    found = overlapping(one, raw, targets)
    assert found[0, 0, 8, 8].item() is expected
    torch.testing.assert_close(found, every_box_with_every_object(one, raw, targets))


@pytest.mark.parametrize("threshold", [0.7, 1.0])
def test_overlapping_with_no_objects_or_an_unreachable_threshold(threshold):
    one, raw = head(ignore_thresh=threshold), torch.zeros(2, 2, 8, 4, 4)
    assert not overlapping(one, raw, torch.zeros(0, 6)).any()
    perfect = torch.tensor([target(0, 0, 12, 12, *ANCHORS[1], size=32)])
    assert overlapping(one, raw, perfect).sum() == (1 if threshold < 1 else 0)


@pytest.mark.parametrize("value", [1e4, -1e4, float("nan")])
def test_overlapping_takes_extreme_maps(value):
    raw = torch.full((1, 2, 8, 4, 4), value)
    assert not overlapping(head(), raw, random_targets(5, 1, 0.5, seed=3)).any()
