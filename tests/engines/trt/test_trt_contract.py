"""What yolov4_fast uses of TensorRT is in versions 10 and 11, and nothing of it is what 11 removed.

The API that this is held against, and that the double is made from, was read off the bindings of
both versions; where they are installed (`make` puts them in .venv/tensorrt, or TENSORRT_BINDINGS
names a folder of 10 and 11) it is read again, and the code meets them, over libraries that do
nothing.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from read_tensorrt_api import api_of, run_over_stand_ins
from trt_double import VERSIONS, read_api
from trt_names import attributes, members, module_names, removed, resolves

from yolov4_fast.engines.tensorrt.builder import COMPATIBILITY

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "yolov4_fast"
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in PACKAGE.rglob("*.py")}
OURS = {  # what objects of our own are called whose attributes have names that 11 removed
    "precision": {"manifest", "self", "engine", "arguments"},
}


def bindings(major: str) -> Path:
    folder = os.environ.get("TENSORRT_BINDINGS") or ROOT / ".venv" / "tensorrt"
    path = Path(folder) / major
    if not (path / "tensorrt_bindings").is_dir():
        pytest.skip(f"needs the bindings of TensorRT {VERSIONS[major]} in {path}")
    return path


@pytest.fixture(scope="module")
def used() -> set[tuple[str, ...]]:
    return set().union(*map(module_names, SOURCES.values()))


def forbidden(source: str) -> list[str]:
    """What a source may not say: names that hang on TensorRT's module and are not in both versions,
    and attributes that 11 removed.
    """
    apis = [read_api(major) for major in VERSIONS]
    names = [
        ".".join(("trt", *name))
        for name in module_names(source)
        if not all(resolves(api, name) for api in apis)
    ]
    gone = removed(*apis)
    return names + [
        f"{holder}.{name}"
        for holder, name, _ in attributes(source)
        if name in gone and holder not in OURS.get(name, ())
    ]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.startswith("yolov4_fast/engines/tensorrt/")]
)
def test_the_code_uses_what_both_versions_have(path: str) -> None:
    assert not forbidden(SOURCES[path])


def test_so_does_all_else_that_names_the_module(used: set[tuple[str, ...]]) -> None:
    for major in VERSIONS:
        assert not [name for name in used if not resolves(read_api(major), name)]


def test_the_names_are_found(used: set[tuple[str, ...]]) -> None:
    assert {("BuilderFlag", "TF32"), ("Builder",), ("ILogger", "ERROR"), ("__version__",)} <= used


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", ["trt.BuilderFlag.FP16", "BuilderFlag.FP16"]),
        (
            "1 << int(self._trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)",
            [
                "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
                "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
            ],
        ),
        ("class Ours(trt.IInt8EntropyCalibrator2): ...", ["trt.IInt8EntropyCalibrator2"] * 2),
        ("from tensorrt import IInt8Calibrator", ["trt.IInt8Calibrator"]),
        ("layer.precision = kind", ["layer.precision"]),
        ("network.get_layer(0).precision", [".precision"]),
        ("config.int8_calibrator = ours", ["config.int8_calibrator"]),
        ("tensor.set_dynamic_range(-1, 1)", ["tensor.set_dynamic_range"]),
        ("self._engine.device_memory_size", ["_engine.device_memory_size"]),
        ("parser.supports_model(model)", ["parser.supports_model"]),
        ("trt.BuilderFlags.TF32", ["trt.BuilderFlags.TF32"]),  # in neither
        ("trt.Dims.nothing", ["trt.Dims.nothing"]),
        ("trt.plugin.nothing; trtp.neither()", ["trt.plugin.nothing", "trt.plugin.neither"]),
        ("manifest.precision; trt.Logger.min_severity; trt.ILogger.Severity.ERROR", []),
        ("engine.device_memory_size_v2; trt.DataType.INT8; trt.plugin.register", []),
    ],
)
def test_that_test_can_fail(source: str, found: list[str]) -> None:
    assert sorted(set(forbidden(source))) == sorted(set(found))


def test_names_in_strings() -> None:
    """Only the levels of compatibility are looked up by name, and both versions have them."""
    found = [
        (path, ast.unparse(node.args[0]))
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and ast.unparse(node.args[0]).split(".")[0] == "trt"
    ]
    assert found == [("yolov4_fast/engines/tensorrt/builder.py", "trt.HardwareCompatibilityLevel")]
    for major in VERSIONS:
        levels = members(read_api(major), "HardwareCompatibilityLevel")
        assert set(COMPATIBILITY.values()) <= levels


@pytest.mark.parametrize("major", VERSIONS)
def test_the_api_is_that_of_the_bindings(major: str) -> None:
    real = api_of(bindings(major))
    if real["version"] != VERSIONS[major]:
        pytest.skip(f"the bindings in the folder are of {real['version']}")
    assert real == read_api(major)


PROBE = """
import json, sys
import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt
for path in json.loads(sys.argv[1]):
    found = trt
    for name in path:
        if name == "plugin":
            from tensorrt_bindings import plugin as found
        else:
            found = getattr(found, name)

from yolov4_fast.engines.engine import DeviceError
from yolov4_fast.engines.tensorrt.builder import Gpu, TensorRtOptions, build_plan
from yolov4_fast.engines.tensorrt.log import make_log
from yolov4_fast.engines.tensorrt.package import load_tensorrt
from yolov4_fast.engines.tensorrt.progress import Progress, make_monitor

assert load_tensorrt() is trt
log = make_log(trt)
assert isinstance(log, trt.ILogger)
log.log(trt.ILogger.ERROR, "two\\nlines")
log.log(trt.ILogger.WARNING, "a warning")
log.log(trt.ILogger.Severity.INTERNAL_ERROR, "inside")
assert log.take() == "two lines; inside" and log.take() == "no reason given"
monitor = make_monitor(trt, Progress(show=False))
assert isinstance(monitor, trt.IProgressMonitor)
for name in ("phase_start", "step_complete", "phase_finish"):  # what is overridden is what is there
    assert hasattr(trt.IProgressMonitor, name)
assert tuple(trt.Dims((1, 3, 8, 8))) == (1, 3, 8, 8)
try:
    build_plan(b"", TensorRtOptions(), max_batch=1, gpu=Gpu("none", 90))
except DeviceError as error:
    assert "cannot build here" in str(error), error
    print("met", trt.__version__)
"""


@pytest.mark.parametrize("major", VERSIONS)
def test_the_code_meets_the_bindings(major: str, used: set[tuple[str, ...]]) -> None:
    """Every name that is used is there, our logger and monitor are theirs, and a builder that they
    do not give, here for want of the libraries, is one clear error.
    """
    told = run_over_stand_ins(
        bindings(major), int(major), ["-c", PROBE, json.dumps(sorted(used))], cwd=ROOT
    )
    assert f"met {major}." in told


def test_that_test_can_fail_too() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_over_stand_ins(bindings("11"), 11, ["-c", PROBE, '[["BuilderFlag", "FP16"]]'], cwd=ROOT)
    assert "FP16" in caught.value.stderr


@pytest.mark.parametrize("major", VERSIONS)
def test_the_reference_names_the_same(major: str, shared: Path) -> None:
    """Another reading of the same bindings: no class, member of an enum, method or property of it
    is missing here.
    """
    path = shared / "reference" / "tensorrt" / f"api-{VERSIONS[major]}.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    reference: dict[str, Any] = json.loads(path.read_text())
    api = read_api(major)
    for name, entry in reference.items():
        if not isinstance(entry, dict):
            assert resolves(api, (name,)), name
            continue
        names = set(entry.get("__enum__", entry)) - {"__init__", "Severity"}
        names -= {key for key in names if key.startswith("_")}
        assert names <= members(api, name), (name, names - members(api, name))
    assert len(reference) >= len([name for name in api["classes"] if "." not in name])
