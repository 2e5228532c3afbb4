"""Cfg text to Network and back, and what a user is told about a cfg that is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random

import pytest
import torch

from yolov4_fast.darknet.cfg import CfgError, parse_cfg, read_cfg, write_cfg
from yolov4_fast.network.architectures import NAMES, by_name, yolov4_tiny
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import (
    ACTIVATIONS,
    IMAGE,
    SHORTCUT_NORMALIZATIONS,
    SHORTCUT_WEIGHTS,
    Conv,
    Head,
    MaxPool,
    Network,
    NetworkError,
    Route,
    Sam,
    Shortcut,
    Upsample,
)
from yolov4_fast.network.module import NetworkModule

NET = "[net]\nwidth=64\nheight=32\nchannels=3\n"
CONV = "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\nstride=1\npad=1\nactivation=mish\n"
DOWN = "[convolutional]\nfilters=16\nsize=3\nstride=2\npad=1\nactivation=linear\n"
YOLO = "[yolo]\nmask=0,1\nanchors=1,2, 3,4\nnum=2\nclasses=3\n"


def lines_of(text: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_survives_the_round_trip(name: str) -> None:
    network = by_name(name, num_classes=5, width=224, height=160)
    assert parse_cfg(write_cfg(network)) == network


def test_the_reference_survives_the_round_trip(darknet_reference: Path) -> None:
    network = read_cfg(darknet_reference / "mini.cfg")
    assert parse_cfg(write_cfg(network)) == network
    assert (network.width, network.height, len(network.layers)) == (160, 128, 33)
    assert network.training[:2] == (("batch", "1"), ("subdivisions", "1"))
    head = network.heads[0]
    assert (head.stride, head.mask, head.num_classes, head.scale_x_y) == (16, (3, 4, 5), 3, 1.05)
    assert head.training == (("jitter", ".3"), ("truth_thresh", "1"))
    assert [head.stride for head in network.heads] == [16, 8]


def test_a_folded_network_survives_the_round_trip() -> None:
    network = by_name("yolov4-nano", num_classes=2, width=64, height=64)
    folded, _ = fold(network, NetworkModule(network).state_dict())
    text = write_cfg(folded)
    assert "batch_normalize" not in text
    assert parse_cfg(text) == folded


def test_every_layer_and_setting_is_read() -> None:
    text = (
        "[network]\nwidth=64\nheight=32\nchannels=1\nletter_box=1\nmomentum = .9\nsteps=4,5\n"
        "[conv]\nfilters=8\nsize=3\nstride=2\npadding=2\ngroups=1\nactivation=swish\n"
        "[convolutional]\nbatch_normalize=1\nfilters=8\npad=1\nactivation=relu\n"
        "[convolutional]\ncbn=1\nfilters=8\nactivation=logistic\n"
        "[shortcut]\nfrom=-2, 0\nactivation=leaky\n"
        "[sam]\nfrom=-3\n"
        "[route]\nlayers= -1, 2\ngroups=2\ngroup_id=1\n"
        "[max]\nsize=3\nstride=2\npadding=1\n"
        "[maxpool]\n"
        "[upsample]\nstride=4\n"
    )
    network = parse_cfg(text)
    assert network == Network(
        (
            Conv(
                inputs=(IMAGE,),
                filters=8,
                size=3,
                stride=2,
                padding=2,
                batch_normalize=False,
                activation="swish",
            ),
            Conv(inputs=(0,), filters=8, activation="relu"),
            Conv(inputs=(1,), filters=8, activation="logistic"),
            Shortcut(inputs=(2, 1, 0), activation="leaky"),
            Sam(inputs=(3, 1)),
            Route(inputs=(4, 2), groups=2, group=1),
            MaxPool(inputs=(5,), size=3, stride=2, padding=1),
            MaxPool(inputs=(6,), size=1, stride=1),
            Upsample(inputs=(7,), stride=4),
        ),
        width=64,
        height=32,
        channels=1,
        letter_box=True,
        training=(("momentum", ".9"), ("steps", "4,5")),
    )
    assert parse_cfg(write_cfg(network)) == network


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_survives_the_round_trip(activation: str) -> None:
    network = Network(
        (
            Conv(inputs=(IMAGE,), filters=8, activation=activation),
            Shortcut(inputs=(0, 0), activation=activation),
        ),
        width=64,
        height=32,
    )
    assert f"activation={activation}\n" in write_cfg(network)
    assert parse_cfg(write_cfg(network)) == network


@pytest.mark.parametrize("normalization", SHORTCUT_NORMALIZATIONS)
@pytest.mark.parametrize("weights", SHORTCUT_WEIGHTS)
def test_weighted_shortcuts_survive_the_round_trip(weights: str, normalization: str) -> None:
    keys = f"weights_type={weights}\nweights_normalization={normalization}\n"
    network = parse_cfg(NET + CONV + CONV + CONV + "[shortcut]\nfrom=-2,-3\n" + keys)
    effective = "none" if weights == "none" else normalization
    assert network.layers[3] == Shortcut(inputs=(2, 1, 0), weights=weights, normalization=effective)
    assert parse_cfg(write_cfg(network)) == network
    assert ("weights_" in write_cfg(network)) == (weights != "none")


def test_darknets_other_names_of_weights() -> None:
    keys = "weights_type = per_layer\nweights_normalization = avg_relu\n"
    network = parse_cfg(NET + CONV + CONV + "[shortcut]\nfrom=-2\n" + keys)
    shortcut = Shortcut(inputs=(1, 0), weights="per_feature", normalization="relu")
    assert network.layers[2] == shortcut
    plain = parse_cfg(NET + CONV + CONV + "[shortcut]\nfrom=-2\nweights_type=per_channel\n")
    assert plain.layers[2] == Shortcut(inputs=(1, 0), weights="per_channel")


def test_defaults_are_darknets() -> None:
    network = parse_cfg(
        "[net]\nwidth=8\nheight=8\nchannels=3\n[convolutional]\nstride=2\n[upsample]\n"
        "[convolutional]\nfilters=25\nactivation=linear\n[yolo]\nanchors=1,2\n"
    )
    conv, upsample, _, head = network.layers
    assert conv == Conv(
        inputs=(IMAGE,), filters=1, stride=2, batch_normalize=False, activation="logistic"
    )
    assert upsample == Upsample(inputs=(0,), stride=2)
    assert isinstance(head, Head)
    assert (head.num_classes, head.mask, head.scale_x_y, head.new_coords) == (20, (0,), 1.0, False)
    assert (head.nms_kind, head.beta_nms, head.iou_loss, head.iou_normalizer) == (
        "default",
        0.6,
        "mse",
        0.75,
    )
    assert (head.ignore_thresh, head.iou_thresh) == (0.5, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.rstrip("\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("=", " =\t").replace("[", "  ["),
        lambda text: text.replace("\n", "  # note\n\n;another\n"),
        lambda text: text.replace("width=64", "width=64\nwidth=64"),
        lambda text: "# caf\u00e9 \u2028 \x0c\n" + text,
    ],
    ids=["crlf", "cr", "no newline", "bom", "spacing", "comments", "twice the same", "odd comment"],
)
def test_ways_of_writing_the_same(change, tmp_path: Path) -> None:
    text = NET + CONV + DOWN + YOLO
    assert parse_cfg(change(text)) == parse_cfg(text)
    path = tmp_path / "x.cfg"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(change(text).encode(encoding))
        assert read_cfg(path) == parse_cfg(text)


def test_comments_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "x.cfg"
    path.write_bytes("# \u8bad\u7ec3\n".encode("gbk") + (NET + CONV).encode())
    assert read_cfg(path) == parse_cfg(NET + CONV)


WRONG = {
    "no section": ("width=3\n" + NET, "line 1: 'width=3' stands before any section"),
    "empty": ("# nothing\n", "the first section is missing; it must be \\[net\\]"),
    "no net": (CONV, "the first section is \\[convolutional\\] in line 1; it must be \\[net\\]"),
    "two nets": (NET + NET, "line 5, \\[net\\]: a cfg has one"),
    "no layers": (NET, "\\[net\\]: no layers follow"),
    "no size": ("[net]\nchannels=3\n" + CONV, "\\[net\\] width: 0 is too small"),
    "junk": (NET + CONV + "end of file\n", "line 12: 'end of file' is neither"),
    "binary": ("\x00\x01\x02", "line 1: .* is neither"),
    "no value": (NET + "batch=\n", "line 5: 'batch=' is neither"),
    "open bracket": (NET + "[convolutional\n", "line 5: '\\[convolutional' is not a section"),
    "inputs": (NET + "inputs=5\n" + CONV, "inputs: width x height x channels is 6144"),
    "recurrent": (NET + "time_steps=3\n" + CONV, "line 5, \\[net\\] time_steps: recurrent"),
    "unknown net key": (NET + "widht=3\n" + CONV, "widht: unknown key; did you mean width"),
    "unknown section": (NET + "[yolo4]\n", "unknown section; did you mean \\[yolo\\]"),
    "odd section": (NET + "[qqq]\n", "unknown section; layers are convolutional, shortcut"),
    "twice": (NET + CONV + "filters=9\n", "line 7, .* filters: it is '8' here and '9' in line 12"),
    "unknown key": (NET + CONV + "fliter=9\n", "line 12, .* fliter: unknown key; .* filters"),
    "strange key": (NET + CONV + "zzz=9\n", "zzz: unknown key in a \\[convolutional\\] section"),
    "unknown yolo key": (
        NET + CONV + DOWN + YOLO + "nms=1\n",
        "\\[yolo\\] nms: unknown key; did you mean num",
    ),
    "number": (NET + CONV + "groups=two\n", "line 12, .* groups: 'two' is not a whole number"),
    "underscore": (NET + CONV + "groups=1_0\n", "'1_0' is not a whole number"),
    "float": (NET + CONV + DOWN + YOLO + "scale_x_y=nan\n", "scale_x_y: 'nan' is not a number"),
    "activation": (NET + lines_of(CONV, ("mish", "tanh")), "'tanh' is not supported; use one of"),
    "dilation": (NET + CONV + "dilation=2\n", "dilation: dilated convolutions"),
    "stride by axis": (NET + CONV + "stride_x=2\n", "stride_x: strides 2 and 1 differ by axis"),
    "antialiasing": (NET + CONV + "antialiasing=1\n", "antialiasing: 1 is not supported; only 0"),
    "xnor": (NET + CONV + "xnor=1\n", "xnor: 1 is not supported"),
    "share_index": (NET + CONV + "share_index=0\n", "share_index: sharing weights"),
    "dontload": (NET + CONV + "dontload=1\n", "dontload: 1 is not supported"),
    "groups": (NET + CONV + "groups=2\n", "line 5, .* 3 input channels and 8 filters do not"),
    "too small": (
        NET + lines_of(CONV, ("size=3", "size=99"), ("pad=1", "pad=0")),
        "its output would be",
    ),
    "forward": (NET + CONV + "[route]\nlayers=1\n", "line 13, .* layers: 1 names no layer before"),
    "too far back": (NET + CONV + "[route]\nlayers=-2\n", "-2 names no layer before .* layer 1"),
    "no layers key": (NET + CONV + "[route]\n", "layers= is missing"),
    "shapes": (
        NET + CONV + DOWN + "[route]\nlayers=-1,-2\n",
        "a route joins maps of equal height and width",
    ),
    "odd size": (
        lines_of(NET, ("width=64", "width=65")) + CONV + DOWN + "[route]\nlayers=-1,-2\n",
        "\\(width=65 and height=32 of \\[net\\] should be multiples",
    ),
    "weights of a shortcut": (
        NET + CONV + CONV + "[shortcut]\nfrom=-2\nweights_type=per_pixel\n",
        "line 21, .* weights_type: 'per_pixel' is not supported; use one of none, per_feature, "
        "per_channel, per_layer",
    ),
    "normalised weights": (
        NET + CONV + CONV + "[shortcut]\nfrom=-2\nweights_normalization=max\n",
        "weights_normalization: 'max' is not supported; use one of none, relu, softmax, avg_relu",
    ),
    "upsample scale": (NET + CONV + "[upsample]\nscale=2\n", "scale: scaling the values"),
    "reverse upsample": (NET + CONV + "[upsample]\nstride=-2\n", "stride: -2 is too small"),
    "pool depth": (NET + CONV + "[maxpool]\nmaxpool_depth=1\n", "maxpool_depth: 1 is not"),
    "sam activation": (NET + CONV + CONV + "[sam]\nfrom=-2\nactivation=leaky\n", "one of linear"),
    "filters": (
        NET + CONV + lines_of(DOWN, ("16", "255")) + YOLO,
        "line 18, \\[yolo\\]: classes=3 with 2 anchors in mask reads 16 channels but the layer "
        "before gives 255; set filters=16",
    ),
    "anchors": (
        NET + CONV + DOWN + lines_of(YOLO, (", 3,4", "")),
        "line 20, \\[yolo\\] anchors: num=2 asks for 4 numbers .* but there are 2",
    ),
    "no anchors": (
        NET + CONV + DOWN + lines_of(YOLO, ("anchors=1,2, 3,4\n", "")),
        "\\[yolo\\] anchors: num=2 asks for 4 numbers .* but there are 0",
    ),
    "anchor of no size": (
        NET + CONV + DOWN + lines_of(YOLO, ("3,4", "3,0")),
        "anchors must have a positive width and height",
    ),
    "anchor text": (
        NET + CONV + DOWN + lines_of(YOLO, ("1,2, 3,4", "1,2  3,4")),
        "anchors: '2  3' is not a number",
    ),
    "mask": (
        NET + CONV + DOWN + lines_of(YOLO, ("0,1", "0,2")),
        "\\[yolo\\] mask: 2 names no anchor; num=2 has 0 to 1",
    ),
    "nms": (NET + CONV + DOWN + YOLO + "nms_kind=cornersnms\n", "'cornersnms' is not supported"),
    "iou_loss": (NET + CONV + DOWN + YOLO + "iou_loss=siou\n", "iou_loss: 'siou' is not"),
    "embedding": (NET + CONV + DOWN + YOLO + "embedding_layer=1\n", "embeddings for tracking"),
    "after a head": (NET + CONV + DOWN + YOLO + CONV, "read the \\[yolo\\] layer 2; a \\[route\\]"),
    "route to a head": (
        NET + CONV + DOWN + YOLO + "[route]\nlayers=-1\n",
        "layers: -1 is a \\[yolo\\] layer",
    ),
    "size of the map": (
        lines_of(NET, ("width=64", "width=63")) + CONV + DOWN + YOLO,
        "line 1, \\[net\\]: width=63 and height=32 do not fit the \\[yolo\\] section in line 18",
    ),
    "classes disagree": (
        NET + CONV + DOWN + YOLO + "[route]\nlayers=-3\n" + DOWN + YOLO
        + "[route]\nlayers=0\n" + lines_of(DOWN, ("16", "18")) + lines_of(YOLO, ("=3\n", "=4\n")),
        "heads disagree on classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(CfgError, match=message) as error:
        parse_cfg(text, "my.cfg")
    assert str(error.value).startswith("my.cfg") and "\n" not in str(error.value)
    assert isinstance(error.value, NetworkError)


@pytest.mark.parametrize(
    "section",
    [
        "reorg3d",
        "crnn",
        "local_avgpool",
        "contrastive",
        "scale_channels",
        "Gaussian_yolo",
        "region",
    ],
)
def test_other_sections_of_darknet_are_refused_by_name(section: str) -> None:
    with pytest.raises(CfgError, match=rf"line 12, \[{section}\]: this layer is not supported"):
        parse_cfg(NET + CONV + f"[{section}]\n")


def test_what_cannot_affect_inference_is_warned_of_in_one_warning() -> None:
    text = NET + CONV + "stopbackward=800\n" + DOWN + "grad_centr=1\n[maxpool]\ndont_update=1\n"
    with pytest.warns(UserWarning) as caught:
        assert len(parse_cfg(text, "my.cfg").layers) == 3
    assert [str(warning.message) for warning in caught] == [
        "my.cfg: ignored, as it cannot affect inference: stopbackward (line 12, [convolutional]), "
        "grad_centr (line 19, [convolutional]), dont_update (line 21, [maxpool])"
    ]


def test_switches_that_are_off_are_silent() -> None:
    off = "antialiasing=0\nxnor=0\ndilation=1\nstride_x=1\nstride_y=1\ndontload=0\n"
    assert len(parse_cfg(NET + CONV + off + "[maxpool]\nmaxpool_depth=0\n").layers) == 2


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_cfg(tmp_path / "none.cfg")


def test_a_network_that_no_cfg_can_express_is_not_written() -> None:
    first = Conv(inputs=(IMAGE,), filters=4)
    jump = Network((first, Conv(inputs=(0,), filters=4), Conv(inputs=(0,), filters=4)))
    with pytest.raises(CfgError, match=r"layer 2 \(convolutional\) reads layer 0 first"):
        write_cfg(jump)
    with pytest.raises(CfgError, match="unknown key"):
        write_cfg(Network((first,), training=(("nonsense", "1"),)))


def test_a_written_network_computes_the_same() -> None:
    network = yolov4_tiny(num_classes=2, width=64, height=32, width_multiple=0.25)
    module = NetworkModule(network).eval()
    again = NetworkModule(parse_cfg(write_cfg(network))).eval()
    again.load_state_dict(module.state_dict())
    image = torch.rand(1, 3, 32, 64)
    with torch.inference_mode():
        for ours, theirs in zip(module(image), again(image), strict=True):
            assert torch.equal(ours, theirs)


def test_damaged_text_is_read_or_refused_but_never_breaks(darknet_reference: Path) -> None:
    original = (darknet_reference / "mini.cfg").read_text()
    random = Random(0)
    pieces = [
        "=",
        "[",
        "]",
        "\n",
        "-1",
        "0",
        "99999999999",
        "1e9",
        "yolo",
        "route",
        ",",
        "\x00",
        "",
    ]
    refused = 0
    for _ in range(400):
        text = original
        for _ in range(random.randint(1, 3)):
            start = random.randrange(len(text))
            text = text[:start] + random.choice(pieces) + text[start + random.randint(0, 12) :]
        try:
            network = parse_cfg(text, "my.cfg")
        except CfgError as error:
            refused += 1
            assert str(error).startswith("my.cfg") and "\n" not in str(error)
        else:
            assert parse_cfg(write_cfg(network)) == network
    assert 100 < refused < 400
