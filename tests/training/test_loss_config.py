"""Bounds of the loss's settings, and what is read off the [yolo] sections of a cfg."""

from dataclasses import replace

import pytest
import torch

from training.box_loss import box_loss, decode_boxes
from training.loss_config import DARKNET_BOX, LossConfig
from yolov4_fast.network.architectures import by_name


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("box_loss", "xiou", "'xiou' is not one of sse, iou, giou, diou, ciou, siou"),
        ("ciou_gradient", "none", "'none' is not one of exact, paper"),
        ("normaliser", "cells", "'cells' is not one of positives, images"),
        ("box", -1.0, "must be at least 0, not -1.0"),
        ("scale_balance", (1.0, 0.0), "must be above 0, not 0.0"),
        ("focal_alpha", 1.0, "must be above 0 and below 1, not 1.0"),
        ("objectness_smooth", 1.5, "must be at least 0 and at most 1, not 1.5"),
        ("label_smoothing", float("nan"), "must be at least 0 and below 1, not nan"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, told):
    with pytest.raises(ValueError, match=f"{name} {told}"):
        LossConfig(**{name: value})


def heads_of(name, training=(), **changes):
    return [
        replace(h, training=tuple(training), **changes) for h in by_name(name, num_classes=3).heads
    ]


def test_of_yolov4():
    config = LossConfig.of_heads(by_name("yolov4").heads)
    assert config == LossConfig(
        box_loss="ciou", ciou_gradient="paper", box=0.07 * DARKNET_BOX, normaliser="images",
        focal_alpha=0.5,
    )  # fmt: skip


def test_of_yolov3_whose_mse_is_sse_of_half_the_weight():
    """Darknet's gradient is the error, that of its square twice as much."""
    config = LossConfig.of_heads(by_name("yolov3").heads)
    assert config.box_loss == "sse" and config.box == 0.75 / 2


def test_objectness_of_each_head_of_yolov4_csp():
    config = LossConfig.of_heads(by_name("yolov4-csp").heads)
    assert config.scale_balance == (4.0, 1.0, 0.4) and config.objectness == 1
    assert config.classes == 0.5 and config.objectness_smooth == 1
    backwards = LossConfig.of_heads(by_name("yolov4-csp").heads[::-1])
    assert backwards == config


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("label_smooth_eps", "0.1", {"label_smoothing": 0.1}),
        ("focal_loss", "1", {"focal_gamma": 2.0, "focal_alpha": 0.5}),
        ("objectness_smooth", "1", {"objectness_smooth": 1.0}),
        ("delta_normalizer", "0.5", {"box": 1.0, "objectness": 0.5, "classes": 0.25}),
        ("max_delta", "5", {}),
        ("truth_thresh", "1", {}),
    ],
)
def test_training_keys(key, value, expected):
    settings = {"iou_loss": "giou", "iou_normalizer": 2 / DARKNET_BOX, "cls_normalizer": 0.5}
    config = LossConfig.of_heads(heads_of("yolov4-tiny", [(key, value)], **settings))
    plain = LossConfig.of_heads(heads_of("yolov4-tiny", **settings))
    assert plain.box == pytest.approx(2) and plain.box_loss == "giou"
    assert config == replace(plain, **expected)


def test_obj_normalizer_alike_is_the_weight_of_objectness():
    config = LossConfig.of_heads(heads_of("yolov4-tiny", obj_normalizer=0.4))
    assert config.objectness == 0.4 and config.scale_balance == ()


@pytest.mark.parametrize(
    "changes", [{"iou_loss": "iou"}, {"iou_normalizer": 1.0}, {"cls_normalizer": 2.0}]
)
def test_heads_that_disagree_are_refused(changes):
    first, *others = by_name("yolov4").heads
    (name,) = changes
    with pytest.raises(ValueError, match=rf"{name} must be the same in every \[yolo\] section"):
        LossConfig.of_heads([replace(first, **changes), *others])


def test_a_key_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"\[yolo\] focal_loss=yes is not a number"):
        LossConfig.of_heads(heads_of("yolov4", [("focal_loss", "yes")]))


def test_the_weight_of_boxes_gives_gradients_as_large_as_darknets():
    """Darknet's step is the derivative by the box in units of the input, in w and h times exp(t),
    and nothing else of the chain rule. Compared by the geometric mean over x, y, w, h and all
    anchors of yolov4, on boxes a little off.
    """
    size, generator, ratios = 608, torch.Generator().manual_seed(0), []
    for one in by_name("yolov4").heads:
        for anchor in torch.tensor(one.anchors):
            raw = torch.randn(500, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.3, 0.3])
            raw.requires_grad_()
            box = decode_boxes(raw, one, anchor, torch.tensor([3, 3])) / size
            off = torch.randn(500, 4, generator=generator) * 0.1
            target = (box + off * box[:, 2:].repeat(1, 2)).detach()
            loss = box_loss(box * size, target * size, "ciou").sum()
            by_box, ours = torch.autograd.grad(loss, [box, raw])
            darknets = by_box * torch.cat([torch.ones(500, 2), raw[:, 2:].exp()], 1)
            ratios.append((darknets.abs().mean(0) / ours.abs().mean(0)).log())
    assert 0.8 < torch.stack(ratios).mean().exp().item() / DARKNET_BOX < 1.25
