"""What a detector's training starts from: checkpoints of detectors and classifiers, Darknet files.

The files are written here in Darknet's format: a header, then the floats of each layer in turn.
"""

from math import prod
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from training.config import TrainConfig
from training.distributed import Processes
from training.initial import initial_state
from training.model import load_initial
from training.pretrain import main as pretrain
from training.train import main as train
from training.trainer import Trainer
from yolov4_fast.checkpoint import read_checkpoint, write_checkpoint
from yolov4_fast.darknet.cfg import read_cfg
from yolov4_fast.darknet.weights import Header, WeightsError, write_weights
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.architectures.backbone import backbone_of
from yolov4_fast.network.layers import Network
from yolov4_fast.network.module import NetworkModule


def small(name: str = "yolov4", classes: int = 3) -> Network:
    return by_name(name, num_classes=classes, width=64, height=64, width_multiple=1 / 16)


def state_of(network: Network, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return NetworkModule(network).state_dict()


def floats(network: Network, layers: int | None = None) -> int:
    """Of the weights of the first layers."""
    return sum(
        prod(shape)
        for key, shape in network.tensors().items()
        if layers is None or int(key.split(".")[1]) < layers
    )


def partial(path: Path, network: Network, state: dict[str, Tensor], layers: int) -> Path:
    """What `darknet partial` writes: the first layers of a whole file."""
    write_weights(path, network, state)
    path.write_bytes(path.read_bytes()[: Header().size + 4 * floats(network, layers)])
    return path


def classifier(
    path: Path, network: Network, state: dict[str, Tensor], classes: int, header: Header
) -> Path:
    """The backbone, and behind it the bias and the weights of a convolution to the classes."""
    backbone = backbone_of(network)
    channels = backbone.shapes()[-1][0]
    write_weights(path, backbone, state, header=header)
    with open(path, "ab") as file:
        np.full(classes * (1 + channels), 7, "<f4").tofile(file)
    return path


def assert_taken(taken: dict[str, Tensor], state: dict[str, Tensor], layers: int) -> None:
    """All weights of the first layers and no others, unchanged."""
    expected = {
        key: value
        for key, value in state.items()
        if int(key.split(".")[1]) < layers and value.dtype.is_floating_point
    }
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[key], expected[key]) for key in expected)


def test_official_partial_files_are_of_the_size_that_their_name_says() -> None:
    """Bytes of the files that are in circulation."""
    for name, layers, size in (
        ("yolov4", 137, 170_038_676),
        ("yolov3", 74, 162_482_580),
        ("yolov4-tiny", 29, 19_789_716),
    ):
        assert Header().size + 4 * floats(by_name(name), layers) == size


@pytest.mark.parametrize(
    ("file", "model", "layers"),
    [
        ("yolov4.conv.137", "yolov4", 137),
        ("csdarknet53-omega.conv.105", "yolov4", 105),
        ("darknet53.conv.74", "yolov3", 74),
        ("yolov4-tiny.conv.29", "yolov4-tiny", 29),
        ("yolov4-csp.conv.142", "yolov4-csp", 142),
        ("yolov4x-mish.conv.166", "yolov4x-mish", 166),
        ("backbone.weights", "yolov4", 105),
    ],
)
def test_the_first_layers_fit_any_number_of_classes(
    file: str, model: str, layers: int, tmp_path: Path
) -> None:
    coco = small(model, 80)
    state = state_of(coco)
    path = partial(tmp_path / file, coco, state, layers)
    taken, told = initial_state(path, small(model, 3), model)
    assert_taken(taken, state, layers)
    assert f"{len(taken)} of {len(coco.tensors())} tensors" in told


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("header", [Header(), Header(0, 1, 0)], ids=["64 bits", "32 bits"])
@pytest.mark.parametrize("model", ["yolov4", "yolov3", "yolov4-tiny"])
def test_a_classifier_gives_its_backbone(
    model: str, header: Header, classes: int, tmp_path: Path
) -> None:
    """As csdarknet53-omega_final.weights and darknet53.weights, which are for 1000 classes."""
    network = small(model)
    state = state_of(network)
    path = classifier(tmp_path / "c_final.weights", network, state, classes, header)
    taken, told = initial_state(path, network, model)
    assert_taken(taken, state, len(backbone_of(network).layers))
    assert "the backbone of a classifier" in told


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("model", ["yolov4", "yolov4-csp", "yolov3-tiny"])
def test_a_detector_for_other_classes_gives_all_but_its_heads(
    model: str, classes: int, tmp_path: Path
) -> None:
    """As yolov4.weights, which is for 80 classes."""
    given, network = small(model, classes), small(model, 3)
    state = state_of(given)
    write_weights(tmp_path / "a.weights", given, state)
    taken, told = initial_state(tmp_path / "a.weights", network, model)
    left = set(network.tensors()) - set(taken)
    heads = {head.inputs[0] for head in network.heads}
    assert left == {f"layers.{i}.conv.{kind}" for i in heads for kind in ("weight", "bias")}
    assert all(torch.equal(value, state[key]) for key, value in taken.items())
    assert f"heads, which are for {classes} classes" in told


def test_a_whole_file_gives_all(tmp_path: Path) -> None:
    network = small()
    state = state_of(network)
    write_weights(tmp_path / "a.weights", network, state)
    taken, _ = initial_state(tmp_path / "a.weights", network, "yolov4")
    assert_taken(taken, state, len(network.layers))


@pytest.mark.parametrize(
    ("file", "cut", "words"),
    [
        ("yolov4.conv.137", 4, "which end before layer 136 is complete"),
        ("yolov4.conv.138", 0, "which end before layer 137 is complete"),
        ("yolov4.conv.104", 0, "more than the 104 layers"),
        ("a.weights", 2, "which end before layer 136 is complete"),
        ("a.weights", -3, "which end before layer 137 is complete"),
    ],
)
def test_a_file_that_does_not_fit_is_named(file: str, cut: int, words: str, tmp_path: Path) -> None:
    network = small()
    path = partial(tmp_path / file, network, state_of(network), 137)
    content = path.read_bytes()
    path.write_bytes(content[:-cut] if cut > 0 else content + bytes(-cut))
    with pytest.raises(WeightsError, match=f"{file}: holds .*{words}"):
        initial_state(path, network, "yolov4")


def test_a_checkpoint_of_a_classifier_gives_its_backbone(tmp_path: Path) -> None:
    network = small()
    backbone = backbone_of(network)
    state = state_of(backbone)
    linear = {"classifier.weight": torch.ones(5, 64), "classifier.bias": torch.ones(5)}
    path = tmp_path / "best.safetensors"
    write_checkpoint(path, backbone, state | linear, tuple("abcde"))
    taken, told = initial_state(path, network, "yolov4")
    assert_taken(taken, state, 105)
    assert len(taken) == 72 * 5
    assert told == "the backbone of a classifier, 105 layers, 360 of 541 tensors"
    wider = by_name("yolov4", width_multiple=1 / 4, num_classes=3)
    for other in (wider, small("yolov3"), small("yolov4-tiny")):
        with pytest.raises(ValueError, match=r"best.safetensors: is the backbone of another netw"):
            initial_state(path, other, "other")


def test_a_classifier_of_another_activation_is_told(tmp_path: Path) -> None:
    leaky = by_name("yolov4", width=64, height=64, width_multiple=1 / 16, activation="leaky")
    backbone, path = backbone_of(leaky), tmp_path / "best.safetensors"
    linear = {"classifier.weight": torch.ones(2, 64), "classifier.bias": torch.ones(2)}
    write_checkpoint(path, backbone, state_of(backbone) | linear, ("a", "b"))
    _, told = initial_state(path, small(), "yolov4")
    assert told.endswith("; but layer 0 was trained with leaky, and yolov4 has mish there")
    assert "but" not in initial_state(path, leaky, "yolov4")[1]


def test_a_checkpoint_of_a_detector_gives_what_fits(tmp_path: Path) -> None:
    given, network = small(classes=80), small()
    state = state_of(given)
    path = tmp_path / "best.safetensors"
    write_checkpoint(path, given, state, tuple(map(str, range(80))))
    taken, told = initial_state(path, network, "yolov4")
    assert told == "535 of 541 tensors" and len(taken) == 535
    assert all(torch.equal(value, state[key]) for key, value in taken.items())
    with pytest.raises(ValueError, match=r"is of another network: only \d+ of 99 tensors fit tiny"):
        initial_state(path, small("yolov4-tiny"), "tiny")


def test_files_that_are_not_there_or_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a.weights").write_bytes(b"<html>not found</html>" * 20)
    with pytest.raises(WeightsError, match="does not begin like"):
        initial_state(tmp_path / "a.weights", small(), "yolov4")
    for name in ("b.weights", "b.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"b.{name[2:]}"):
            initial_state(tmp_path / name, small(), "yolov4")


def test_a_detector_begins_with_the_backbone_that_was_pretrained(
    mini_command: list[str],
    darknet_reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole way: python -m training.pretrain, then python -m training.train --weights."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for number in range(3):
                picture = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / "pictures" / split / name / f"{number}.png"), picture)
    model = str(darknet_reference / "mini.cfg")
    best = tmp_path / "pretrained/best.safetensors"
    assert not pretrain([
        "--data", str(tmp_path / "pictures"), "--output", str(best.parent), "--model", model,
        "--size", "80x64", "--epochs", "1", "--batch", "2", "--dropblock", "0", "--workers", "0",
        "--device", "cpu",
    ])  # fmt: skip
    given = read_checkpoint(best).state
    network = read_cfg(model)
    trainer = Trainer(TrainConfig(model=model), network, 1, Processes(torch.device("cpu")))
    told = load_initial(trainer, best)
    assert told == f"{best}: took the backbone of a classifier, 16 layers, 50 of 74 tensors"
    backbone = {key for key in given if not key.startswith("classifier.")}
    assert len(backbone) == 50
    for state in (trainer.module.state_dict(), trainer.average.state):
        assert all(torch.equal(state[key], given[key]) for key in backbone)
    capsys.readouterr()
    rate = ["--epochs", "1", "--learning-rate", "1e-12", "--ema-decay", "0", "--weights", str(best)]
    assert train([*mini_command, *rate, "--mosaic-off-epochs", "0"]) == 0
    assert told in capsys.readouterr().out
    trained = read_checkpoint(tmp_path / "run/last.safetensors").state
    for key in backbone:
        if "running" not in key:  # statistics follow the pictures at once
            torch.testing.assert_close(trained[key], given[key], atol=1e-6, rtol=1e-6)
