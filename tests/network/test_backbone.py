"""Where the backbone of each architecture ends."""

from pathlib import Path

import pytest
import torch

from yolov4_fast.darknet.cfg import parse_cfg, read_cfg, write_cfg
from yolov4_fast.network.architectures import NAMES, by_name
from yolov4_fast.network.architectures.backbone import backbone_of
from yolov4_fast.network.layers import Conv, Network, NetworkError, Shortcut
from yolov4_fast.network.module import NetworkModule

LAYERS = {
    "yolov4": 105,  # csdarknet53-omega.conv.105
    "yolov4-nano": 105,
    "yolov4-seed-leaky": 105,
    "yolov4-seed-mish": 105,
    "yolov3": 75,  # darknet53.conv.74 and the sum after it
    "yolov3-spp": 75,
    "yolov3-tiny": 13,
    "yolov4-tiny": 27,
    "yolov4-tiny-3l": 27,
    "yolov4-csp": 99,
    "yolov4x-mish": 117,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1.0, 0.25, 1 / 32])
def test_every_architecture_at_every_width(name: str, width: float) -> None:
    fixed = name == "yolov4-nano"
    network = by_name(name, width=64, height=96, **({} if fixed else {"width_multiple": width}))
    backbone = backbone_of(network)
    assert len(backbone.layers) == LAYERS[name]
    assert backbone.layers == network.layers[: LAYERS[name]]
    channels, height, columns = backbone.shapes()[-1]
    assert (height, columns) == (3, 2)
    assert fixed or channels == max(8, (1280 if "x-mish" in name else 512 if "v4-tiny" in name
                                        else 1024) * width)  # fmt: skip
    assert (backbone.width, backbone.height, backbone.heads) == (64, 96, ())
    assert list(backbone.tensors()) == [
        key for key in network.tensors() if key in backbone.tensors()
    ]


@pytest.mark.parametrize(
    "changes",
    [{"spp": False}, {"pan": False}, {"sam": True}, {"csp": False}, {"activation": "leaky"},
     {"weighted_shortcuts": "softmax"}, {"depth_multiple": 0.33}, {"num_classes": 3}],
    ids=str,
)  # fmt: skip
def test_changes_of_yolov4(changes: dict[str, object]) -> None:
    """Those of the neck leave the backbone as it is; the others change it with the network."""
    network = by_name("yolov4", width_multiple=0.125, **changes)
    backbone = backbone_of(network)
    plain = backbone_of(by_name("yolov4", width_multiple=0.125))
    of_neck = not {"csp", "activation", "weighted_shortcuts", "depth_multiple"} & set(changes)
    assert (backbone.layers == plain.layers) == of_neck
    assert backbone.layers == network.layers[: len(backbone.layers)]
    assert backbone.shapes()[-1] == plain.shapes()[-1] == (128, 19, 19)
    neck = network.layers[len(backbone.layers)]
    assert isinstance(neck, Conv) and neck.size == 1 and neck.filters == 64
    sums = [i for i, layer in enumerate(network.layers) if isinstance(layer, Shortcut)]
    assert sums[-1] < len(backbone.layers)


def test_it_gives_the_map_that_the_neck_reads() -> None:
    network = by_name("yolov4", width=64, height=64, width_multiple=1 / 16)
    whole, cut = NetworkModule(network).eval(), NetworkModule(backbone_of(network)).eval()
    cut.load_state_dict({k: v for k, v in whole.state_dict().items() if k in cut.state_dict()})
    seen: list[torch.Tensor] = []
    whole.layers["105"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        whole(images)
        (features,) = cut(images)
    assert torch.equal(features, seen[0])


def test_a_backbone_is_its_own_and_survives_as_cfg_text() -> None:
    backbone = backbone_of(by_name("yolov4-tiny"))
    assert backbone_of(backbone) is backbone
    assert parse_cfg(write_cfg(backbone)) == backbone


def test_a_users_own_cfg(darknet_reference: Path) -> None:
    network = read_cfg(darknet_reference / "mini.cfg")
    backbone = backbone_of(network)
    assert backbone.layers == network.layers[:16]  # to the last pooling, before the neck's 1x1
    assert backbone.shapes()[-1] == (96, 8, 10)


def test_a_network_with_no_neck_to_be_seen() -> None:
    text = (
        "[net]\nwidth=32\nheight=32\nchannels=3\n"
        "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\nstride=2\npad=1\nactivation=mish\n"
        "[convolutional]\nfilters=8\nsize=1\nactivation=linear\n"
        "[yolo]\nanchors=1,2\nclasses=3\n"
    )
    network = parse_cfg(text)
    assert isinstance(network, Network)
    with pytest.raises(NetworkError, match="where the backbone ends cannot be told"):
        backbone_of(network)
