"""Presets: the published numbers, and what a cfg says of its own training."""

from pathlib import Path

import pytest

from training.cfg_training import scales_within
from training.config import TrainConfig
from training.model import make_network
from training.options import configuration, parse
from training.presets import PRESETS, preset
from training.schedule import factor
from yolov4_fast.network.architectures import NAMES, by_name

REQUIRED = ["--data", "nowhere", "--output", "nowhere", "--device", "cpu"]


def parsed(*arguments: str) -> TrainConfig:
    return configuration(parse([*REQUIRED, *arguments]))[0]


def test_fast_is_the_default():
    assert parsed() == preset("fast").config == TrainConfig()


def test_seed_is_em_1001s():
    config = parsed("--preset", "seed")
    assert (config.model, config.width, config.height) == ("yolov4-seed-leaky", 416, 416)
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("adam", 1e-4, 1e-4)
    assert (config.batch_size, config.epochs, config.ema_decay) == (32, 100, 0)
    rates = [1e-4 * factor(config, 500 * epoch, 50_000, 500) for epoch in (0, 29, 30, 49, 50, 99)]
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5, 1e-5, 1e-5])
    assert (config.validation.confidence, config.validation.nms_iou) == (0.05, 0.45)
    assert config.augment.mosaic == 0
    network = make_network(config, 20)
    anchors = [(round(w / 416, 4), round(h / 416, 4)) for w, h in network.heads[0].all_anchors]
    assert anchors[0] == (0.02, 0.03) and anchors[8] == (0.9, 0.78)
    assert {h.scale_x_y for h in network.heads} == {1.0}
    assert {(h.iou_thresh, h.ignore_thresh) for h in network.heads} == {(1.0, 0.5)}


def test_the_seeds_cosine_falls_to_nothing_over_its_100_epochs():
    config = parsed("--preset", "seed", "--schedule", "cosine")
    assert factor(config, 0, 50_000, 500) == 1
    assert factor(config, 25_000, 50_000, 500) == pytest.approx(0.5)
    assert factor(config, 49_999, 50_000, 500) == pytest.approx(0, abs=1e-8)


def test_darknet_is_yolov4_cfg():
    config = parsed("--preset", "darknet")
    assert (config.model, config.width, config.height) == ("yolov4", 608, 608)
    assert (config.batch_size, config.subdivisions) == (64, 8)
    assert (config.optimizer, config.nesterov, config.momentum) == ("sgd", False, 0.949)
    assert (config.learning_rate, config.weight_decay) == (0.0013, 0.0005)
    assert (config.ema_decay, config.clip_gradient) == (0, 0)
    assert config.total_steps(1848) == 500_500
    for step, expected in (
        (0, 1e-12), (499, 0.0625), (999, 1), (399_999, 1), (400_000, 0.1), (449_999, 0.1),
        (450_000, 0.01),
    ):  # fmt: skip
        assert factor(config, step, 500_500, 1848) == pytest.approx(expected)
    assert (config.multi_scale, config.multi_scale_every) == ((448, 832), 10)
    augment = config.augment
    assert (augment.mosaic, augment.jitter, augment.flip) == (0.5, 0.3, 0.5)
    assert (augment.hue, augment.saturation, augment.exposure) == (0.1, 1.5, 1.5)
    assert (config.loss.box_loss, config.loss.normaliser) == ("ciou", "images")
    heads = make_network(config, 80).heads
    assert {(h.iou_thresh, h.ignore_thresh, h.iou_normalizer) for h in heads} == {
        (0.213, 0.7, 0.07)
    }


def test_the_shares_of_darknet_hold_for_a_run_of_other_length():
    config = parsed("--preset", "darknet", "--epochs", "30")
    assert config.max_batches == 0 and config.total_steps(1000) == 30_000
    values = [factor(config, step, 30_000, 1000) for step in (23_975, 23_976, 26_972, 26_973)]
    assert values == pytest.approx([1, 0.1, 0.1, 0.01])
    assert parsed("--preset", "darknet", "--epochs", "30", "--max-batches", "9").max_batches == 9


def test_flags_override_a_preset():
    config = parsed(
        "--preset", "darknet", "--batch", "32", "--size", "416", "--model", "yolov4-nano"
    )
    assert (config.batch_size, config.width, config.model) == (32, 416, "yolov4-nano")
    assert config.multi_scale == (320, 576)  # 1.4 either way of that size
    assert config.optimizer == "sgd"


@pytest.mark.parametrize(
    ("width", "factor", "step", "expected"),
    [(608, 1.4, 32, (448, 832)), (416, 1.4, 32, (320, 576)), (64, 1.1, 32, (64, 64)),
     (96, 4.0, 32, (32, 384))],
)  # fmt: skip
def test_sizes_lie_within_the_factor(width, factor, step, expected):
    assert scales_within(width, factor, step) == expected


NET = """\
[net]
width=64
height=64
channels=3
batch=24
subdivisions=3
momentum=0.8
decay=0.002
learning_rate=0.02
burn_in=50
power=3
max_batches=400
policy=steps
steps=100,300
scales=.5,.1
angle=7
saturation=1.2
exposure=1.3
hue=.05
mosaic=1
mixup=1
gaussian_noise=4
flip=0
"""
LAYERS = """\
[convolutional]
batch_normalize=1
filters=8
size=3
stride=16
pad=1
activation=leaky
[convolutional]
filters=21
size=1
activation=linear
[yolo]
mask=0,1,2
anchors=4,4,8,8,16,16
num=3
classes=2
jitter=.25
resize=1.6
random=1
iou_loss=giou
iou_normalizer=0.5
cls_normalizer=0.25
label_smooth_eps=0.1
ignore_thresh=.6
iou_thresh=.3
"""


@pytest.fixture
def cfg(tmp_path: Path):
    """`cfg(net, layers)` writes a cfg and gives what --preset cfg makes of it."""

    def write(net: str = NET, layers: str = LAYERS, *flags: str):
        path = tmp_path / "mine.cfg"
        path.write_text(net + layers)
        return configuration(parse([*REQUIRED, "--preset", "cfg", "--model", str(path), *flags]))

    return write


def test_a_cfg_sets_its_own_training(cfg):
    config, notes = cfg()
    assert notes == ()
    assert (config.width, config.height) == (64, 64)
    assert (config.batch_size, config.subdivisions) == (24, 3)
    assert (config.optimizer, config.momentum, config.nesterov) == ("sgd", 0.8, False)
    assert (config.weight_decay, config.learning_rate) == (0.002, 0.02)
    assert config.total_steps(7) == 400
    values = [factor(config, step, 400, 7) for step in (24, 49, 99, 100, 299, 300)]
    assert values == pytest.approx([0.125, 1, 1, 0.5, 0.5, 0.05])
    augment = config.augment
    assert (augment.rotation, augment.saturation, augment.exposure) == (7, 1.2, 1.3)
    assert (augment.hue, augment.mosaic, augment.mixup, augment.cutmix) == (0.05, 0.5, 0.5, 0)
    assert (augment.noise, augment.flip, augment.jitter, augment.scale) == (4, 0, 0.25, 1.6)
    assert config.multi_scale == (48, 80)
    loss = config.loss
    assert (loss.box_loss, loss.classes, loss.label_smoothing) == ("giou", 0.25, 0.1)
    assert loss.normaliser == "images"
    (head,) = make_network(config, 2).heads
    assert (head.ignore_thresh, head.iou_thresh) == (0.6, 0.3)


def test_flags_override_a_cfg(cfg):
    config, _ = cfg(NET, LAYERS, "--batch", "6", "--size", "96x64", "--epochs", "2")
    assert (config.batch_size, config.width, config.height) == (6, 96, 64)
    assert config.total_steps(7) == 14


def test_what_a_cfg_leaves_out_is_as_in_darknet(cfg):
    config, notes = cfg("[net]\nwidth=64\nheight=64\nchannels=3\n", LAYERS.split("jitter")[0])
    assert notes == ()
    assert (config.batch_size, config.subdivisions, config.schedule) == (1, 1, "constant")
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.001, 0.9, 0.0001)
    augment = config.augment
    assert (augment.mosaic, augment.flip, augment.jitter, augment.hue) == (0, 0.5, 0.2, 0)
    assert (augment.saturation, augment.exposure, augment.scale) == (1, 1, 1)
    assert config.multi_scale == () and config.loss.box_loss == "sse"


def test_sgdr_is_the_cosine(cfg):
    net = NET.replace("policy=steps", "policy=sgdr\nlearning_rate_min=0.002")
    config, notes = cfg(net.replace("steps=100,300\nscales=.5,.1\n", ""))
    assert (config.schedule, config.final_learning_rate) == ("cosine", pytest.approx(0.1))
    assert notes == ()


def test_adam_of_a_cfg(cfg):
    config, notes = cfg(NET.replace("burn_in", "adam=1\nB1=0.85\nB2=0.99\nburn_in"))
    assert (config.optimizer, config.momentum) == ("adam", 0.85)
    assert notes == ("[net] B2=0.99",)


@pytest.mark.parametrize(
    ("change", "into", "note"),
    [
        ("policy=steps", "policy=poly", "[net] policy=poly"),
        ("burn_in=50", "burn_in=50\nadversarial_lr=1", "[net] adversarial_lr=1"),
        ("burn_in=50", "burn_in=50\nblur=1", "[net] blur=1"),
        ("max_batches=400", "max_batches=400\nsgdr_cycle=100", "[net] sgdr_cycle=100"),
        ("random=1", "random=1\nmax_delta=5", "[yolo] max_delta=5"),
        ("random=1", "random=1\niou_thresh_kind=giou", "[yolo] iou_thresh_kind=giou"),
        ("random=1", "random=1\ncounters_per_class=3,4", "[yolo] counters_per_class=3,4"),
    ],
)
def test_what_is_not_honoured_is_named(cfg, change, into, note):
    _, notes = cfg(NET.replace(change, into), LAYERS.replace(change, into))
    assert note in notes


@pytest.mark.parametrize(
    ("change", "into"),
    [("random=1", "random=1\ntruth_thresh=1\nmax=300"), ("hue=.05", "hue=.05\nblur=0\naspect=1.2")],
)
def test_what_has_no_effect_is_not_named(cfg, change, into):
    _, notes = cfg(NET.replace(change, into), LAYERS.replace(change, into))
    assert notes == ()


def test_a_value_that_is_no_number_is_named(cfg):
    with pytest.raises(ValueError, match=r"mine\.cfg, \[net\]: decay=much is not a number"):
        cfg(NET.replace("decay=0.002", "decay=much"))
    with pytest.raises(ValueError, match=r"burn_in=1\.5 is not a whole number"):
        cfg(NET.replace("burn_in=50", "burn_in=1.5"))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "cfg"])
@pytest.mark.parametrize("model", NAMES)
def test_presets_fit_every_architecture(name, model):
    config = parsed("--preset", name, "--model", model, "--size", "96")
    network = make_network(config, 3)
    assert (network.width, network.num_classes) == (96, 3)


def test_the_width_of_an_architecture():
    half, whole = (
        make_network(parsed("--model", "yolov4-tiny", *flags), 3)
        for flags in (("--width-multiple", "0.5"), ())
    )
    assert half == by_name("yolov4-tiny", num_classes=3, width_multiple=0.5) != whole
    with pytest.raises(ValueError, match="yolov4-nano takes no 'width_multiple'"):
        make_network(parsed("--model", "yolov4-nano", "--width-multiple", "0.5"), 3)


def test_anchors_are_pairs_or_a_file_of_them(tmp_path):
    listed = " ".join(f"{i + 8},{i + 9}" for i in range(9))
    file = tmp_path / "anchors.txt"
    file.write_text(listed)
    for text in (listed.replace(" ", ", "), str(file)):
        anchors = make_network(parsed("--anchors", text), 3).heads[0].all_anchors
        assert anchors[0] == (8, 9) and anchors[8] == (16, 17)
    with pytest.raises(ValueError, match="anchors"):
        make_network(parsed("--anchors", "1,2,3"), 3)


def test_a_cfg_is_not_changed_by_flags_of_architectures(darknet_reference):
    path = str(darknet_reference / "mini.cfg")
    config = parsed("--model", path, "--size", "160x128", "--no-spp", "--activation", "relu")
    with pytest.raises(ValueError, match="is changed in its text, not by --activation, --spp"):
        make_network(config, 3)
    config = parsed("--model", path, "--size", "160x128", "--iou-thresh", "0.4")
    assert {head.iou_thresh for head in make_network(config, 3).heads} == {0.4}
