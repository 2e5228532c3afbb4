"""Box losses against torchvision, the papers' formulas written out, finite differences and values
worked by hand.
"""

from math import asin, atan, exp, log, pi, sin, sqrt

import pytest
import torch
from torchvision.ops import (
    box_convert,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from training.box_loss import (
    BOX_LOSSES,
    box_loss,
    decode_boxes,
    encode_boxes,
    plain_iou,
    squared_error,
)
from yolov4_fast.network.layers import Head

OF_BOXES = BOX_LOSSES[1:]
SIZE = (64.0, 64.0)


def head(**changes: object) -> Head:
    settings = {
        "inputs": (0,), "all_anchors": ((10.0, 14.0), (23.0, 27.0)), "mask": (0, 1),
        "num_classes": 3, "stride": 8, "scale_x_y": 1.2,
    }  # fmt: skip
    return Head(**(settings | changes))  # type: ignore[arg-type]


def random_boxes(count: int, seed: int) -> torch.Tensor:
    """[count, 4] cxcywh float64, many of them overlapping those of another seed."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60 + 20
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40 + 4
    return torch.cat([center, size], 1)


def gradient(predicted, target, kind, **settings):
    predicted = predicted.clone().requires_grad_()
    box_loss(predicted, target, kind, **settings).sum().backward()
    return predicted.grad


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("giou", generalized_box_iou_loss),
        ("diou", distance_box_iou_loss),
        ("ciou", complete_box_iou_loss),
    ],
)
def test_values_and_gradients_equal_torchvision(kind, reference):
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


@pytest.mark.parametrize("apart", [0, 200])
@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "siou"])
def test_gradients_equal_finite_differences(kind, apart):
    target = random_boxes(20, 3)
    shift = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    predicted = (target + shift + torch.tensor([apart, 0, 0, 0])).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: box_loss(p, target, kind), (predicted,))


def test_gradient_of_sse_equals_finite_differences():
    raw = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    cells = torch.randint(0, 8, (20, 2), generator=torch.Generator().manual_seed(6))
    anchors = torch.tensor([[10.0, 14.0]], dtype=torch.float64).expand(20, 2)
    target = torch.cat([cells * 8 + 3.0, anchors * 1.5], 1)
    for one in (head(), head(new_coords=True, scale_x_y=2.0)):

        def loss(raw, one=one):
            return squared_error(raw, target, one, anchors, cells, SIZE)

        assert torch.autograd.gradcheck(loss, (raw.clone().requires_grad_(),))


def test_gradient_of_ciou_is_that_of_diou_and_the_papers_formula():
    """Arctangents and their derivatives written out, alpha held constant."""
    predicted, target = random_boxes(100, 7), random_boxes(100, 8)
    w, h = predicted[:, 2], predicted[:, 3]
    difference = (target[:, 2] / target[:, 3]).atan() - (w / h).atan()
    v = 4 / pi**2 * difference**2
    alpha = v / (box_loss(predicted, target, "iou") + v)
    aspect = gradient(predicted, target, "ciou") - gradient(predicted, target, "diou")
    expected = -8 / pi**2 * (alpha * difference / (w**2 + h**2))[:, None]
    torch.testing.assert_close(aspect[:, 2:], expected * torch.stack([h, -w], 1))
    assert aspect[:, :2].abs().max() < 1e-12


def test_the_papers_gradient_of_ciou_has_no_denominator_in_units_of_the_input():
    predicted, target = random_boxes(100, 7), random_boxes(100, 8)
    width, height = 416.0, 320.0
    w, h = predicted[:, 2], predicted[:, 3]
    exact = gradient(predicted, target, "ciou") - gradient(predicted, target, "diou")
    paper = gradient(predicted, target, "ciou", ciou_gradient="paper", size=(width, height))
    paper = paper - gradient(predicted, target, "diou")
    factor = (w / width) ** 2 + (h / height) ** 2
    torch.testing.assert_close(paper, exact * factor[:, None])
    same = box_loss(predicted, target, "ciou", ciou_gradient="paper", size=(width, height))
    torch.testing.assert_close(same, box_loss(predicted, target, "ciou"), rtol=0, atol=0)


def test_a_step_along_the_gradient_of_ciou_brings_the_proportions_closer():
    target = torch.tensor([[50.0, 50.0, 40.0, 10.0]])
    predicted = torch.tensor([[50.0, 50.0, 10.0, 40.0]])
    for mode in ("exact", "paper"):
        slope = gradient(predicted, target, "ciou", ciou_gradient=mode, size=(100.0, 100.0))
        slope = slope - gradient(predicted, target, "diou")
        assert slope[0, 2] < 0 < slope[0, 3]  # wider and lower


def siou_as_printed(p, t):
    """The paper's sequence of formulas for one pair, with its arcsine."""
    dx, dy = t[0] - p[0], t[1] - p[1]
    sigma = sqrt(dx**2 + dy**2)
    angle = 1 - 2 * sin(asin(abs(dy) / sigma) - pi / 4) ** 2
    low = [min(p[i] - p[i + 2] / 2, t[i] - t[i + 2] / 2) for i in (0, 1)]
    high = [max(p[i] + p[i + 2] / 2, t[i] + t[i + 2] / 2) for i in (0, 1)]
    gamma = 2 - angle
    distance = sum(
        1 - exp(-gamma * (d / (b - a)) ** 2) for d, a, b in zip((dx, dy), low, high, strict=True)
    )
    omega = [abs(p[i] - t[i]) / max(p[i], t[i]) for i in (2, 3)]
    shape = sum((1 - exp(-o)) ** 4 for o in omega)
    return (distance + shape) / 2


def test_siou_equals_the_papers_formulas():
    predicted, target = random_boxes(50, 9), random_boxes(50, 10)
    penalty = box_loss(predicted, target, "siou") - box_loss(predicted, target, "iou")
    expected = [
        siou_as_printed(p, t) for p, t in zip(predicted.tolist(), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(penalty, torch.tensor(expected, dtype=torch.float64))


def test_siou_by_hand():
    # (3, 4) apart: sin 2a = 2 * .6 * .8 = .96; enclosing 11 x 12; IoU = 20 / 108
    one = torch.tensor([[10.0, 10.0, 8.0, 8.0]])
    other = torch.tensor([[13.0, 14.0, 8.0, 8.0]])
    distance = 2 - exp(-1.04 * 9 / 121) - exp(-1.04 / 9)
    expected = 1 - 20 / 108 + distance / 2
    assert box_loss(one, other, "siou").item() == pytest.approx(expected, abs=1e-6)
    # the same centre, half the width: omega = 1/2, IoU = 1/2
    narrow = torch.tensor([[10.0, 10.0, 4.0, 8.0]])
    expected = 0.5 + (1 - exp(-0.5)) ** 4 / 2
    assert box_loss(narrow, one, "siou").item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", OF_BOXES)
def test_equal_and_distant_boxes(kind):
    box = torch.tensor([[50.0, 50.0, 20.0, 10.0]])
    far = torch.tensor([[5050.0, 50.0, 20.0, 10.0]])
    assert box_loss(box, box, kind).item() == pytest.approx(0, abs=1e-6)
    # SIoU's distance term counts x alone here: 1 - exp(-2)
    most = {"iou": 1, "siou": 1 + (1 - exp(-2)) / 2}.get(kind, 2)
    assert box_loss(far, box, kind).item() == pytest.approx(most, abs=0.01)


DEGENERATE = {
    "identical": ((50, 50, 20, 10), (50, 50, 20, 10)),
    "disjoint": ((50, 50, 20, 10), (500, 500, 20, 10)),
    "touching": ((50, 50, 20, 10), (70, 50, 20, 10)),
    "no size": ((50, 50, 0, 0), (50, 50, 20, 10)),
    "no size, apart": ((50, 50, 0, 0), (90, 50, 20, 10)),
    "object without size": ((50, 50, 20, 10), (50, 50, 0, 0)),
    "both without size": ((50, 50, 0, 0), (50, 50, 0, 0)),
    "a line": ((50, 50, 0, 10), (50, 50, 20, 0)),
    "tiny": ((50, 50, 1e-20, 1e-20), (50, 50, 1e-4, 1e-4)),
    "huge": ((50, 50, 1e15, 1e15), (50, 50, 20, 10)),
    "huge and far": ((1e15, -1e15, 1e15, 1e-15), (50, 50, 20, 10)),
    "both huge": ((0, 0, 1e15, 1e15), (1e15, 0, 1e15, 1e15)),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("kind", OF_BOXES)
def test_degenerate_boxes_are_finite(kind, mode, case):
    predicted, target = (torch.tensor([box], dtype=torch.float32) for box in DEGENERATE[case])
    predicted.requires_grad_()
    loss = box_loss(predicted, target, kind, ciou_gradient=mode, size=(416.0, 416.0))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and 0 <= loss.item() <= 4
    assert predicted.grad.isfinite().all()


def test_coinciding_boxes_in_float32_never_divide_zero_by_zero():
    """1 - IoU can round to less than 0, and the denominator of CIoU's alpha to 0."""
    generator = torch.Generator().manual_seed(11)
    boxes = torch.rand(20000, 4, generator=generator) * 400 + 1
    boxes[:, 2:] *= torch.rand(20000, 1, generator=generator) * 4
    predicted = boxes.clone().requires_grad_()
    loss = box_loss(predicted, boxes, "ciou")
    loss.sum().backward()
    assert loss.isfinite().all() and predicted.grad.isfinite().all()


@pytest.mark.parametrize("kind", OF_BOXES)
def test_no_boxes(kind):
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss(empty, torch.zeros(0, 4), kind)
    assert loss.shape == (0,)
    loss.sum().backward()


@pytest.mark.parametrize("kind", ["sse", "xiou"])
def test_a_kind_that_is_no_function_of_boxes_is_refused(kind):
    with pytest.raises(ValueError, match=f"'{kind}' is not one of iou, giou, diou, ciou, siou"):
        box_loss(random_boxes(1, 0), random_boxes(1, 1), kind)


def test_plain_iou():
    one = torch.tensor([[10.0, 10.0, 8.0, 8.0]], requires_grad=True)
    iou = plain_iou(one, torch.tensor([[13.0, 14.0, 8.0, 8.0]]))
    assert iou.item() == pytest.approx(20 / 108) and not iou.requires_grad


def test_decode_boxes_by_hand():
    raw = torch.tensor([0.0, 0.0, 0.0, log(2)])
    box = decode_boxes(raw, head(), torch.tensor([10.0, 14.0]), torch.tensor([3, 5]))
    torch.testing.assert_close(box, torch.tensor([28.0, 44.0, 10.0, 28.0]))
    # with new_coords the probabilities .5, .25, .5, 1 (or very nearly) follow from these logits
    box = decode_boxes(
        torch.tensor([0.0, -log(3), 0.0, 30.0]),
        head(new_coords=True, scale_x_y=2.0),
        torch.tensor([10.0, 14.0]),
        torch.tensor([3, 5]),
    )
    torch.testing.assert_close(box, torch.tensor([28.0, 40.0, 10.0, 56.0]))


@pytest.mark.parametrize("scale", [1.0, 1.2, 2.0])
@pytest.mark.parametrize("new_coords", [False, True])
def test_encode_is_the_inverse_of_decode(new_coords, scale):
    one = head(new_coords=new_coords, scale_x_y=scale)
    raw = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cells = torch.randint(0, 8, (50, 2), generator=torch.Generator().manual_seed(2))
    anchors = torch.tensor(one.anchors, dtype=torch.float64)[torch.arange(50) % 2]
    encoded = encode_boxes(decode_boxes(raw, one, anchors, cells), one, anchors, cells)
    given = torch.sigmoid(raw) if new_coords else torch.cat([raw[:, :2].sigmoid(), raw[:, 2:]], 1)
    torch.testing.assert_close(encoded, given)


def sse(raw, one, target):
    anchor = torch.tensor([[23.0, 27.0]])
    return squared_error(
        torch.tensor([raw]), torch.tensor([target]), one, anchor, torch.tensor([[2, 3]]), SIZE
    ).item()


def test_sse_by_hand():
    # in cell (2, 3) of stride 8 at (.55, .3); log(46 / 23) = log 2, log(27 / 27) = 0
    target, weight = [20.4, 26.4, 46.0, 27.0], 2 - 46 * 27 / 64**2
    error = 0.05**2 + 0.2**2 + log(2) ** 2 + 0.5**2
    assert sse([0.0, 0.0, 0.0, 0.5], head(scale_x_y=1.0), target) == pytest.approx(weight * error)
    # scale_x_y 1.2: sigmoids of (.55 + .1) / 1.2 and (.3 + .1) / 1.2
    error = (0.65 / 1.2 - 0.5) ** 2 + (0.4 / 1.2 - 0.5) ** 2 + log(2) ** 2
    assert sse([0.0, 0.0, 0.0, 0.0], head(), target) == pytest.approx(weight * error)
    # new_coords: sigmoids of (.55 + .5) / 2 and (.3 + .5) / 2, sqrt(2) / 2 and sqrt(1) / 2
    error = 0.025**2 + 0.1**2 + (sqrt(0.5) - 0.5) ** 2
    one = head(new_coords=True, scale_x_y=2.0)
    assert sse([0.0, 0.0, 0.0, 0.0], one, target) == pytest.approx(weight * error)


def test_sse_of_small_boxes_weighs_up_to_twice_as_much():
    one = head(scale_x_y=1.0)
    whole = sse([0.0, 0.0, 0.0, log(64 / 27)], one, [20.0, 28.0, 64.0, 64.0])
    assert whole == pytest.approx(log(64 / 23) ** 2, rel=1e-5)
    small = sse([0.0, 0.0, 0.0, log(1 / 27)], one, [20.0, 28.0, 1.0, 1.0])
    assert small == pytest.approx((2 - 64**-2) * log(23) ** 2, rel=1e-5)


@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("target", [[20.0, 28.0, 0.0, 0.0], [20.0, 28.0, 1e9, 1e9]])
def test_sse_of_impossible_boxes_is_finite(target, new_coords):
    for value in (0.0, 1e4, -1e4):
        raw = torch.full((1, 4), value, requires_grad=True)
        loss = squared_error(
            raw, torch.tensor([target]), head(new_coords=new_coords), torch.tensor([[23.0, 27.0]]),
            torch.tensor([[2, 3]]), SIZE,
        )  # fmt: skip
        loss.sum().backward()
        assert loss.isfinite().all() and raw.grad.isfinite().all()


def test_arctangents_agree():
    """atan2(w, h) is the papers' arctan(w / h) for boxes, whose sides are positive."""
    box, other = [[0.0, 0.0, 3.0, 4.0]], [[0.0, 0.0, 4.0, 3.0]]
    ciou, diou = (
        box_loss(torch.tensor(box), torch.tensor(other), kind).item() for kind in ("ciou", "diou")
    )
    v = 4 / pi**2 * (atan(4 / 3) - atan(3 / 4)) ** 2
    assert ciou - diou == pytest.approx(v**2 / (1 - 9 / 15 + v), abs=1e-6)
