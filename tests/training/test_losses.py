"""Box losses against torchvision and finite differences; assignment and loss by hand."""

import pytest
import torch
from torchvision.ops import (
    box_convert,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from training.assign import assign, shape_iou
from training.losses import LossConfig, box_loss, decode_boxes, detection_loss, ignored, pad_boxes
from yolov4_fast.network.layers import Head

ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0))


def head(**changes: object) -> Head:
    settings = {
        "inputs": (0,), "all_anchors": ANCHORS, "mask": (0, 1), "num_classes": 3, "stride": 8,
        "scale_x_y": 1.2, "ignore_thresh": 0.7, "iou_thresh": 0.213,
    }  # fmt: skip
    return Head(**(settings | changes))  # type: ignore[arg-type]


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60 + 20
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40 + 4
    return torch.cat([center, size], 1)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("giou", generalized_box_iou_loss),
        ("diou", distance_box_iou_loss),
        ("ciou", complete_box_iou_loss),
    ],
)
def test_box_losses_and_gradients_equal_torchvision(kind, reference):
    predicted, target = random_boxes(200, 0), random_boxes(200, 1)
    mine, other = predicted.clone().requires_grad_(), predicted.clone().requires_grad_()
    loss = box_loss(mine, target, kind)
    expected = reference(
        box_convert(other, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy")
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_box_loss_gradients_equal_finite_differences(kind):
    target = random_boxes(20, 3)
    predicted = (target + torch.randn_like(target)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: box_loss(p, target, kind), (predicted,))


def test_box_loss_of_equal_and_of_distant_boxes():
    box = torch.tensor([[50.0, 50.0, 20.0, 10.0]])
    far = torch.tensor([[5050.0, 50.0, 20.0, 10.0]])
    for kind in ("iou", "giou", "diou", "ciou"):
        assert box_loss(box, box, kind).item() == pytest.approx(0, abs=1e-6)
    assert box_loss(far, box, "iou").item() == pytest.approx(1)
    assert box_loss(far, box, "giou").item() == pytest.approx(2, abs=0.01)
    assert box_loss(far, box, "ciou").item() == pytest.approx(2, abs=0.01)


def test_shape_iou_by_hand():
    iou = shape_iou(torch.tensor([[10.0, 10.0]]), torch.tensor([[10.0, 10.0], [20.0, 5.0]]))
    torch.testing.assert_close(iou, torch.tensor([[1.0, 50 / 150]]))


def test_assign_takes_best_anchor_of_all_heads_and_those_above_the_threshold():
    heads = (head(), head(mask=(2, 3), stride=16))
    # 23x27 fits anchor 1 exactly; anchors 0 and 2 have shape IoU 0.23 and 0.29; anchor 3 0.09
    targets = torch.tensor([[1.0, 2.0, 0.5, 0.25, 23 / 64, 27 / 64]])
    fine, coarse = assign(heads, targets, 64, 64)
    assert fine.anchor.tolist() == [0, 1] and coarse.anchor.tolist() == [0]
    assert fine.image.tolist() == [1, 1] and fine.classes.tolist() == [2, 2]
    assert (fine.x[0].item(), fine.y[0].item()) == (4, 2)
    assert (coarse.x.item(), coarse.y.item()) == (2, 1)
    torch.testing.assert_close(coarse.boxes_cxcywh, torch.tensor([[32.0, 16.0, 23.0, 27.0]]))


def test_best_anchor_is_positive_even_below_the_threshold():
    heads = (head(iou_thresh=1.0), head(mask=(2, 3), stride=16, iou_thresh=1.0))
    targets = torch.tensor([[0.0, 0.0, 0.999, 1.0, 2 / 64, 2 / 64]])
    fine, coarse = assign(heads, targets, 64, 64)
    assert fine.anchor.tolist() == [0] and len(coarse.anchor) == 0
    assert (fine.x.item(), fine.y.item()) == (7, 7)  # on the border: the last cell


def test_no_objects():
    heads = (head(), head(mask=(2, 3), stride=16))
    maps = [torch.zeros(2, 16, 8, 8, requires_grad=True), torch.zeros(2, 16, 4, 4)]
    losses = detection_loss(heads, maps, torch.zeros(0, 6), LossConfig())
    losses.total.backward()
    assert losses.box == 0 and losses.classes == 0
    cells = 2 * 2 * (64 + 16)
    assert losses.objectness.item() == pytest.approx(cells * 0.693147, rel=1e-4)
    assert maps[0].grad[:, 4].abs().sum() > 0 and maps[0].grad[:, 0].abs().sum() == 0


def test_decode_boxes_by_hand():
    raw = torch.tensor([0.0, 0.0, 0.0, 0.6931472])
    box = decode_boxes(raw, head(), torch.tensor([10.0, 14.0]), torch.tensor([3, 5]))
    torch.testing.assert_close(box, torch.tensor([28.0, 44.0, 10.0, 28.0]))
    box = decode_boxes(
        torch.tensor([0.5, 0.25, 0.5, 1.0]),
        head(new_coords=True, scale_x_y=2.0),
        torch.tensor([10.0, 14.0]),
        torch.tensor([3, 5]),
    )
    torch.testing.assert_close(box, torch.tensor([28.0, 40.0, 10.0, 56.0]))


def test_perfect_prediction_has_almost_no_loss_and_overlapping_cells_are_ignored():
    one = head(mask=(1,), all_anchors=ANCHORS, iou_thresh=1.0, scale_x_y=1.0)
    targets = torch.tensor([[0.0, 1.0, 20.4 / 64, 28.4 / 64, 23 / 64, 27 / 64]])
    raw = torch.full((1, 8, 8, 8), -12.0)
    raw[0, :4] = 0.0
    raw[0, :2, 3, 2] = torch.logit(torch.tensor([20.4 / 8 % 1, 28.4 / 8 % 1]))
    raw[0, 4, 3, 2] = 12.0
    raw[0, 6, 3, 2] = 12.0
    raw[0, 4, 3, 3] = 12.0  # a neighbour that says object: IoU with it decides whether it counts
    raw[0, 0, 3, 3] = -12.0  # at its left edge, 3.6 px from the object: IoU above .7
    raw[0, 1, 3, 3] = raw[0, 1, 3, 2]
    losses = detection_loss([one], [raw], targets, LossConfig())
    assert losses.total.item() < 1e-3
    mask = ignored(one, raw.view(1, 1, 8, 8, 8), pad_boxes(targets, 1, 64, 64))
    assert mask[0, 0, 3, 3] == 1 and mask.sum() == 2  # itself and the neighbour


def test_two_classes_in_one_place_are_both_right():
    one = head(mask=(1,), iou_thresh=1.0)
    row = [0.5, 0.5, 23 / 64, 27 / 64]
    targets = torch.tensor([[0.0, 0.0, *row], [0.0, 2.0, *row]])
    raw = torch.zeros(1, 8, 8, 8)
    raw[0, 5:, 4, 4] = torch.tensor([20.0, -20.0, 20.0])
    assert detection_loss([one], [raw], targets, LossConfig()).classes.item() < 1e-6


def test_pad_boxes_keeps_images_apart():
    targets = torch.tensor(
        [[2, 0, 0.5, 0.5, 0.5, 0.5], [0, 0, 0.5, 0.5, 1.0, 1.0], [2, 1, 0, 0, 1, 1]]
    )
    boxes = pad_boxes(targets, 3, 100, 50)
    assert boxes.shape == (3, 2, 4)
    torch.testing.assert_close(boxes[2, 0], torch.tensor([25.0, 12.5, 75.0, 37.5]))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.0, 0.0, 100.0, 50.0]))
    assert boxes[1].abs().sum() == 0 and boxes[0, 1].abs().sum() == 0


def test_unknown_box_loss_is_refused():
    with pytest.raises(ValueError, match="'xiou' is not one of iou, giou, diou, ciou"):
        LossConfig(box_loss="xiou")
