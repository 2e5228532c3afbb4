"""The training section of a Darknet cfg as a `TrainConfig`.

[net]'s keys are kept verbatim in `Network.training`, those of [yolo] in `Head.training`; defaults
are those of AlexeyAB/darknet's parser. Of jitter, resize and random Darknet reads the last [yolo]
section, and so is done here. What is not honoured is listed, unless it has no effect at the value
that it has, or concerns Darknet's memory, display or classifiers only.

Not as in Darknet, though honoured: the cosine of `policy=sgdr` begins after the burn-in, not within
it; rates are lowered with the batch after the one that `steps` names; `ema_alpha` averages from the
start, not from the middle of the run; `angle` turns detection pictures too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from training.augment import AugmentConfig
from training.config import TrainConfig
from training.losses import LossConfig
from yolov4_fast.network.layers import Network

RANDOM = 1.4  # factor and divisor of the size by `random=1`
CHANCE = 0.5  # with which Darknet does what mosaic=1, mixup=1 or cutmix=1 ask for
# Of no effect on the weights, or only on classifiers and recurrent networks.
NOT_OF_DETECTORS = frozenset(
    """aspect max_crop min_crop max max_chart_loss optimized_memory workspace_size_limit_MB
    loss_scale use_cuda_graph show_receptive_field show_details map resize_step augment_speed
    sequential_subdivisions track track_history_size sim_thresh dets_for_track dets_for_show
    track_ciou_norm""".split()
)
# Values other than 0 at which a key does nothing.
NEUTRAL = {"truth_thresh": "1", "iou_thresh_kind": "iou", "B2": "0.999"}
# Taken by `LossConfig.of_heads`.
OF_LOSS = frozenset("label_smooth_eps focal_loss objectness_smooth delta_normalizer".split())


class Keys:
    """Verbatim keys of a section; what nobody asked for stays in `left`."""

    def __init__(self, options: tuple[tuple[str, str], ...], source: str) -> None:
        self.options, self.source = dict(options), source
        self.left = dict(options)

    def text(self, key: str, default: str) -> str:
        self.left.pop(key, None)
        return self.options.get(key, default)

    def number(self, key: str, default: float) -> float:
        return self.numbers(key, (default,))[0]

    def numbers(self, key: str, default: tuple[float, ...] = ()) -> tuple[float, ...]:
        text = self.text(key, "")
        try:
            return tuple(float(part) for part in text.split(",")) if text else default
        except ValueError:
            raise ValueError(f"{self.source}: {key}={text} is not a number") from None

    def whole(self, key: str, default: int) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise ValueError(f"{self.source}: {key}={value} is not a whole number")
        return int(value)


def training_of(network: Network, path: str) -> tuple[TrainConfig, tuple[str, ...]]:
    """What the cfg at `path`, read as `network`, says of its training; what is not honoured."""
    net = Keys(network.training, f"{path}, [net]")
    last = Keys(network.heads[-1].training if network.heads else (), f"{path}, last [yolo]")
    config = TrainConfig(
        model=path,
        width=network.width,
        height=network.height,
        batch_size=net.whole("batch", 1),
        subdivisions=net.whole("subdivisions", 1),
        learning_rate=net.number("learning_rate", 0.001),
        weight_decay=net.number("decay", 0.0001),
        ema_decay=net.number("ema_alpha", 0.0),
        warmup_epochs=0.0,
        warmup_steps=net.whole("burn_in", 0),
        warmup_power=net.number("power", 4.0),
        clip_gradient=0.0,
        mosaic_off_epochs=0,
        augment=_augment(net, last),
        loss=LossConfig.of_heads(network.heads),
        **_optimizer(net),
        **_schedule(net),
        **_sizes(network, last),
    )
    left = _left(net.left, "[net]")
    for head in network.heads:
        keys = dict(head.training)
        taken = OF_LOSS | (last.options.keys() - last.left.keys())
        left += _left({k: v for k, v in keys.items() if k not in taken}, "[yolo]")
    return config, tuple(dict.fromkeys(left))


def _optimizer(net: Keys) -> dict[str, Any]:
    momentum, beta1 = net.number("momentum", 0.9), net.number("B1", 0.9)
    adam = net.whole("adam", 0) != 0
    if not adam:
        for key in ("B2", "eps"):
            net.left.pop(key, None)
    return {
        "optimizer": "adam" if adam else "sgd",
        "momentum": beta1 if adam else momentum,
        "nesterov": False,
    }


def _schedule(net: Keys) -> dict[str, Any]:
    """Length and learning rate. A policy that there is none for leaves the rate constant."""
    batches = net.whole("max_batches", 0)
    policy = net.options.get("policy", "constant")
    length: dict[str, Any] = {"max_batches": batches, "schedule": "constant"}
    if policy not in ("constant", "steps", "sgdr"):
        return length
    if policy == "steps" and not batches:
        return length
    net.text("policy", "")
    if policy == "steps":
        at, scales = net.numbers("steps"), net.numbers("scales", (1.0,))
        scales += (1.0,) * (len(at) - len(scales))
        shares = tuple(min(1.0, batch / batches) for batch in at)
        return length | {"schedule": "steps", "steps": shares, "scales": scales[: len(at)]}
    if policy == "sgdr":
        rate = net.number("learning_rate", 0.001)
        final = net.number("learning_rate_min", 1e-5) / rate
        if net.options.get("sgdr_cycle", "") in ("", str(batches)):  # else it begins anew
            net.text("sgdr_cycle", "")
            net.text("sgdr_mult", "")
        return length | {"schedule": "cosine", "final_learning_rate": min(1.0, final)}
    return length


def _augment(net: Keys, last: Keys) -> AugmentConfig:
    resize = last.number("resize", 1.0)
    return replace(
        AugmentConfig.off(),
        mosaic=CHANCE * (net.whole("mosaic", 0) != 0),
        mixup=CHANCE * (net.whole("mixup", 0) != 0),
        cutmix=CHANCE * (net.whole("cutmix", 0) != 0),
        flip=CHANCE * (net.whole("flip", 1) != 0),
        jitter=last.number("jitter", 0.2),
        scale=max(resize, 1 / resize) if resize > 0 else 1.0,
        rotation=net.number("angle", 0.0),
        hue=net.number("hue", 0.0),
        saturation=net.number("saturation", 1.0),
        exposure=net.number("exposure", 1.0),
        noise=min(net.number("gaussian_noise", 0.0), 127.0),
    )


def _sizes(network: Network, last: Keys) -> dict[str, Any]:
    random = last.number("random", 0.0)
    if not random:
        return {}
    factor = RANDOM if random == 1 else max(random, 1 / random)
    return {"multi_scale": scales_within(network.width, factor, network.max_stride)}


def scales_within(width: int, factor: float, step: int) -> tuple[int, int]:
    """The least and the largest multiple of `step` within `factor` of a width, either way."""
    least = max(step, math.ceil(width / factor / step) * step)
    return least, max(least, math.floor(width * factor / step) * step)


def _left(options: Mapping[str, str], section: str) -> list[str]:
    return [
        f"{section} {key}={value}"
        for key, value in options.items()
        if key not in NOT_OF_DETECTORS and value != NEUTRAL.get(key) and not _is_zero(value)
    ]


def _is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:
        return False
