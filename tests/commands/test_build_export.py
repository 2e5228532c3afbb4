"""`yolov4-fast build` and `export`: what is written, and that it comes back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolov4_fast import Detector
from yolov4_fast.checkpoint import write_checkpoint
from yolov4_fast.cli import main
from yolov4_fast.network.architectures import by_name
from yolov4_fast.network.module import NetworkModule


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def test_build(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_build_of_a_checkpoint_and_of_an_architecture(files: Any, tmp_path: Path) -> None:
    engine = str(tmp_path / "x.engine")
    assert main(["build", "mini.safetensors", "-o", engine]) == 0
    assert Detector(engine).class_names == ("alpha", "beta", "gamma")
    words = ["build", "yolov4-tiny", "--random", "--size", "64", "--engine", "torch", "-o", engine]
    assert main(words) == 0
    assert len(Detector(engine).class_names) == 80


def test_export_to_darknet_and_back(files: Any, tmp_path: Path) -> None:
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


def test_export_to_onnx_and_to_a_checkpoint(files: Any, tmp_path: Path) -> None:
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


def test_what_darknet_cannot_hold_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = by_name("yolov4-nano", num_classes=1, width=64, height=64, activation="prelu")
    checkpoint, cfg = tmp_path / "prelu.safetensors", tmp_path / "out" / "prelu.cfg"
    write_checkpoint(checkpoint, network, NetworkModule(network).state_dict(), ("thing",))
    assert main(["export", str(checkpoint), "--format", "darknet", "-o", str(cfg)]) == 2
    assert "prelu" in capsys.readouterr().err
    assert not list(cfg.parent.glob("*"))
