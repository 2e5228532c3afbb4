"""The command line as its users meet it: what is printed and written, and how mistakes are told."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yolov4_fast import Detector
from yolov4_fast.cli import COMMANDS, main, parser
from yolov4_fast.commands import detect

SCRIPT = Path(sys.executable).with_name("yolov4-fast")


@dataclass
class Files:
    """A folder with a user's files; also the working directory of the test."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        """files.mini_cfg -> path of mini.cfg."""
        stem, _, suffix = name.rpartition("_")
        return str(self.folder / f"{stem}.{suffix}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, darknet_reference: Path) -> Path:
    """The reference network and images, an engine of each kind, and damaged copies of them."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("mini.cfg", "mini.weights", "mini.names", "square.png", "tall.png", "wide.png"):
        shutil.copy(darknet_reference / name, folder)
    mini = [str(folder / "mini.cfg"), "--weights", str(folder / "mini.weights")]
    mini += ["--names", str(folder / "mini.names"), "--max-batch", "2"]
    assert main(["build", *mini, "-o", str(folder / "mini.engine")]) == 0
    assert main(["build", *mini, "-o", str(folder / "torch.engine"), "--engine", "torch"]) == 0
    assert main(["export", *mini[:-2], "--format", "safetensors", "-o",
                 str(folder / "mini.safetensors")]) == 0  # fmt: skip

    weights = (folder / "mini.weights").read_bytes()
    (folder / "short.weights").write_bytes(weights[:200_020])
    (folder / "nan.weights").write_bytes(weights[:4020] + b"\xff\xff\xff\xff" + weights[4024:])
    cfg = (folder / "mini.cfg").read_text()
    (folder / "typo.cfg").write_text(cfg.replace("[maxpool]", "[maxpol]"))
    (folder / "two.names").write_text("one\ntwo\n")
    engine = (folder / "mini.engine").read_bytes()
    middle = len(engine) // 2
    (folder / "cut.engine").write_bytes(engine[:middle])
    flipped = engine[:middle] + bytes([engine[middle] ^ 255]) + engine[middle + 1 :]
    (folder / "flipped.engine").write_bytes(flipped)
    with (
        zipfile.ZipFile(folder / "mini.engine") as old,
        zipfile.ZipFile(folder / "newer.engine", "w") as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                content = json.dumps(json.loads(content) | {"format_version": 99}).encode()
            new.writestr(name, content)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def files(made: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(made)
    return Files(made)


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:  # returns the one line
    """Runs a command that must fail as a user's mistake does, and leave all files as they were."""

    def run(*words: str) -> str:
        before = everything(files.folder)
        capsys.readouterr()
        try:
            status: Any = main(words)
        except SystemExit as stopped:
            status = stopped.code
        error = capsys.readouterr().err
        assert status == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
        assert "Errno" not in error and ".tmp" not in error
        assert everything(files.folder) == before
        return error

    return run


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def test_every_argument_is_explained() -> None:
    assert {command.__name__.rpartition(".")[2] for command in COMMANDS} == {
        "build", "detect", "val", "info", "export", "benchmark",
    }  # fmt: skip
    (subparsers,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in subparsers.choices.items():
        assert command.description
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"
            if action.default not in (None, False, argparse.SUPPRESS):
                assert "%(default)" in action.help, f"{name} {action.dest} hides its default"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["detect", "--help"]])
def test_help_and_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert "yolov4-fast" in capsys.readouterr().out


def test_build(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, facts = tmp_path / "new" / "mini.engine", tmp_path / "also new" / "build.json"
    words = ["build", "mini.cfg", "--weights", "mini.weights", "-o", str(output)]
    words += ["--size", "192x128", "--max-batch", "3", "--resize", "letterbox"]
    assert main([*words, "--engine", "torch", "--precision", "bf16", "--json", str(facts)]) == 0
    out, err = capsys.readouterr()
    assert "note: class names: class_0 to class_2" in out and not err
    assert "torch engine, bf16, input 192x128 (letterbox), 3 classes, up to 3 images" in out
    found = read(facts)
    assert found.pop("seconds") > 0
    assert found == {
        "engine": str(output), "kind": "torch", "precision": "bf16", "width": 192, "height": 128,
        "resize": "letterbox", "classes": ["class_0", "class_1", "class_2"], "max_batch": 3,
    }  # fmt: skip
    detector = Detector(output)
    assert (detector.engine.width, detector.engine.height, detector.resize) == (
        192, 128, "letterbox",
    )  # fmt: skip


def test_build_of_a_checkpoint_and_of_an_architecture(files: Files, tmp_path: Path) -> None:
    engine = str(tmp_path / "x.engine")
    assert main(["build", "mini.safetensors", "-o", engine]) == 0
    assert Detector(engine).class_names == ("alpha", "beta", "gamma")
    words = ["build", "yolov4-tiny", "--random", "--size", "64", "--engine", "torch", "-o", engine]
    assert main(words) == 0
    assert len(Detector(engine).class_names) == 80


def test_detect_tells_what_the_detector_finds(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["wide.png", "square.png", "tall.png"]  # more than the engine takes at once
    output = tmp_path / "new" / "found.json"
    assert main(["detect", "torch.engine", *images, "--json", str(output)]) == 0
    expected = Detector("torch.engine").detect(images)
    found = read(output)
    assert found == [
        {
            "image": name,
            "width": detections.image_size[1],
            "height": detections.image_size[0],
            "detections": [
                {
                    "class_id": class_id,
                    "class_name": ("alpha", "beta", "gamma")[class_id],
                    "score": score,
                    "box": box,
                }
                for class_id, score, box in zip(
                    detections.class_ids.tolist(),
                    detections.scores.tolist(),
                    detections.boxes.tolist(),
                    strict=True,
                )
            ],
        }
        for name, detections in zip(images, expected, strict=True)
    ]
    out, err = capsys.readouterr()
    total = sum(map(len, expected))
    assert total > 50 and f"3 images, {total} detections" in out and not err
    assert "torch engine, f32 on cpu, input 160x128 (stretch)" in out
    first = next(line for line in out.splitlines() if line.startswith("wide.png")).split()
    assert first[1] == expected[0].class_names[expected[0].class_ids[0]]
    assert float(first[2]) == pytest.approx(expected[0].scores[0], abs=6e-4)
    assert list(map(float, first[3:])) == pytest.approx(expected[0].boxes[0].tolist(), abs=0.06)


def test_detect_options(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def count(*options: str) -> int:
        output = str(tmp_path / "found.json")
        assert main(["detect", "torch.engine", "*.png", "--quiet", "--json", output, *options]) == 0
        assert "wide.png" not in capsys.readouterr().out
        return sum(len(entry["detections"]) for entry in read(output))

    usual = count()
    assert usual == count("--confidence", "0.25", "--iou", "0.45", "--resize", "stretch")
    assert 0 < count("--confidence", "0.4") < usual < count("--confidence", "0.2")
    assert 0 < count("--iou", "0.05") < usual
    assert count("--resize", "letterbox") != usual
    assert count("--confidence", "1") == 0


def test_detect_skips_what_it_cannot_read(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy("wide.png", folder / "1.png")
    (folder / "2.png").touch()
    (folder / "3.jpg").write_text("not a picture")
    shutil.copy("tall.png", folder / "4.png")
    output = tmp_path / "found.json"
    assert main(["detect", "torch.engine", str(folder), "--json", str(output)]) == 1
    out, err = capsys.readouterr()
    zero, broken = err.splitlines()
    assert zero.startswith("warning: skipped: ") and "2.png" in zero and "zero bytes" in zero
    assert broken.startswith("warning: skipped: ") and "3.jpg" in broken
    assert "2 images, " in out and "2 skipped" in out
    assert [Path(entry["image"]).name for entry in read(output)] == ["1.png", "4.png"]


def test_detect_saves_pictures_and_videos(files: Files, tmp_path: Path) -> None:
    for name, image in (("a", "wide.png"), ("b", "tall.png")):
        (tmp_path / name).mkdir()
        shutil.copy(image, tmp_path / name / "same.png")
    clip = str(tmp_path / "clip.avi")
    still = cv2.imread("square.png")
    writer = cv2.VideoWriter(clip, cv2.VideoWriter.fourcc(*"MJPG"), 12, (320, 320))
    for _ in range(5):
        writer.write(still)
    writer.release()
    saved, output = tmp_path / "out" / "pictures", tmp_path / "found.json"
    words = ["detect", "torch.engine", str(tmp_path / "a"), clip, str(tmp_path / "b")]
    assert main([*words, "--quiet", "--save", str(saved), "--json", str(output)]) == 0
    assert sorted(path.name for path in saved.iterdir()) == ["clip.mp4", "same-2.png", "same.png"]
    for name, original in (("same.png", "wide.png"), ("same-2.png", "tall.png")):
        drawn, plain = cv2.imread(str(saved / name)), cv2.imread(original)
        assert drawn.shape == plain.shape and (drawn != plain).any()
    video = cv2.VideoCapture(str(saved / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    names = [Path(entry["image"]).name for entry in read(output)]
    assert names == ["same.png", *(f"clip.avi#{i}" for i in range(5)), "same.png"]


def test_detect_interrupted_keeps_what_it_found(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chunks = detect.chunks

    def one_then_interrupt(*arguments: Any) -> Iterator[Any]:
        yield next(chunks(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(detect, "chunks", one_then_interrupt)
    output, saved = tmp_path / "found.json", tmp_path / "saved"
    words = ["detect", "torch.engine", "square.png", "tall.png", "wide.png", "--quiet"]
    assert main([*words, "--json", str(output), "--save", str(saved)]) == 130
    assert [entry["image"] for entry in read(output)] == ["square.png", "tall.png"]
    assert sorted(path.name for path in saved.iterdir()) == ["square.png", "tall.png"]
    assert "interrupted" in capsys.readouterr().out


def test_interrupted_elsewhere(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("yolov4_fast.model.open_model", interrupt)
    output = tmp_path / "x.engine"
    assert main(["build", "mini.safetensors", "-o", str(output)]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not output.exists()


@pytest.fixture
def data(files: Files, tmp_path: Path) -> Path:
    """What the engine finds at 0.35, as annotations in three formats, with one box of no area."""
    images = ["square.png", "tall.png", "wide.png"]
    names = ("alpha", "beta", "gamma")
    for folder in ("voc/Annotations", "voc/ImageSets/Main", "coco/annotations", "dark/labels"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("voc/JPEGImages", "coco/images", "dark/images"):
        (tmp_path / folder).mkdir()
        for image in images:
            shutil.copy(image, tmp_path / folder)
    stems = "".join(f"{Path(image).stem}\n" for image in images)
    for split in ("train", "val"):
        (tmp_path / f"voc/ImageSets/Main/{split}.txt").write_text(stems)
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(names)],
    }
    found = Detector("torch.engine", confidence=0.35).detect(images)
    for number, (image, detections) in enumerate(zip(images, found, strict=True)):
        height, width = detections.image_size
        objects, labels = "", ""
        for box, _, class_id, name in detections:
            x1, y1, x2, y2 = box.tolist()
            tags = zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True)
            bounds = "".join(f"<{tag}>{value:.2f}</{tag}>" for tag, value in tags)
            objects += f"<object><name>{name}</name><bndbox>{bounds}</bndbox></object>"
            cx, cy = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
            labels += f"{class_id} {cx} {cy} {(x2 - x1) / width} {(y2 - y1) / height}\n"
        if number == 0:
            objects += (
                "<object><name>beta</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>8</xmax>"
                "<ymax>8</ymax></bndbox></object>"
            )
        (tmp_path / "voc/Annotations" / f"{Path(image).stem}.xml").write_text(
            f"<annotation><filename>{image}</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
        (tmp_path / "dark/labels" / f"{Path(image).stem}.txt").write_text(labels)
        coco["images"].append(
            {"id": number, "file_name": image, "width": width, "height": height}
        )  # fmt: skip
        for entry in detections.to_coco(number, (10, 11, 12)):
            area = entry["bbox"][2] * entry["bbox"][3]
            entry |= {"id": len(coco["annotations"]) + 1, "area": area, "iscrowd": 0}
            coco["annotations"].append(entry)
    (tmp_path / "coco/annotations/instances_val.json").write_text(json.dumps(coco))
    (tmp_path / "dark/val.txt").write_text("".join(f"images/{image}\n" for image in images))
    shutil.copy("mini.names", tmp_path / "dark/my.names")
    (tmp_path / "dark/my.data").write_text("classes=3\nvalid=val.txt\nnames=my.names\n")
    return tmp_path


@pytest.mark.parametrize("source", ["voc", "coco", "dark/my.data"])
@pytest.mark.parametrize("metric", ["voc", "coco"])
def test_val(
    data: Path, source: str, metric: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if metric == "coco":
        pytest.importorskip("faster_coco_eval")
    output = tmp_path / "ap.json"
    words = ["val", "torch.engine", "--data", str(data / source), "--metric", metric]
    assert main([*words, "--json", str(output)]) == 0
    out, err = capsys.readouterr()
    result = read(output)
    assert result["mAP50"] == pytest.approx(1) and result["metric"] == metric
    assert [entry["name"] for entry in result["classes"]] == ["alpha", "beta", "gamma"]
    assert ("AP" in result) == (metric == "coco")
    if metric == "coco":
        assert result["AP"] > 0.9
    assert "mAP50 1.0000 on 3 images" in out and "gamma" in out
    if source == "voc":
        assert err.startswith("warning: 1 problem in the annotations of ")
        assert "has no area" in err and ".py" not in err and err.count("\n") == 1
    else:
        assert not err


def test_val_of_other_classes_or_splits(data: Path, refused: Callable[..., str]) -> None:
    error = refused("val", "mini.engine", "--data", str(data / "coco"), "--split", "test")
    assert "no split 'test'" in error and "instances_val" not in error and "val" in error
    assert "mini.engine" in refused("val", "mini.engine", "--data", "mini.engine")
    assert "no data set at nowhere" in refused("val", "mini.engine", "--data", "nowhere")
    (data / "dark/my.names").write_text("alpha\nbeta\ndelta\n")
    error = refused("val", "mini.engine", "--data", str(data / "dark/my.data"))
    assert "only the detector has [gamma], only the data set has [delta]" in error


@pytest.mark.parametrize("name", ["mini.cfg", "mini.safetensors", "torch.engine", "yolov4-tiny"])
def test_info(files: Files, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "info.json"
    assert main(["info", name, "--layers", "--json", str(output)]) == 0
    out, facts = capsys.readouterr().out, read(output)
    assert facts["model"] == name and len(facts["layer_list"]) == facts["layers"]
    assert sum(row["parameters"] for row in facts["layer_list"]) == facts["parameters"]
    assert f"{facts['parameters']:,}" in out and "stride 16" in out and "yolo" in out
    if name == "yolov4-tiny":
        assert (facts["num_classes"], facts["input"]) == (80, "416x416")
    else:
        assert (facts["num_classes"], facts["input"], facts["layers"]) == (3, "160x128", 33)
        assert facts["heads"][1]["anchors"] == [[8, 10], [14, 20], [22, 16]]
    assert ("engine" in facts) == name.endswith(".engine")


def test_info_of_another_size(files: Files, tmp_path: Path) -> None:
    output = tmp_path / "info.json"
    gflops = []
    for size in ("160x128", "320x256"):
        assert main(["info", "mini.cfg", "--size", size, "--json", str(output)]) == 0
        gflops.append(read(output)["gflops"])
        assert read(output)["input"] == size
    assert gflops[1] == pytest.approx(4 * gflops[0], rel=5e-3)


def test_export_to_darknet_and_back(files: Files, tmp_path: Path) -> None:
    cfg, facts = tmp_path / "out" / "again.cfg", tmp_path / "export.json"
    words = ["export", "mini.cfg", "--weights", "mini.weights", "--names", "mini.names"]
    assert main([*words, "--format", "darknet", "-o", str(cfg), "--json", str(facts)]) == 0
    weights, names = cfg.with_suffix(".weights"), cfg.with_suffix(".names")
    assert read(facts)["files"] == [str(cfg), str(weights), str(names)]
    assert weights.read_bytes() == Path("mini.weights").read_bytes()
    engine = str(tmp_path / "again.engine")
    words = ["build", str(cfg), "--weights", str(weights), "--names", str(names)]
    assert main([*words, "--engine", "torch", "-o", engine]) == 0
    (again,), (before,) = (Detector(e).detect("wide.png") for e in (engine, "torch.engine"))
    assert again.class_names == before.class_names and len(again) > 10
    np.testing.assert_array_equal(again.boxes, before.boxes)
    np.testing.assert_array_equal(again.scores, before.scores)


def test_export_to_onnx_and_to_a_checkpoint(files: Files, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    output = tmp_path / "m.onnx"
    words = ["export", "mini.safetensors", "--size", "64x32", "--format", "onnx"]
    assert main([*words, "-o", str(output)]) == 0
    model = onnx.load(output)
    onnx.checker.check_model(model)
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["N", 3, 32, 64]
    small = tmp_path / "m.safetensors"
    assert main(["export", "mini.safetensors", "--format", "safetensors", "-o", str(small)]) == 0
    assert small.stat().st_size < 0.6 * Path("mini.weights").stat().st_size
    assert small.stat().st_mode & 0o777 == output.stat().st_mode & 0o777  # readable as other files
    (found,) = Detector(_build(small, tmp_path)).detect("wide.png")
    (expected,) = Detector("torch.engine").detect("wide.png")
    assert len(found) == pytest.approx(len(expected), abs=3)  # float16 weights
    assert found.scores[:5] == pytest.approx(expected.scores[:5], abs=1e-2)


def _build(model: Path, folder: Path) -> Path:
    engine = folder / "built.engine"
    assert main(["build", str(model), "--engine", "torch", "-o", str(engine)]) == 0
    return engine


def test_benchmark(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed.json"
    words = ["benchmark", "mini.engine", "--batch", "2", "--size", "96x64", "--seconds", "1"]
    assert main([*words, "--image", "wide.png", "--json", str(output)]) == 0
    out, result = capsys.readouterr().out, read(output)
    assert (result["width"], result["height"], result["batch"]) == (96, 64, 2)
    for stage in ("resize", "network", "decode", "NMS", "end to end"):
        row = result["stages"][stage]
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["fps"] == pytest.approx(2000 / row["median_ms"])
        assert stage in out


MINI = ["mini.cfg", "--weights", "mini.weights"]
OUT = ["-o", "x.engine"]
WIDE = ["wide.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "COMMAND"),
        (["find"], "invalid choice: 'find'"),
        (["build", "nope.cfg", *OUT], "nope.cfg: No such file"),
        (["build", "nope.safetensors", *OUT], "nope.safetensors: there is no such checkpoint"),
        (["build", "mini.cfg", *OUT], "mini.cfg: has no weights of its own"),
        (["build", "mini.cfg", "--weights", "nope.weights", *OUT], "nope.weights: No such file"),
        (
            ["build", "mini.cfg", "--weights", "short.weights", *OUT],
            "108,928 floats are expected after the header, but 50,000 were found",
        ),
        (["build", "mini.cfg", "--weights", "nan.weights", *OUT], "NaN or infinity"),
        (["build", "mini.cfg", "--weights", "mini.engine", *OUT], "mini.engine: does not begin"),
        (["build", "typo.cfg", "--weights", "mini.weights", *OUT], "did you mean [maxpool]?"),
        (["build", "wide.png", *OUT], "wide.png: a model is a .cfg"),
        (["build", "mini.engine", *OUT], "mini.engine: is an engine file"),
        (["build", "mini.weights", *OUT], "give MODEL.cfg --weights mini.weights"),
        (["build", "empty", *OUT], "empty: is a folder"),
        (["build", "yolov9", *OUT], "there are yolov4, yolov4-tiny"),
        (["build", "yolov4-nano", *OUT], "--random"),
        (["build", *MINI, "--random", *OUT], "--random makes weights up"),
        (["build", "mini.safetensors", "--weights", "mini.weights", *OUT], "its own weights"),
        (["build", *MINI, "--names", "two.names", *OUT], "2 names for a network of 3 classes"),
        (["build", *MINI, "--names", "mini.weights", *OUT], "one class name a line"),
        (["build", *MINI, "--names", "mini.names", "--size", "100", *OUT], "multiples of 16"),
        (["build", *MINI, "--size", "0", *OUT], "'0' is neither N nor WIDTHxHEIGHT"),
        (["build", *MINI, "--size", "64x64x3", *OUT], "'64x64x3' is neither"),
        (["build", *MINI, "--max-batch", "0", *OUT], "'0' is not a whole number from 1 up"),
        (["build", *MINI, "--engine", "warp", *OUT], "there are openvino, torch"),
        (["build", *MINI, "--engine", "torch", "--precision", "f8", *OUT], "no precision 'f8'"),
        (["build", *MINI], "-o/--output"),
        (["build", *MINI, "-o", "empty"], "empty: is a folder"),
        (["build", *MINI, "-o", "two.names/x.engine"], "two.names: is a file, not a folder"),
        (["build", *MINI, "-o", "mini.weights"], "mini.weights: is read by this command too"),
        (["build", *MINI, *OUT, "--json", "/dev/null"], "/dev/null: is not an ordinary file"),
        (["detect", "nope.engine", *WIDE], "nope.engine"),
        (["detect", "cut.engine", *WIDE], "cut.engine: is cut short"),
        (["detect", "flipped.engine", *WIDE], "flipped.engine: model.onnx is damaged"),
        (["detect", "newer.engine", *WIDE], "is of engine format 99"),
        (["detect", "mini.safetensors", *WIDE], "not an engine file; make one"),
        (["detect", "mini.engine", "nope.png"], "nope.png"),
        (["detect", "mini.engine", "*.gif"], "*.gif"),
        (["detect", "mini.engine", "empty"], "no images or videos in the folder empty"),
        (["detect", "mini.engine", *WIDE, "--confidence", "nan"], "'nan' is not a number from 0"),
        (["detect", "mini.engine", *WIDE, "--iou", "-0.1"], "'-0.1' is not a number from 0 to 1"),
        (["detect", "mini.engine", *WIDE, "--resize", "crop"], "'crop'"),
        (["detect", "mini.engine", *WIDE, "--device", "warp"], "not on 'warp'"),
        (["detect", "torch.engine", *WIDE, "--device", "warp"], "no device 'warp'"),
        (["detect", "mini.engine", *WIDE, "--save", "two.names"], "two.names: is a file"),
        (["detect", "mini.engine", *WIDE, "--save", "."], "wide.png lies there"),
        (["detect", "mini.engine", *WIDE, "--json", "two.names/x.json"], "two.names: is a file"),
        (["detect", "mini.engine", *WIDE, "--json", "wide.png"], "wide.png: is read by"),
        (["info", "nope"], "no model is called 'nope'"),
        (["info", "cut.engine"], "cut.engine: is cut short"),
        (["info", "flipped.engine"], "flipped.engine: model.onnx is damaged"),
        (["export", *MINI, "--format", "onnx", "-o", "x.cfg"], "ends in .onnx"),
        (["export", *MINI, "--format", "darknet", "-o", "mini.cfg"], "is read by this command"),
        (["export", "mini.engine", "--format", "onnx", "-o", "x.onnx"], "is an engine file"),
        (["benchmark", "mini.engine", "--batch", "3"], "build it with --max-batch 3"),
        (["benchmark", "mini.engine", "--size", "50"], "multiples of 16"),
        (["benchmark", "mini.engine", "--image", "nope.png"], "nope.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words: list[str], told: str, refused: Callable[..., str]) -> None:
    assert told in refused(*words)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it all")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, refused: Callable[..., str]) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to" in refused("build", *MINI, "-o", str(tmp_path / "x.engine"))


def test_an_official_model_from_a_mirror_without_it(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("YOLOV4_FAST_WEIGHTS_URL", "ftp://example.org")
    assert "ftp://example.org" in refused("build", "yolov4-tiny", *OUT)
    assert not list(tmp_path.iterdir())


def test_a_warning_is_one_line(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Path("odd.cfg")
    cfg.write_text(
        Path("mini.cfg").read_text().replace("[maxpool]", "[maxpool]\nstopbackward=1", 1)
    )
    try:
        assert main(["info", str(cfg)]) == 0
    finally:
        cfg.unlink()
    error = capsys.readouterr().err
    assert error.startswith("warning: odd.cfg: ignored") and "stopbackward" in error
    assert error.count("\n") == 1 and ".py" not in error


def test_the_console_script(files: Files) -> None:
    run = subprocess.run(
        [SCRIPT, "info", "nope.engine"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: no such engine file: nope.engine\n"


def test_a_reader_that_leaves_is_no_error(files: Files) -> None:
    with subprocess.Popen(
        [SCRIPT, "info", "mini.cfg", "--layers"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout and run.stderr
        run.stdout.close()  # as `| head` does, here before the first line comes
        assert run.stderr.read() == ""
    assert run.returncode == 0


def test_closed_streams(files: Files) -> None:
    command = f"'{SCRIPT}' info mini.cfg <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from yolov4_fast.cli import parser; parser().format_help(); "
        "heavy = {'torch', 'numpy', 'cv2', 'openvino', 'onnx'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
