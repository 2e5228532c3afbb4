"""nvcc compiles the CUDA kernels for every architecture, without spills."""

import os
import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def compiler_report(source: Path, output: Path, architecture: int) -> str:
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    if not nvcc.is_file():
        pytest.skip("needs nvcc")
    # As setup.py has it.
    options = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    run = subprocess.run(
        [nvcc, *options, "-cubin", "-o", output, source], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_nothing_spills(tmp_path, architecture):
    report = compiler_report(CSRC / "cuda" / "launch.cu", tmp_path / "out.cubin", architecture)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report)
    assert len(spills) >= 4, report
    assert all(numbers == ("0", "0", "0") for numbers in spills), report
