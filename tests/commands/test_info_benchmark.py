"""`yolov4-fast info` and `benchmark`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast.cli import main


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize("name", ["mini.cfg", "mini.safetensors", "torch.engine", "yolov4-tiny"])
def test_info(files: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_info_of_another_size(files: Any, tmp_path: Path) -> None:
    output = tmp_path / "info.json"
    gflops = []
    for size in ("160x128", "320x256"):
        assert main(["info", "mini.cfg", "--size", size, "--json", str(output)]) == 0
        gflops.append(read(output)["gflops"])
        assert read(output)["input"] == size
    assert gflops[1] == pytest.approx(4 * gflops[0], rel=5e-3)


def test_benchmark(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
