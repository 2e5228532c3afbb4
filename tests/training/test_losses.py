"""The loss against a plain one of dense masks, torchvision's focal loss and values worked by hand;
the effect of each setting.
"""

from dataclasses import replace
from math import log

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, box_iou, sigmoid_focal_loss

from training.assign import assign
from training.box_loss import BOX_LOSSES, box_loss, decode_boxes, encode_boxes
from training.losses import LossConfig, count_positives, detection_loss
from yolov4_fast.network.layers import Head

ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0))


def head(**changes: object) -> Head:
    settings = {
        "inputs": (0,), "all_anchors": ANCHORS, "mask": (0, 1), "num_classes": 3, "stride": 8,
        "scale_x_y": 1.2, "ignore_thresh": 0.7, "iou_thresh": 0.213,
    }  # fmt: skip
    return Head(**(settings | changes))  # type: ignore[arg-type]


HEADS = (head(), head(mask=(2, 3), stride=16, scale_x_y=1.05))


def random_maps(batch=3, width=96, height=64, heads=HEADS, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h.channels, height // h.stride, width // h.stride) for h in heads]
    return [spread * torch.randn(shape, generator=generator) for shape in shapes]


def random_targets(count=25, images=2, classes=3, seed=1):
    """The last picture of three has no object; many of the others share places."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, images, (count, 1), generator=generator).float()
    class_id = torch.randint(0, classes, (count, 1), generator=generator).float()
    center = torch.rand(count, 2, generator=generator)
    size = torch.rand(count, 2, generator=generator) * 0.6 + 0.02
    return torch.cat([image, class_id, center, size], 1)


def one_object(width=23.0, height=27.0, class_id=1.0):
    """An object in cell (2, 3) of a map of 8 x 8 cells of 8 px."""
    return torch.tensor([[0.0, class_id, 20.4 / 64, 28.4 / 64, width / 64, height / 64]])


def single(**changes):
    """A head of one anchor, 23 x 27, that has one positive per object."""
    return head(mask=(1,), iou_thresh=1.0, scale_x_y=1.0, **changes)


def perfect_map() -> torch.Tensor:
    """What `single` should give for `one_object`."""
    raw = torch.full((1, 8, 8, 8), -12.0)
    raw[0, :4] = 0.0
    raw[0, :2, 3, 2] = torch.logit(torch.tensor([20.4 / 8 % 1, 28.4 / 8 % 1]))
    raw[0, 4, 3, 2] = raw[0, 6, 3, 2] = 12.0
    return raw


def gradients(heads, maps, targets, config, **named):
    leaves = [raw.clone().requires_grad_() for raw in maps]
    losses = detection_loss(heads, leaves, targets, config, **named)
    return losses, torch.autograd.grad(losses.total, leaves)


def plain_loss(heads, maps, targets, kind="ciou"):
    """The definition with a mask for every cell; weights 1, normalised by positives."""
    height, width = (maps[0].shape[i] * heads[0].stride for i in (2, 3))
    total, count = torch.zeros(3), 0
    for h, raw, p in zip(heads, maps, assign(heads, targets, width, height), strict=True):
        batch, _, rows, columns = raw.shape
        raw = raw.view(batch, len(h.mask), -1, rows, columns).permute(0, 1, 3, 4, 2)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        anchors = torch.tensor(h.anchors)[:, None, None]
        boxes = decode_boxes(raw[..., :4], h, anchors, torch.stack([x, y], -1))
        counts = torch.ones(boxes.shape[:-1])
        for image, _, *box in targets.tolist():
            box = torch.tensor(box) * torch.tensor([width, height, width, height])
            xyxy = [
                box_convert(b.detach().view(-1, 4), "cxcywh", "xyxy")
                for b in (boxes[int(image)], box)
            ]
            counts[int(image)][(box_iou(*xyxy) > h.ignore_thresh).view(counts.shape[1:])] = 0
        here = p.image, p.anchor, p.y, p.x
        label, labels = torch.zeros(counts.shape), torch.zeros(*counts.shape, h.num_classes)
        label[here] = counts[here] = labels[(*here, p.classes)] = 1
        bce = F.binary_cross_entropy_with_logits
        total = total + torch.stack([
            box_loss(boxes[here], p.boxes_cxcywh, kind).sum(),
            bce(raw[..., 4], label, counts, reduction="sum"),
            bce(raw[here][:, 5:], labels[here], reduction="sum"),
        ])  # fmt: skip
        count += len(p.image)
    return total / max(1, count)


@pytest.mark.parametrize("objects", [0, 1, 25])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_values_and_gradients_equal_the_plain_definition(objects, spread):
    maps, targets = random_maps(spread=spread), random_targets(objects)
    config = LossConfig(box=1)
    losses, mine = gradients(HEADS, maps, targets, config)
    leaves = [raw.clone().requires_grad_() for raw in maps]
    expected = plain_loss(HEADS, leaves, targets)
    torch.testing.assert_close(torch.stack(losses[1:]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, expected.sum(), rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(expected.sum(), leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_channels_last_maps_give_the_same():
    maps, targets = random_maps(), random_targets()
    plain = detection_loss(HEADS, maps, targets, LossConfig())
    other = [raw.contiguous(memory_format=torch.channels_last) for raw in maps]
    torch.testing.assert_close(detection_loss(HEADS, other, targets, LossConfig()), plain)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_bfloat16_maps_are_computed_in_float32(kind):
    maps = [raw.bfloat16() for raw in random_maps()]
    config = LossConfig(box_loss=kind)
    losses, grads = gradients(HEADS, maps, random_targets(), config)
    expected, exact = gradients(HEADS, [raw.float() for raw in maps], random_targets(), config)
    assert all(term.dtype == torch.float32 for term in losses)
    torch.testing.assert_close(losses, expected)
    for one, other in zip(grads, exact, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=1e-3)


def test_no_objects():
    maps = [raw * 0 for raw in random_maps(batch=2, width=64)]
    losses, grads = gradients(HEADS, maps, torch.zeros(0, 6), LossConfig())
    assert losses.box == 0 and losses.classes == 0
    cells = 2 * 2 * (64 + 16)
    assert losses.objectness.item() == pytest.approx(cells * log(2), rel=1e-5)
    assert grads[0][:, 4].abs().sum() > 0 and grads[0][:, 0].abs().sum() == 0


def test_perfect_prediction_has_almost_no_loss_and_overlapping_cells_are_ignored():
    raw = perfect_map()
    raw[0, 4, 3, 3] = 12.0  # a neighbour that says object: IoU with it decides whether it counts
    raw[0, 0, 3, 3] = -12.0  # at its left edge, 3.6 px from the object: IoU above .7
    raw[0, 1, 3, 3] = raw[0, 1, 3, 2]
    assert detection_loss([single()], [raw], one_object(), LossConfig()).total.item() < 1e-3
    strict = single(ignore_thresh=0.9)
    assert detection_loss([strict], [raw], one_object(), LossConfig()).objectness.item() > 10


def test_two_classes_in_one_place_are_both_right_and_its_objectness_counts_once():
    targets = torch.cat([one_object(class_id=0.0), one_object(class_id=2.0)])
    raw = torch.zeros(1, 8, 8, 8)
    raw[0, 5:, 3, 2] = torch.tensor([20.0, -20.0, 20.0])
    losses = detection_loss([single(ignore_thresh=1.0)], [raw], targets, LossConfig())
    assert losses.classes.item() < 1e-6
    assert losses.objectness.item() == pytest.approx(64 * log(2) / 2, rel=1e-5)


def test_the_gradient_is_the_same_each_time_where_many_objects_share_places():
    """Whatever the order in which two threads add up; enough values that torch would use both."""
    one, threads = head(num_classes=80, iou_thresh=0.0), torch.get_num_threads()
    targets = random_targets(1500, classes=80)
    maps = [torch.randn(2, one.channels, 8, 8, generator=torch.Generator().manual_seed(4))]
    torch.set_num_threads(2)
    try:
        results = [gradients([one], maps, targets, LossConfig())[1][0] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all((result == results[0]).all() for result in results)


def test_an_image_without_objects_has_its_negatives_counted():
    maps = [raw[:2] for raw in random_maps()]
    targets = random_targets(images=1)
    both = detection_loss(HEADS, maps, targets, LossConfig(), positives=1)
    first = detection_loss(HEADS, [m[:1] for m in maps], targets, LossConfig(), positives=1)
    second = detection_loss(
        HEADS, [m[1:] for m in maps], torch.zeros(0, 6), LossConfig(), positives=1
    )
    torch.testing.assert_close(both.total, first.total + second.total)
    assert second.objectness > 0


@pytest.mark.parametrize(
    ("term", "others"),
    [
        ("box", ("objectness", "classes")),
        ("objectness", ("box", "classes")),
        ("classes", ("box", "objectness")),
    ],
)
def test_weights_scale_their_term_alone(term, others):
    maps, targets = random_maps(), random_targets()
    plain = detection_loss(HEADS, maps, targets, LossConfig())
    config = replace(LossConfig(), **{term: 3 * getattr(LossConfig(), term)})
    losses = detection_loss(HEADS, maps, targets, config)
    torch.testing.assert_close(getattr(losses, term), 3 * getattr(plain, term))
    assert all(getattr(losses, other) == getattr(plain, other) for other in others)
    torch.testing.assert_close(losses.total, losses.box + losses.objectness + losses.classes)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_loss_is_of_the_kind_that_is_set(kind):
    one, raw = single(), torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    losses = detection_loss([one], [raw], one_object(30, 20), LossConfig(box_loss=kind, box=1))
    box = torch.tensor([[20.4, 28.4, 30.0, 20.0]])
    here, anchor, cell = (
        raw[0, :4, 3, 2][None],
        torch.tensor([[23.0, 27.0]]),
        torch.tensor([[2, 3]]),
    )
    if kind == "sse":
        given = torch.cat([here[:, :2].sigmoid(), here[:, 2:]], 1)
        error = (given - encode_boxes(box, one, anchor, cell)).square().sum()
        expected = error * (2 - 600 / 64**2)
    else:
        expected = box_loss(decode_boxes(here, one, anchor, cell), box, kind).sum()
    torch.testing.assert_close(losses.box, expected)


def test_ciou_gradient_changes_the_gradient_alone():
    maps, targets = random_maps(), random_targets()
    exact, exact_grads = gradients(HEADS, maps, targets, LossConfig())
    paper, paper_grads = gradients(HEADS, maps, targets, LossConfig(ciou_gradient="paper"))
    assert paper.total == exact.total
    difference = (exact_grads[0] - paper_grads[0]).unflatten(1, (2, 8)).abs().sum((0, 1, 3, 4))
    assert (difference[2:4] > 0).all() and (difference[[0, 1, 4, 5, 6, 7]] == 0).all()


def test_no_object_weighs_negatives_alone():
    raw, targets = torch.zeros(1, 8, 8, 8), one_object()
    for weight, expected in ((1.0, 64), (0.25, 63 / 4 + 1), (0.0, 1)):
        config = LossConfig(no_object=weight)
        losses = detection_loss([single(ignore_thresh=1.0)], [raw], targets, config)
        assert losses.objectness.item() == pytest.approx(expected * log(2), rel=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_scale_balance_weighs_the_objectness_of_each_head_finest_first(order):
    heads, targets = [HEADS[i] for i in order], random_targets()
    maps = [random_maps()[i] for i in order]
    _, plain = gradients(heads, maps, targets, LossConfig())
    _, balanced = gradients(heads, maps, targets, LossConfig(scale_balance=(4.0, 0.5)))
    for number, before, after in zip(order, plain, balanced, strict=True):
        before, after = before.unflatten(1, (2, 8)), after.unflatten(1, (2, 8))
        factor = torch.ones(8, 1, 1)
        factor[4] = (4.0, 0.5)[number]
        torch.testing.assert_close(after, before * factor)


def test_scale_balance_of_another_number_of_heads_is_refused():
    config = LossConfig(scale_balance=(4.0, 1.0, 0.4))
    with pytest.raises(ValueError, match="one weight for each of 2 heads, not 3"):
        detection_loss(HEADS, random_maps(), random_targets(), config)


def test_normaliser():
    maps, targets = random_maps(), random_targets()
    count = count_positives(HEADS, targets, 96, 64)
    sums = detection_loss(HEADS, maps, targets, LossConfig(), positives=1).total
    by_positives = detection_loss(HEADS, maps, targets, LossConfig()).total
    by_images = detection_loss(HEADS, maps, targets, LossConfig(normaliser="images")).total
    assert count not in (0, 1, 3)
    torch.testing.assert_close(by_positives, sums / count)
    torch.testing.assert_close(by_images, sums / 3)


@pytest.mark.parametrize("normaliser", ["positives", "images"])
@pytest.mark.parametrize("form", [float, torch.tensor])
def test_mini_batches_add_up_to_the_whole_batch(normaliser, form):
    maps, targets = random_maps(), random_targets(images=3)
    config = LossConfig(normaliser=normaliser)
    whole, grads = gradients(HEADS, maps, targets, config)
    number = count_positives(HEADS, targets, 96, 64) if normaliser == "positives" else 3
    total = torch.zeros(())
    for image in range(3):
        mine = targets[targets[:, 0] == image] * torch.tensor([0.0, 1, 1, 1, 1, 1])
        part, part_grads = gradients(
            HEADS, [raw[image : image + 1] for raw in maps], mine, config, positives=form(number)
        )
        total = total + part.total
        for one, other in zip(part_grads, grads, strict=True):
            torch.testing.assert_close(one[0], other[image])
    torch.testing.assert_close(total, whole.total)


def test_focal_loss_equals_torchvision():
    """On one positive and 63 negatives; classes without alpha."""
    raw = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3)) * 3
    config = LossConfig(focal_gamma=2.0, focal_alpha=0.4)
    losses, (grad,) = gradients([single(ignore_thresh=1.0)], [raw], one_object(), config)
    leaf = raw.clone().requires_grad_()
    label = torch.zeros(8, 8)
    label[3, 2] = 1
    objectness = sigmoid_focal_loss(leaf[0, 4], label, 0.4, 2.0, "sum")
    classes = sigmoid_focal_loss(leaf[0, 5:, 3, 2], torch.tensor([0.0, 1.0, 0.0]), -1, 2.0, "sum")
    torch.testing.assert_close(losses.objectness, objectness.detach())
    torch.testing.assert_close(losses.classes, classes.detach())
    (expected,) = torch.autograd.grad(objectness + classes, leaf)
    torch.testing.assert_close(grad[0, 4:], expected[0, 4:], rtol=1e-5, atol=1e-6)


def test_focal_loss_of_labels_between_equals_torchvision():
    raw = torch.zeros(1, 8, 8, 8)
    raw[0, 5:, 3, 2] = torch.tensor([2.0, -1.0, 0.5])
    config = LossConfig(focal_gamma=1.5, label_smoothing=0.2)
    losses = detection_loss([single()], [raw], one_object(), config)
    labels = torch.tensor([0.1, 0.9, 0.1])
    expected = sigmoid_focal_loss(raw[0, 5:, 3, 2], labels, -1, 1.5, "sum")
    torch.testing.assert_close(losses.classes, expected)


def test_focusing_weighs_the_hard_and_its_absence_leaves_alpha_out():
    maps, targets = random_maps(), random_targets()
    plain = detection_loss(HEADS, maps, targets, LossConfig())
    alpha = detection_loss(HEADS, maps, targets, LossConfig(focal_alpha=0.9))
    focal = detection_loss(HEADS, maps, targets, LossConfig(focal_gamma=1.0))
    assert plain == alpha
    assert focal.classes < plain.classes and focal.objectness < plain.objectness


def test_label_smoothing_has_its_optimum_between():
    def slope(logit):
        raw = torch.zeros(1, 8, 8, 8)
        raw[0, 5:, 3, 2] = torch.tensor([-logit, logit, -logit])
        _, (grad,) = gradients([single()], [raw], one_object(), LossConfig(label_smoothing=0.2))
        return grad[0, 5:, 3, 2]

    assert slope(log(9.0)).abs().max() < 1e-6  # sigmoid .9 = 1 * .8 + .1, and .1 = 0 * .8 + .1
    assert slope(log(9.0) + 0.1)[1] > 0 > slope(log(9.0) - 0.1)[1]


@pytest.mark.parametrize(("smooth", "label"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
def test_objectness_smooth_moves_the_label_towards_the_iou(smooth, label):
    """The predicted box is half of the object: IoU .5."""
    raw = perfect_map()
    config = LossConfig(objectness_smooth=smooth)
    _, (grad,) = gradients([single()], [raw], one_object(46, 27), config)
    assert grad[0, 4, 3, 2].item() == pytest.approx(1 - label, abs=1e-5)
    # the label is a constant: objectness does not pull at the box
    _, (other,) = gradients([single()], [raw], one_object(46, 27), replace(config, objectness=0))
    torch.testing.assert_close(grad[0, :4], other[0, :4])


def test_objectness_of_a_shared_place_has_the_best_iou_as_label():
    targets = torch.cat([one_object(46, 27), one_object(), one_object(10, 10)])
    raw = perfect_map()
    _, (grad,) = gradients([single()], [raw], targets, LossConfig(objectness_smooth=1.0))
    assert grad[0, 4, 3, 2].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("new_coords", [False, True])
@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_descending_finds_the_object(kind, new_coords):
    """From a map of zeros, by plain gradients: box, objectness and class come out right."""
    one = single(new_coords=new_coords)
    raw = torch.zeros(1, 8, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([raw], 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        config = LossConfig(box_loss=kind)
        detection_loss([one], [raw], one_object(30, 20), config).total.backward()
        optimizer.step()
    here = raw.detach()[0, :, 3, 2]
    box = decode_boxes(here[:4], one, torch.tensor([23.0, 27.0]), torch.tensor([2, 3]))
    torch.testing.assert_close(box, torch.tensor([20.4, 28.4, 30.0, 20.0]), rtol=0, atol=1.5)
    assert raw[0, 4].argmax() == 3 * 8 + 2 and (here[4:] > 0).tolist() == [True, False, True, False]
