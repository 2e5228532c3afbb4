"""What `yolov4-fast info` says of the cuda engine: steps and memory, known before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yolov4_fast.cli import main


@pytest.mark.parametrize("name", ["mini.cfg", "torch.engine", "yolov4-csp"])
def test_steps_and_memory_are_told(
    files: object, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "info.json"
    assert main(["info", name, "--json", str(output)]) == 0
    cuda = json.loads(output.read_text())["cuda"]
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("cuda "))
    assert f"{cuda['steps']} steps" in line and f"{cuda['arena_mb']['1']:.1f} MB at batch 1" in line
    assert cuda["arena_mb"]["32"] == pytest.approx(32 * cuda["arena_mb"]["1"], rel=0.02)
    # mini.cfg: 16 convolutions, two of them merged, a pyramid, a pooling and an upsampling.
    assert cuda["steps"] == (109 if name == "yolov4-csp" else 18)


def test_memory_grows_with_the_input(files: object, tmp_path: Path) -> None:
    arenas = []
    for size in ("160x128", "320x256"):
        output = tmp_path / f"{size}.json"
        assert main(["info", "mini.cfg", "--size", size, "--json", str(output)]) == 0
        arenas.append(json.loads(output.read_text())["cuda"]["arena_mb"]["32"])
    assert arenas[1] == pytest.approx(4 * arenas[0], rel=0.02)
