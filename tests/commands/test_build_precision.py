"""`yolov4-fast build`: precisions, devices, and calibration with the loss of AP it tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from yolov4_fast import Detector
from yolov4_fast.cli import main
from yolov4_fast.commands import calibration
from yolov4_fast.commands.calibration import open_calibration
from yolov4_fast.engines import torch_engine
from yolov4_fast.engines.bundle import read_bundle
from yolov4_fast.engines.torch_engine import TorchEngine

MINI = ["mini.cfg", "--weights", "mini.weights", "--names", "mini.names"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Lets the torch engine have an fp8, which is bfloat16 in truth; returns what it calibrates
    with.
    """
    images: list[Tensor] = []

    def calibrate(
        cls: type,
        manifest: object,
        state: object,
        given: Iterable[Tensor],
        device: object,
        method: object,
    ) -> dict:
        images.extend(given)
        return {}

    monkeypatch.setattr(TorchEngine, "precisions", (*TorchEngine.precisions, "fp8"))
    monkeypatch.setitem(torch_engine.DTYPES, "fp8", torch.bfloat16)
    monkeypatch.setattr(TorchEngine, "calibrate", classmethod(calibrate))
    return images


@pytest.fixture
def voc(files: Any, tmp_path: Path) -> Path:
    """A VOC folder, one picture to train on and two to evaluate on, of what is found in them."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    names = ["square", "tall", "wide"]
    found = Detector("torch.engine", confidence=0.35).detect([f"{name}.png" for name in names])
    for name, detections in zip(names, found, strict=True):
        shutil.copy(f"{name}.png", tmp_path / "voc/JPEGImages")
        height, width = detections.image_size
        objects = ""
        for box, _, _, label in detections:
            tags = zip(("xmin", "ymin", "xmax", "ymax"), box.tolist(), strict=True)
            bounds = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value in tags)
            objects += f"<object><name>{label}</name><bndbox>{bounds}</bndbox></object>"
        (tmp_path / f"voc/Annotations/{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
    (tmp_path / "voc/ImageSets/Main/train.txt").write_text("square\n")
    (tmp_path / "voc/ImageSets/Main/val.txt").write_text("tall\nwide\n")
    return tmp_path / "voc"


def build(output: Path, *words: str) -> int:
    return main(["build", *MINI, "--engine", "torch", "-o", str(output), *words])


@pytest.mark.parametrize(("precision", "told"), [("fp32", "f32"), ("f32", "f32"), ("bf16", "bf16")])
def test_precisions(
    files: Any, tmp_path: Path, precision: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tmp_path / "x.engine", "--precision", precision, "--device", "cpu") == 0
    assert f"torch engine, {told}, input" in capsys.readouterr().out
    assert Detector(tmp_path / "x.engine").engine.precision == told


def test_calibrated_with_a_data_set_the_loss_of_ap_is_told(
    files: Any, voc: Path, seen: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts.json"
    words = ["--precision", "fp8", "--calibrate", str(voc), "--json", str(facts)]
    assert build(tmp_path / "x.engine", *words) == 0
    assert [list(image.shape) for image in seen] == [[1, 3, 128, 160]]  # the one to train on
    assert seen[0].dtype == torch.float32
    assert -1e-6 < seen[0].min() < seen[0].max() < 1 + 1e-6
    told = json.loads(facts.read_text())["AP50"]
    assert set(told) == {"images", "f32", "fp8", "loss"} and told["images"] == 2
    assert told["f32"] == 1.0 >= told["fp8"] > 0.5  # the annotations are what f32 finds
    assert told["loss"] == pytest.approx(told["f32"] - told["fp8"])
    out = capsys.readouterr().out
    assert f"AP50 on 2 images of {voc}: 1.0000 in f32, {told['fp8']:.4f} in fp8, a loss of" in out


def test_calibrated_with_a_folder_nothing_is_measured(
    files: Any, seen: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("tall.png", "wide.png"):
        shutil.copy(name, tmp_path / "pictures")
    words = ["--precision", "fp8", "--calibrate", str(tmp_path / "pictures")]
    assert build(tmp_path / "x.engine", *words) == 0
    assert len(seen) == 2
    assert "AP50" not in capsys.readouterr().out


def test_int8_is_of_a_folder_by_the_method_that_is_named(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    shutil.copy("wide.png", tmp_path / "pictures")
    output = tmp_path / "x.engine"
    words = ["--precision", "int8", "--calibrate", str(tmp_path / "pictures")]
    model = ["build", *MINI, "--engine", "openvino", "-o", str(output)]
    scales = []
    for method in ("minmax", "entropy"):
        assert main([*model, *words, "--calibration-method", method]) == 0
        assert "openvino engine, int8, input" in capsys.readouterr().out
        scales.append(read_bundle(output).payload["model.onnx"])
    assert scales[0] != scales[1]
    assert len(Detector(output).detect("wide.png")[0]) > 0


def test_many_pictures_are_thinned_out_evenly(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "IMAGES", 4)
    (tmp_path / "pictures").mkdir()
    for number in range(11):
        shutil.copy("wide.png", tmp_path / "pictures" / f"{number:02}.png")
    chosen = open_calibration(str(tmp_path / "pictures"))
    assert [path.stem for path in chosen.paths] == ["00", "02", "05", "08"]
    assert chosen.dataset is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--precision", "fp16", "--calibrate", "pics"], "fp16 needs no calibration images: only"),
        (["--precision", "fp8"], "torch engine has no precision 'fp8'"),
        (["--precision", "int8"], "torch engine has no precision 'int8'"),
        (["--calibration-method", "minmax"], "for precision int8, not for f32"),
        (["--workspace", "64"], "--workspace: only for --engine tensorrt"),
        (["--device", "warp"], "no device 'warp'"),
        (["--calibrate", "mini.cfg"], "nor is it a folder of pictures"),
        (["--calibrate", "empty"], "no images or videos in the folder empty"),
        (["--calibrate", "nope"], "no such file, folder, camera or stream: nope"),
    ],
)
def test_mistakes(words: list[str], told: str, files: Any, refused: Callable[..., str]) -> None:
    Path("pics").mkdir(exist_ok=True)
    shutil.copy("wide.png", "pics")
    assert told in refused("build", *MINI, "--engine", "torch", "-o", "x.engine", *words)


def test_classes_that_differ_are_told_before_the_work(
    files: Any, voc: Path, seen: list[Tensor], refused: Callable[..., str]
) -> None:
    words = ["mini.cfg", "--weights", "mini.weights", "--engine", "torch", "--precision", "fp8"]
    error = refused("build", *words, "--calibrate", str(voc), "-o", "x.engine")
    assert "the classes of the detector (3) and of the data set (3) differ" in error
    assert not seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(files: Any, refused: Callable[..., str]) -> None:
    for device in ([], ["--device", "cuda:1"]):
        words = ["build", *MINI, "--engine", "cuda", *device, "-o", "x.engine"]
        assert "the cuda engine needs an NVIDIA GPU, and here" in refused(*words)
