"""A user's files, made once, and the check of what a user's mistake must look like."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from yolov4_fast.cli import main


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


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
