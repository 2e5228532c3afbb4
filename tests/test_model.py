"""What a user can name as a model."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from yolov4_fast import zoo
from yolov4_fast.checkpoint import write_checkpoint
from yolov4_fast.darknet.cfg import write_cfg
from yolov4_fast.darknet.weights import write_weights
from yolov4_fast.detector import Detector
from yolov4_fast.engines import build_engine
from yolov4_fast.model import Model, ModelError, open_model, open_network, random_state
from yolov4_fast.network.architectures import NAMES, by_name
from yolov4_fast.network.module import NetworkModule


@pytest.fixture
def checkpoint(mini: Any, tmp_path: Path) -> Path:
    path = tmp_path / "mini.safetensors"
    write_checkpoint(path, mini.network, mini.state, ("a", "b", "c"))
    return path


def assert_mini(model: Model, mini: Any) -> None:
    assert model.network.layers == mini.network.layers
    for name, value in mini.state.items():
        torch.testing.assert_close(model.state[name], value, rtol=0, atol=0)


def test_cfg_with_weights(mini: Any, darknet_reference: Path) -> None:
    files = [darknet_reference / f"mini.{suffix}" for suffix in ("cfg", "weights", "names")]
    model = open_model(str(files[0]), weights=files[1], names=files[2])
    assert_mini(model, mini)
    assert model.class_names == mini.class_names and not model.notes


def test_cfg_without_names_says_what_it_calls_the_classes(darknet_reference: Path) -> None:
    model = open_model(
        str(darknet_reference / "mini.cfg"), weights=darknet_reference / "mini.weights"
    )
    assert model.class_names == ("class_0", "class_1", "class_2")
    assert "class_0 to class_2" in model.notes[0]


def test_checkpoint(mini: Any, checkpoint: Path, darknet_reference: Path) -> None:
    model = open_model(str(checkpoint))
    assert_mini(model, mini)
    assert model.class_names == ("a", "b", "c") and not model.notes
    named = open_model(str(checkpoint), names=darknet_reference / "mini.names")
    assert named.class_names == mini.class_names


def test_weights_of_a_checkpoint_for_a_cfg(
    mini: Any, checkpoint: Path, darknet_reference: Path
) -> None:
    assert_mini(open_model(str(darknet_reference / "mini.cfg"), weights=checkpoint), mini)
    with pytest.raises(ModelError, match="trained with another network than yolov4-nano"):
        open_model("yolov4-nano", weights=checkpoint)


def test_size(mini: Any, checkpoint: Path) -> None:
    model = open_model(str(checkpoint), size=(64, 32))
    assert (model.network.width, model.network.height) == (64, 32)
    with pytest.raises(ValueError, match="multiples of 16"):
        open_model(str(checkpoint), size=(64, 30))


def test_a_network_without_a_head_is_refused(tmp_path: Path) -> None:
    cfg = tmp_path / "backbone.cfg"
    cfg.write_text("[net]\nwidth=32\nheight=32\nchannels=3\n[convolutional]\nfilters=4\n")
    with pytest.raises(ModelError, match=r"no \[yolo\] head"):
        open_model(str(cfg), random=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_found_by_name(name: str) -> None:
    assert open_network(name).layers == by_name(name).layers


@pytest.mark.parametrize("name", ["yolov4", "yolov4-nano", "no-such-model", "x.onnx", "a.engine"])
def test_nothing_is_made_up_or_fetched_unasked(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(zoo.BASE_URL_VARIABLE, f"file://{tmp_path}/nowhere")
    expected = zoo.FetchError if name in zoo.OFFICIAL else ModelError
    monkeypatch.setattr(zoo, "RETRY_DELAYS", ())
    with pytest.raises(expected):
        open_model(name)


def test_names_and_size_are_checked_before_weights_are_fetched(
    darknet_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(name: str) -> Path:
        raise AssertionError("fetched")

    monkeypatch.setattr(zoo, "fetch", fetch)
    with pytest.raises(ModelError, match="3 names for a network of 80 classes"):
        open_model("yolov4-tiny", names=darknet_reference / "mini.names")
    with pytest.raises(ValueError, match="multiples of 32"):
        open_model("yolov4-tiny", size=(100, 100))


def test_official_weights_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way of `build yolov4-tiny`, with weights of our own in the place of the official
    ones.
    """
    network = by_name("yolov4-tiny")
    state = random_state(network)
    mirror = tmp_path / "mirror" / "yolov4" / "yolov4-tiny.weights"
    write_weights(mirror, network, state)
    content = mirror.read_bytes()
    assert len(content) == zoo.OFFICIAL["yolov4-tiny"].size  # the official file's layout
    ours = replace(
        zoo.OFFICIAL["yolov4-tiny"], sha256=(hashlib.sha256(content).hexdigest(),)
    )  # fmt: skip
    monkeypatch.setitem(zoo.OFFICIAL, "yolov4-tiny", ours)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(zoo.BASE_URL_VARIABLE, f"file://{tmp_path}/mirror")
    model = open_model("yolov4-tiny", size=(64, 64))
    assert model.class_names == zoo.COCO_NAMES and model.network.width == 64
    cached = tmp_path / "cache" / "yolov4_fast" / "yolov4-tiny.weights"
    assert any(str(cached) in note for note in model.notes)
    key = "layers.0.conv.weight"
    torch.testing.assert_close(model.state[key], state[key], rtol=0, atol=0)
    shutil.rmtree(tmp_path / "mirror")
    assert open_model("yolov4-tiny").notes == model.notes  # from the cache


def test_random_weights(tmp_path: Path) -> None:
    first, again = (random_state(by_name("yolov4-nano"), seed=3) for _ in range(2))
    other = random_state(by_name("yolov4-nano"), seed=4)
    key = "layers.0.conv.weight"
    assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])
    model = open_model("yolov4-nano", random=True, size=(128, 128))
    module = NetworkModule(model.network).eval()
    module.load_state_dict(model.state)
    with torch.no_grad():
        maps = module(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    assert all(bool(raw.isfinite().all()) and float(raw.abs().max()) < 50 for raw in maps)
    engine = build_engine(model.network, model.state, model.class_names, engine="torch")
    (found,) = Detector(engine).detect(torch.rand(3, 90, 120))
    assert len(found) == 0


def test_random_does_not_disturb_the_callers_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    random_state(by_name("yolov3-tiny", width=64, height=64))
    assert torch.equal(torch.rand(3), expected)


def test_a_cfg_may_be_written_from_any_architecture_and_read_again(tmp_path: Path) -> None:
    cfg = tmp_path / "tiny.cfg"
    cfg.write_text(write_cfg(by_name("yolov4-tiny", num_classes=7)))
    assert open_network(str(cfg)).num_classes == 7
