"""Darknet weights files: byte-exact both ways, and what is said of one that does not fit."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from yolov4_fast.darknet.cfg import parse_cfg, read_cfg
from yolov4_fast.darknet.names import read_names
from yolov4_fast.darknet.weights import (
    Header,
    WeightsError,
    read_backbone,
    read_header,
    read_weights,
    write_weights,
)
from yolov4_fast.network.architectures import yolov4
from yolov4_fast.network.fold import fold
from yolov4_fast.network.layers import IMAGE, Conv, Network, Shortcut
from yolov4_fast.network.module import NetworkModule

# Layer 0: 4 BN filters over 3 channels (4 * (4 + 27) floats), 1: grouped, 2: biased.
NETWORK = parse_cfg(
    "[net]\nwidth=8\nheight=8\nchannels=3\n"
    "[convolutional]\nbatch_normalize=1\nfilters=4\nsize=3\npad=1\nactivation=mish\n"
    "[convolutional]\nbatch_normalize=1\nfilters=2\nsize=1\ngroups=2\nactivation=leaky\n"
    "[maxpool]\nsize=2\nstride=2\n"
    "[convolutional]\nfilters=8\nsize=1\nactivation=linear\n"
    "[yolo]\nanchors=1,2\nclasses=3\n"
)
SIZES = (4 * (4 + 27), 2 * (4 + 2), 8 * (1 + 2))
FLOATS = sum(SIZES)


def values(count: int = FLOATS) -> np.ndarray:
    return (np.arange(count) + 1).astype("<f4")


def save(path: Path, floats: np.ndarray, header: Header | None = None, tail: bytes = b"") -> Path:
    path.write_bytes((header or Header()).pack() + floats.tobytes() + tail)
    return path


def test_the_reference_is_rewritten_byte_for_byte(darknet_reference: Path, tmp_path: Path) -> None:
    original = darknet_reference / "mini.weights"
    network = read_cfg(darknet_reference / "mini.cfg")
    state = read_weights(original, network)
    assert sum(tensor.numel() for tensor in state.values()) == 108_928
    write_weights(tmp_path / "out.weights", network, state)
    assert (tmp_path / "out.weights").read_bytes() == original.read_bytes()


def test_the_state_dict_loads_strictly_and_owns_its_memory(darknet_reference: Path) -> None:
    network = read_cfg(darknet_reference / "mini.cfg")
    state = read_weights(darknet_reference / "mini.weights", network)
    module = NetworkModule(network)
    module.load_state_dict(state, strict=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    state["layers.0.bn.bias"].zero_()
    assert module.state_dict()["layers.0.bn.bias"].abs().sum() > 0


def test_floats_go_where_they_belong(tmp_path: Path) -> None:
    state = read_weights(save(tmp_path / "a.weights", values()), NETWORK)
    order = [("bn.bias", 4), ("bn.weight", 4), ("bn.running_mean", 4), ("bn.running_var", 4)]
    start = 1.0
    for key, count in order:
        tensor = state[f"layers.0.{key}"]
        assert tensor.tolist() == list(np.arange(start, start + count))
        start += count
    assert state["layers.0.conv.weight"].shape == (4, 3, 3, 3)
    assert state["layers.0.conv.weight"].flatten()[0] == 17
    assert state["layers.1.conv.weight"].shape == (2, 2, 1, 1)
    first_bias = SIZES[0] + SIZES[1] + 1
    assert state["layers.3.conv.bias"].tolist() == list(range(first_bias, first_bias + 8))
    assert state["layers.3.conv.weight"].flatten()[-1] == FLOATS


@pytest.mark.parametrize(
    "header",
    [Header(0, 2, 5, 12_345_678_901), Header(0, 1, 0, 4_000_000_000), Header(1, 0, 3, 7)],
    ids=["64 bits", "32 bits", "version 1"],
)
def test_headers_are_kept(header: Header, tmp_path: Path) -> None:
    assert header.size == (16 if header.minor == 1 else 20)
    path = save(tmp_path / "a.weights", values(), header)
    assert read_header(path) == header
    write_weights(
        tmp_path / "b.weights", NETWORK, read_weights(path, NETWORK), header=read_header(path)
    )
    assert (tmp_path / "b.weights").read_bytes() == path.read_bytes()


def test_the_images_seen_are_written(tmp_path: Path) -> None:
    state = read_weights(save(tmp_path / "a.weights", values()), NETWORK)
    write_weights(tmp_path / "b.weights", NETWORK, state, seen=2**33)
    assert (tmp_path / "b.weights").read_bytes()[:20] == struct.pack("<iiiQ", 0, 2, 5, 2**33)


def test_a_folded_network_is_written_and_read(tmp_path: Path) -> None:
    state = read_weights(save(tmp_path / "a.weights", values()), NETWORK)
    folded, folded_state = fold(NETWORK, state)
    write_weights(tmp_path / "b.weights", folded, folded_state)
    again = read_weights(tmp_path / "b.weights", folded)
    assert again.keys() == folded_state.keys()
    assert all(torch.equal(again[key], folded_state[key]) for key in again)


@pytest.mark.parametrize(
    ("count", "layer"), [(0, 0), (SIZES[0] - 1, 0), (SIZES[0], 1), (FLOATS - 1, 3)]
)
def test_a_truncated_file(count: int, layer: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.weights", values(count))
    message = rf"a.weights: {FLOATS} floats are expected .*, but {count} were .* layer {layer} of 5"
    with pytest.raises(WeightsError, match=message):
        read_weights(path, NETWORK)


def test_a_file_cut_within_a_float(tmp_path: Path) -> None:
    path = save(tmp_path / "a.weights", values(FLOATS - 1), tail=b"abc")
    with pytest.raises(WeightsError, match=f"but {FLOATS - 1} and 3 bytes were found.* layer 3"):
        read_weights(path, NETWORK)


@pytest.mark.parametrize("tail", [b"a", b"abcd"])
def test_a_file_that_is_too_long(tail: bytes, tmp_path: Path) -> None:
    path = save(tmp_path / "a.weights", values(), tail=tail)
    with pytest.raises(WeightsError, match=f"{FLOATS} floats are expected .* goes on after"):
        read_weights(path, NETWORK)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"12345678901", "too short"),
        (struct.pack("<iii", 0, 2, 5) + b"1234", "too short"),
        (b"<html><body>Not Found</body></html>", "does not begin like"),
        (struct.pack("<iii", -1, 2, 5) + bytes(100), "does not begin like"),
    ],
)
def test_a_file_that_holds_no_weights(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.weights"
    path.write_bytes(content)
    for read in (read_weights, read_backbone):
        with pytest.raises(WeightsError, match=message):
            read(path, NETWORK)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_by_layer(bad: float, tmp_path: Path) -> None:
    floats = values()
    floats[SIZES[0] + 9] = bad
    path = save(tmp_path / "a.weights", floats)
    with pytest.raises(WeightsError, match=r"layer 1 \(layers.1.conv.weight\) holds NaN"):
        read_weights(path, NETWORK)


def test_a_negative_variance_is_named(tmp_path: Path) -> None:
    floats = values()
    floats[13] = -1
    with pytest.raises(WeightsError, match="layer 0 has a negative variance"):
        read_weights(save(tmp_path / "a.weights", floats), NETWORK)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.weights", NETWORK)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.weights", values())
    before = path.read_bytes()
    state = read_weights(path, NETWORK)
    wrong = {
        "have no layers.1.bn.weight": {k: v for k, v in state.items() if k != "layers.1.bn.weight"},
        r"bn.bias is \(5,\), not \(4,\)": state | {"layers.0.bn.bias": torch.zeros(5)},
        "layer 3: layers.3.conv.bias holds NaN": state
        | {"layers.3.conv.bias": torch.full((8,), torch.nan)},
    }
    for message, bad in wrong.items():
        with pytest.raises(WeightsError, match=message):
            write_weights(path, NETWORK, bad)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.weights"]


def test_half_precision_is_written_as_float32(tmp_path: Path) -> None:
    state = read_weights(save(tmp_path / "a.weights", values()), NETWORK)
    halved = {key: tensor.half() for key, tensor in state.items()}
    write_weights(tmp_path / "b.weights", NETWORK, halved)
    assert torch.equal(
        read_weights(tmp_path / "b.weights", NETWORK)["layers.0.bn.bias"], torch.arange(1.0, 5.0)
    )


class TestWeightedShortcuts:
    """Darknet writes the weights of a shortcut where the shortcut stands among the layers."""

    NETWORK = parse_cfg(
        "[net]\nwidth=8\nheight=8\nchannels=3\n"
        + "[convolutional]\nfilters=2\nactivation=leaky\n" * 3
        + "[shortcut]\nfrom=-2,-3\nweights_type=per_feature\nweights_normalization=relu\n"
        "[convolutional]\nfilters=2\nactivation=leaky\n"
        "[shortcut]\nfrom=-2\nweights_type=per_channel\nweights_normalization=softmax\n"
        "[shortcut]\nfrom=-2\n"
    )
    CONVS = (2 * (1 + 3), 2 * (1 + 2), 2 * (1 + 2))
    COUNT = sum(CONVS) + 3 + 6 + 4

    def test_floats_go_where_they_belong(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.weights", values(self.COUNT))
        state = read_weights(path, self.NETWORK)
        begin = sum(self.CONVS)
        assert state["layers.3.weights"].tolist() == [begin + 1, begin + 2, begin + 3]
        begin += 3
        assert state["layers.4.conv.bias"].tolist() == [begin + 1, begin + 2]
        begin += 6
        assert state["layers.5.weights"].tolist() == [
            [begin + 1, begin + 2],
            [begin + 3, begin + 4],
        ]
        assert set(state) == set(self.NETWORK.tensors())
        NetworkModule(self.NETWORK).load_state_dict(state, strict=True)
        write_weights(tmp_path / "b.weights", self.NETWORK, state)
        assert (tmp_path / "b.weights").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("missing", [1, 5])
    def test_a_truncated_file(self, missing: int, tmp_path: Path) -> None:
        path = save(tmp_path / "a.weights", values(self.COUNT - missing))
        layer = 5 if missing < 4 else 4
        with pytest.raises(WeightsError, match=f"the file ends in layer {layer} of 7"):
            read_weights(path, self.NETWORK)

    def test_a_backbone_counts_convolutions(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.conv.4", values(sum(self.CONVS) + 3))
        state, loaded = read_backbone(path, self.NETWORK)
        assert loaded == 3 and "layers.3.weights" in state

    def test_values_that_are_not_finite(self, tmp_path: Path) -> None:
        floats = values(self.COUNT)
        floats[-1] = np.nan
        with pytest.raises(WeightsError, match=r"layer 5 \(layers.5.weights\) holds NaN"):
            read_weights(save(tmp_path / "a.weights", floats), self.NETWORK)


@pytest.mark.parametrize("layer", [Conv, Shortcut])
def test_slopes_have_no_place_in_a_file(layer: type, tmp_path: Path) -> None:
    first = Conv(inputs=(IMAGE,), filters=3, activation="prelu" if layer is Conv else "mish")
    second = Shortcut(inputs=(0, 0), activation="mish" if layer is Conv else "prelu")
    network = Network((first, second))
    key = rf"layers\.{0 if layer is Conv else 1}\.slope"
    with pytest.raises(WeightsError, match=rf"a.weights: .* no place for {key}.*safetensors"):
        write_weights(tmp_path / "a.weights", network, NetworkModule(network).state_dict())
    assert not list(tmp_path.iterdir())
    floats = values(first.filters * (4 + 3))
    with pytest.raises(WeightsError, match=f"no place for {key}"):
        read_weights(save(tmp_path / "b.weights", floats), network)
    state, loaded = read_backbone(save(tmp_path / "c.weights", floats), network)
    assert loaded == 1 and not any(name.endswith("slope") for name in state)


class TestBackbone:
    """Files such as yolov4.conv.137: the first layers of a network."""

    @pytest.mark.parametrize(
        ("count", "convolutions"), [(SIZES[0], 1), (SIZES[0] + SIZES[1], 2), (FLOATS, 3)]
    )
    def test_whole_convolutions_are_taken(
        self, count: int, convolutions: int, tmp_path: Path
    ) -> None:
        state, loaded = read_backbone(save(tmp_path / "backbone.bin", values(count)), NETWORK)
        assert loaded == convolutions
        assert sum(tensor.numel() for tensor in state.values()) == count
        NetworkModule(NETWORK).load_state_dict(state, strict=False)

    @pytest.mark.parametrize("count", [0, 5, SIZES[0] + 1, FLOATS - 1])
    def test_an_end_within_a_convolution(self, count: int, tmp_path: Path) -> None:
        path = save(tmp_path / "backbone.bin", values(count))
        with pytest.raises(WeightsError, match=r"end before layer \d is complete|no whole"):
            read_backbone(path, NETWORK)

    def test_the_number_in_the_name_must_agree(self, tmp_path: Path) -> None:
        whole = values(SIZES[0] + SIZES[1])
        assert read_backbone(save(tmp_path / "x.conv.2", whole), NETWORK)[1] == 2
        assert read_backbone(save(tmp_path / "x.conv.3", whole), NETWORK)[1] == 2
        with pytest.raises(WeightsError, match=f"{SIZES[1]} more than the 1 layers"):
            read_backbone(save(tmp_path / "x.conv.1", whole), NETWORK)
        with pytest.raises(WeightsError, match="before layer 3 is complete, but 4 layers are"):
            read_backbone(save(tmp_path / "x.conv.4", whole), NETWORK)

    def test_a_longer_file_is_cut_only_when_asked(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.weights", values(FLOATS + 3))
        with pytest.raises(WeightsError, match="3 more than the 5 layers"):
            read_backbone(path, NETWORK)
        state, loaded = read_backbone(path, NETWORK, layers=3)
        assert loaded == 2 and "layers.3.conv.weight" not in state

    def test_137_layers_of_yolov4_fit_any_number_of_classes(self, tmp_path: Path) -> None:
        """At an eighth of the width: 137 layers are all before the first head's convolutions."""
        coco = yolov4(80, 64, 64, width_multiple=0.125)
        path = tmp_path / "full.weights"
        write_weights(path, coco, NetworkModule(coco).state_dict())
        state, loaded = read_backbone(path, yolov4(3, 64, 64, width_multiple=0.125), layers=137)
        assert loaded == 92
        assert max(int(key.split(".")[1]) for key in state) == 136


def test_a_layer_that_reads_the_image_twice_over(tmp_path: Path) -> None:
    """Weights follow the order of layers, not of what reads what."""
    network = Network((Conv(inputs=(IMAGE,), filters=2), Conv(inputs=(IMAGE,), filters=2)))
    state = NetworkModule(network).state_dict()
    write_weights(tmp_path / "a.weights", network, state)
    again = read_weights(tmp_path / "a.weights", network)
    assert all(torch.equal(again[key], state[key]) for key in again)


class TestNames:
    def test_names_are_read(self, darknet_reference: Path, tmp_path: Path) -> None:
        assert read_names(darknet_reference / "mini.names") == ("alpha", "beta", "gamma")
        path = tmp_path / "a.names"
        path.write_bytes("\ufefftraffic light\r\n caf\u00e9 \r\n\r\n\r\n".encode())
        assert read_names(path) == ("traffic light", "caf\u00e9")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no class names"),
            (b"\n\n", "no class names"),
            (b"a\n\nb\n", "line 2: is blank"),
            (b"\xff\xfe\x00", "not UTF-8"),
        ],
    )
    def test_files_that_name_no_classes(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "a.names"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_names(path)
