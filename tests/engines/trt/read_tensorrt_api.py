"""Reads the Python API of TensorRT's bindings off the wheel, without TensorRT's libraries.

    python read_tensorrt_api.py FOLDER > api-VERSION.json

FOLDER holds `tensorrt_bindings`, as `pip install --no-deps --target FOLDER tensorrt_cu13_bindings`
leaves it. The bindings need nine C functions of three libraries to be imported: stand-ins for them
are compiled here, each returning null. So names, types and signatures can be had and calls refused
for their arguments; nothing can be built or run. What is written: per class its bases, its own
methods with the signature of each overload, its properties with the types that they give and take
(null where they cannot be set), the members of enums; functions and names of modules.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STAND_INS = {
    "libnvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


def compile_stand_ins(folder: Path, major: int) -> None:
    """The three libraries of a major version of TensorRT, every function returning null."""
    for name, functions in STAND_INS.items():
        source = "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / f"{name}.so.{major}")],
            input=source, text=True, check=True, capture_output=True,
        )  # fmt: skip


def run_over_stand_ins(
    bindings: Path, major: int, arguments: list[str], cwd: Path | None = None
) -> str:
    """What Python prints for these arguments where `import tensorrt_bindings` works. Raises
    subprocess.CalledProcessError.
    """
    with tempfile.TemporaryDirectory() as folder:
        compile_stand_ins(Path(folder), major)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": str(bindings)}
        run = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True
        )
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, arguments, run.stdout, run.stderr)
    return run.stdout


def read_api() -> dict[str, Any]:
    """In a process where the bindings can be imported."""
    import tensorrt_bindings as trt

    sys.modules["tensorrt"] = trt  # as the package of that name does it
    from tensorrt_bindings import plugin

    classes: dict[str, Any] = {}
    for name, value in vars(trt).items():
        if isinstance(value, type) and value.__module__.startswith("tensorrt_bindings"):
            _read_class(name, value, classes)
    native = vars(trt.tensorrt)
    functions = {
        name: _signatures(name, value.__doc__)
        for name, value in native.items()
        if callable(value) and not isinstance(value, type) and value.__doc__
    }
    known = {*classes, *functions}
    others = {name for name in vars(trt) if not name.startswith("_")} - known
    return {
        "version": trt.__version__,
        "classes": dict(sorted(classes.items())),
        "functions": dict(sorted(functions.items())),
        "others": sorted(others),
        "plugin": sorted(name for name in vars(plugin) if not name.startswith("_")),
    }


def _read_class(name: str, cls: type, classes: dict[str, Any]) -> None:
    entry: dict[str, Any] = {}
    bases = [_plain(base.__name__) for base in cls.__bases__ if base.__name__ != "pybind11_object"]
    if bases and bases != ["object"]:
        entry["bases"] = bases
    members = getattr(cls, "__members__", None)
    if members is not None:
        entry["enum"] = {key: int(value) for key, value in sorted(members.items())}
        classes[name] = entry
        return
    for key, value in sorted(vars(cls).items()):
        value = value.__func__ if isinstance(value, staticmethod) else value
        if key.startswith("_") and key != "__init__":
            continue
        if isinstance(value, type) and value.__qualname__ == f"{name}.{key}":
            _read_class(f"{name}.{key}", value, classes)
        elif isinstance(value, type):
            entry.setdefault("aliases", {})[key] = value.__qualname__
        elif isinstance(value, property):
            entry.setdefault("properties", {})[key] = _property(value)
        elif type(value).__name__ == "pybind11_static_property":
            entry.setdefault("properties", {})[key] = _property(value)
        elif callable(value):
            signatures = _signatures(key, value.__doc__)
            if signatures:
                entry.setdefault("methods", {})[key] = signatures
        else:
            entry.setdefault("constants", {})[key] = _plain(type(value).__qualname__)
    classes[name] = entry


def _property(value: Any) -> list[str | None]:
    """[type that it gives, type that it takes]"""
    gives = re.search(r"-> (.*)", value.fget.__doc__ or "")
    takes = re.search(r", \w+: (.*)\) -> \w+", (value.fset and value.fset.__doc__) or "")
    return [_plain(gives[1]) if gives else None, _plain(takes[1]) if takes else None]


def _signatures(name: str, text: str | None) -> list[str]:
    """Of each overload, as pybind11 writes them at the head of a docstring."""
    lines = (text or "").splitlines()
    if not lines or not lines[0].startswith(f"{name}("):
        return []
    if lines[0].endswith("(*args, **kwargs)"):
        found = [re.match(rf"\d+\. ({re.escape(name)}\(.*)", line) for line in lines[1:]]
        return [_plain(match[1]) for match in found if match]
    return [_plain(lines[0])]


def _plain(text: str) -> str:
    """Type names without the places that they come from."""
    return re.sub(r"\b(?:tensorrt_bindings\.tensorrt|tensorrt|nvinfer1|nvonnxparser)(?:\.|::)", "",
                  text)  # fmt: skip


def api_of(bindings: Path) -> dict[str, Any]:
    """The API of the wheel that is installed in a folder."""
    wheel = next(bindings.glob("tensorrt_*bindings-*.dist-info")).name
    major = int(wheel.split("-")[1].split(".")[0])
    output = run_over_stand_ins(bindings, major, [__file__])
    return json.loads(output[output.index("{") :])  # the bindings print a warning before it


if __name__ == "__main__":
    api = api_of(Path(sys.argv[1])) if len(sys.argv) > 1 else read_api()
    print(json.dumps(api, separators=(",", ":")).replace("},", "},\n"))
