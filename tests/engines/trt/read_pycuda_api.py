"""Reads the API of pycuda's driver off an installed pycuda, without NVIDIA's driver.

    python read_pycuda_api.py > pycuda-VERSION.json

pycuda is linked to libcuda.so.1, which comes with NVIDIA's driver. Where that is missing, an empty
library of this name is enough to import it: functions are looked up when they are first called, and
none is. So names and signatures can be had; nothing runs. What is written: per class its methods,
with the signatures that Boost.Python writes at the head of a docstring, and its properties;
functions; exceptions with their bases.
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

SIGNATURE = r"{name}\(.*\) -> \w+ :"


def read_api() -> dict[str, Any]:
    """In a process where pycuda can be imported."""
    import pycuda
    from pycuda import _driver

    classes, functions, exceptions = {}, {}, {}
    for name, value in sorted(vars(_driver).items()):
        if name.startswith("_"):
            continue
        if isinstance(value, type) and issubclass(value, Exception):
            exceptions[name] = [base.__name__ for base in value.__bases__]
        elif isinstance(value, type) and "_driver" in value.__module__:
            classes[name] = _read_class(value)
        elif callable(value) and (found := _signatures(name, value.__doc__)):
            functions[name] = found
    return {
        "version": pycuda.VERSION_TEXT,
        "classes": classes,
        "functions": functions,
        "exceptions": exceptions,
    }


def _read_class(cls: type) -> dict[str, Any]:
    if hasattr(cls, "names"):  # Boost.Python's enums
        return {"enum": {name: int(value) for name, value in sorted(cls.names.items())}}
    entry: dict[str, Any] = {}
    for key, value in sorted(vars(cls).items()):
        static = isinstance(value, staticmethod)
        function = value.__func__ if static else value
        if isinstance(value, property):
            entry.setdefault("properties", []).append(key)
        elif found := _signatures(key, getattr(function, "__doc__", None)):
            entry.setdefault("static" if static else "methods", {})[key] = found
    return entry


def _signatures(name: str, text: str | None) -> list[str]:
    """Of each overload: `mem_alloc( (int)arg1) -> DeviceAllocation`."""
    lines = (text or "").splitlines()
    pattern = re.compile(SIGNATURE.format(name=re.escape(name)))
    return [line.removesuffix(" :") for line in lines if pattern.fullmatch(line)]


def api() -> dict[str, Any]:
    """Of the pycuda that this Python finds, whether or not there is a driver."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", os.devnull, "-o", f"{folder}/libcuda.so.1"],
            check=True, capture_output=True,
        )  # fmt: skip
        environment = {**os.environ, "LD_LIBRARY_PATH": folder}
        run = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--read"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, run.args, run.stdout, run.stderr)
    return json.loads(run.stdout)


if __name__ == "__main__":
    if sys.argv[1:] == ["--read"]:
        sys.setdlopenflags(os.RTLD_LAZY)
        json.dump(read_api(), sys.stdout)
    else:
        text = json.dumps(api(), indent=0, sort_keys=True)
        print(re.sub(r"\[\n([^\[\]{}]*?)\n\]", lambda m: f"[{m[1]}]".replace("\n", " "), text))
