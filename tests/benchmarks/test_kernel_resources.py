"""Every Triton kernel compiles for every supported GPU and spills nothing; the tool for it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kernel_resources
from benchmarks.kernel_resources import Job, Resources, jobs, kernel_modules, parse_usage, table
from yolov4_fast.ops.kernels.variant import SUPPORTED_SM, Variant

ROOT = Path(__file__).resolve().parents[2]

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function mish_bn_kernel:
  REG:56 STACK:{stack} SHARED:1024 LOCAL:{local} CONSTANT[0]:968 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function another:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:968 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

# A kernel whose 512 values a thread stay in use beyond a barrier, and one that cannot compile.
TROUBLE = """
import triton
import triton.language as tl

from yolov4_fast.ops.kernels.variant import Variant


@triton.jit
def hoard(x, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(x + index)
    for _ in range(3):
        values = tl.cumsum(values, 0)
        tl.debug_barrier()
    tl.store(x + index, values)


@triton.jit
def broken(x):
    tl.static_assert(False, "never")


VARIANTS = (
    Variant("hoard", hoard, {"x": "*fp32"}, constexprs={"SIZE": 16384}, num_warps=1),
    Variant("broken", broken, {"x": "*fp32"}),
    Variant("untyped", broken, {}),
)
"""


def compiler(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own: the tests' has Triton's interpreter for its compiler."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_resources", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def variant(name: str, minimum_sm: int = 75) -> Variant:
    return Variant(name=name, kernel=None, signature={}, minimum_sm=minimum_sm)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_and_spills_nothing():
    run = compiler("--jobs", "2", timeout=900)
    records = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    failed = [str(record) for record in records if record["spilled"] or record["problem"]]
    assert not failed, "\n".join(failed)
    assert run.returncode == 0 and records, run.stdout[-3000:] + run.stderr[-3000:]
    compiled = {(record["module"], record["variant"], record["sm"]) for record in records}
    expected = {
        (module, variant.name, sm)
        for module, variants in kernel_modules().items()
        for variant in variants
        for sm in SUPPORTED_SM
        if sm >= variant.minimum_sm
    }
    assert compiled == expected


@pytest.mark.slow
def test_spills_and_errors_are_failures(tmp_path, monkeypatch):
    """The module of trouble is put beside the kernels by a package path that the tool inherits."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    code = (
        "import sys\n"
        "from yolov4_fast.ops import kernels\n"
        f"kernels.__path__.append({str(tmp_path)!r})\n"
        "from benchmarks.kernel_resources import Job, run\n"
        "for name in ('hoard', 'broken', 'untyped'):\n"
        "    result = run(Job('trouble', name, 90))\n"
        "    assert result.failed\n"
        "    print(name, result.remark)\n"
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    hoard, broken, untyped = run.stdout.splitlines()
    assert hoard.startswith("hoard FAILED:") and hoard.endswith("bytes spilled")
    assert broken.startswith("broken FAILED: CompileTimeAssertionFailure")
    assert "must give each argument of ['x'] a type or a constant" in untyped


def test_all_kernels_are_found():
    modules = kernel_modules()
    assert {"mish_bn", "pool", "upsample", "combine"} <= set(modules)
    assert all(modules.values())
    assert len(jobs(modules, [], SUPPORTED_SM)) > 7 * len(modules)


def test_jobs_are_chosen_by_name_and_gpu():
    modules = {"a": [variant("one fp16"), variant("two bf16", 80)], "b": [variant("one fp16")]}
    assert jobs(modules, [], [75, 80]) == [
        Job("a", "one fp16", 75),
        Job("a", "one fp16", 80),
        Job("a", "two bf16", 80),
        Job("b", "one fp16", 75),
        Job("b", "one fp16", 80),
    ]
    assert jobs(modules, ["bf16"], [75, 90]) == [Job("a", "two bf16", 90)]
    assert jobs(modules, ["b one", "two"], [90]) == [
        Job("a", "two bf16", 90),
        Job("b", "one fp16", 90),
    ]


def test_two_variants_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two variants of a have the same name"):
        jobs({"a": [variant("one"), variant("one")]}, [], [90])


def test_usage_is_the_most_of_any_function():
    assert parse_usage(USAGE.format(stack=0, local=0)) == (56, 0)
    assert parse_usage(USAGE.format(stack=8, local=0)) == (56, 8)
    assert parse_usage(USAGE.format(stack=8, local=16)) == (56, 24)
    with pytest.raises(ValueError, match="no function"):
        parse_usage("Resource usage:\n")


def test_what_is_a_failure_and_what_only_a_remark():
    good = Resources("a", "one", 86, warps=4, registers=32, shared=99 * 1024)
    assert not good.failed and good.remark == ""
    big = replace(good, shared=99 * 1024 + 1)
    assert not big.failed and big.remark == "over the 99 KiB of shared memory"
    assert replace(good, spilled=8).failed
    assert replace(good, problem="ValueError: no").remark == "FAILED: ValueError: no"


def test_table_has_a_line_for_each_variant_and_one_for_each_remark():
    lines = list(
        table(
            [
                Resources("a", "one", 75, registers=32),
                Resources("a", "one", 90, registers=40, spilled=8),
                Resources("b", "two", 90, registers=255),
            ]
        )
    )
    assert lines[0].split()[-2:] == ["75", "90"]
    assert lines[1].split() == ["a:", "one", "32", "40"]
    assert lines[2].strip() == "sm_90: FAILED: 8 bytes spilled"
    assert lines[3].split() == ["b:", "two", "-", "255"]


def test_output_is_json_with_a_line_for_each_kernel(tmp_path):
    path = tmp_path / "resources.json"
    kernel_resources.write(path, [Resources("a", "one", 75), Resources("a", "one", 90)])
    document = json.loads(path.read_text())
    assert document["triton"] and [kernel["sm"] for kernel in document["kernels"]] == [75, 90]
    assert len(path.read_text().splitlines()) == 4


def test_mistakes_are_named(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        kernel_resources.main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        kernel_resources.main(["--only", "nothing"])
    assert "no variant has nothing in its name" in capsys.readouterr().err
