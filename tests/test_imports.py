"""The direction of imports, read off the syntax trees, and that importing the package needs nothing
heavy.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("yolov4_fast", "training")

# What each part may import of the two packages, itself apart. A part not listed here may import all
# of yolov4_fast.
ALLOWED = {
    "network": set(),
    "ops": set(),
    "files": set(),
    "sources": set(),
    "zoo": {"files", "network", "darknet"},
    "detections": {"sources"},
    "darknet": {"network", "files"},
    "checkpoint": {"darknet", "network", "files"},
    "datasets": {"sources", "files", "darknet"},
    "engines": {"network", "ops", "darknet", "files", "zoo"},
    "loading": {"sources"},
    "detector": {"engines", "ops", "detections", "sources", "loading"},
    "average_precision": {"datasets"},
    "evaluation": {"detector", "detections", "datasets", "average_precision"},
    "model": {"network", "darknet", "checkpoint", "zoo"},
}
HEAVY = (
    "openvino",
    "triton",
    "tensorrt",
    "onnx",
    "onnxruntime",
    "PIL",
    "supervision",
    "pycuda",
    "triton_python_backend_utils",
)


def sources() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


MODULES = dict(sources())


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, within functions too, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    """The room of yolov4_fast that a dotted name lies in; empty for the package itself."""
    return (*module.split("."), "")[1]


def test_the_packages_are_found() -> None:
    assert {"yolov4_fast.detector", "yolov4_fast.network.layers"} <= set(MODULES)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("yolov4_fast")])
def test_direction(module: str) -> None:
    names = set(imported(MODULES[module]))
    assert not any(name.split(".")[0] in ("training", "benchmarks", "tests") for name in names)
    own = part(module)
    if own not in ALLOWED:
        return
    others = {part(name) for name in names if name.split(".")[0] == "yolov4_fast"} - {own}
    assert others <= ALLOWED[own], f"{module} imports {sorted(others - ALLOWED[own])}"


@pytest.mark.parametrize("name", ["network", "ops"])
def test_the_ground_knows_nothing_of_the_other(name: str) -> None:
    """ops take tensors and numbers, never a spec; a network runs without an op of ours."""
    other = {"network": "yolov4_fast.ops", "ops": "yolov4_fast.network"}[name]
    for module, path in MODULES.items():
        if module.startswith(f"yolov4_fast.{name}"):
            assert not any(used.startswith(other) for used in imported(path)), module


@pytest.mark.parametrize(
    "module", ["yolov4_fast", "yolov4_fast.detector", "yolov4_fast.engines", "yolov4_fast.cli"]
)
def test_imports_with_the_runtimes_blocked(module: str) -> None:
    """As on a machine without them: set to None in sys.modules, importing them raises."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY})); import {module}; "
        "import yolov4_fast; assert yolov4_fast.Detector and yolov4_fast.build_engine"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_import_is_light() -> None:
    code = (
        "import sys; import yolov4_fast; "
        f"heavy = {{*{HEAVY}, 'torch', 'numpy', 'cv2'}} & set(sys.modules); assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_unknown_names_are_refused() -> None:
    import yolov4_fast

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = yolov4_fast.nothing
    assert set(yolov4_fast.__all__) <= set(dir(yolov4_fast))
