"""Registers, shared memory and spills of every Triton kernel on every supported GPU, without a GPU.

Each Variant of the modules in yolov4_fast.ops.kernels is cross-compiled by Triton for each compute
capability, and the resources are read off the machine code by the cuobjdump that Triton brings. A
kernel that keeps values in local memory (spilled registers) is a failure, and so is one that does
not compile. Shared memory beyond what a block may have on that GPU is no failure but named: such a
variant must not be chosen there.

`python -m benchmarks.kernel_resources [--only mish_bn] [--sm 90] [--jobs 2] [--output FILE]` prints
a table for people and one JSON line per kernel for programs; its status is 1 after a failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from yolov4_fast.ops import kernels
from yolov4_fast.ops.kernels.variant import SUPPORTED_SM, Variant

# The most a block may ask for, KiB: CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)")


@dataclass(frozen=True)
class Job:
    """One variant for one GPU, by name: kernels do not travel between processes."""

    module: str
    variant: str
    sm: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. spilled: bytes of local memory a thread; shared: bytes a block;
    problem: why there is no figure.
    """

    module: str
    variant: str
    sm: int
    warps: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    problem: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.problem) or self.spilled > 0

    @property
    def remark(self) -> str:
        if self.problem:
            return f"FAILED: {self.problem}"
        if self.spilled:
            return f"FAILED: {self.spilled} bytes spilled"
        limit = SHARED_MEMORY_KIB[self.sm]
        return f"over the {limit} KiB of shared memory" if self.shared > limit * 1024 else ""


def kernel_modules() -> dict[str, Sequence[Variant]]:
    """The variants of each module in yolov4_fast.ops.kernels that has some."""
    found = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        if hasattr(module, "VARIANTS"):
            found[info.name] = module.VARIANTS
    return found


def jobs(
    modules: Mapping[str, Sequence[Variant]], only: Sequence[str], sms: Sequence[int]
) -> list[Job]:
    """Every variant with a word of `only` in its module's or its own name (none: all), on each GPU
    that it is meant for. Raises ValueError where two variants of a module have one name.
    """
    chosen = []
    for module, variants in modules.items():
        names = [variant.name for variant in variants]
        if len(set(names)) < len(names):
            raise ValueError(f"two variants of {module} have the same name: {sorted(names)}")
        chosen += [
            Job(module, variant.name, sm)
            for variant in variants
            if not only or any(word in f"{module} {variant.name}" for word in only)
            for sm in sms
            if sm >= variant.minimum_sm
        ]
    return chosen


def run(job: Job) -> Resources:
    """Compile and inspect; whatever the compiler raises becomes the result's problem."""
    variants = importlib.import_module(f"{kernels.__name__}.{job.module}").VARIANTS
    (variant,) = (variant for variant in variants if variant.name == job.variant)
    try:
        kernel = compile_variant(variant, job.sm)
        registers, spilled = parse_usage(dump_usage(kernel.asm["cubin"]))
    except Exception as error:  # of any kind: a compiler's errors have no common class
        lines = str(error).strip().splitlines() or [""]
        return Resources(**asdict(job), problem=f"{type(error).__name__}: {lines[-1][:300]}")
    return Resources(
        **asdict(job),
        warps=kernel.metadata.num_warps,
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
    )


def compile_variant(variant: Variant, sm: int) -> Any:
    """Triton's CompiledKernel for a GPU that need not be there.

    Raises ValueError where an argument has neither a type nor a constant, or either one unused.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = variant.kernel.arg_names
    typed, constant = set(variant.signature), set(variant.constexprs)
    if typed & constant or typed | constant != set(names) or set(variant.aligned) - set(names):
        raise ValueError(
            f"variant {variant.name!r} must give each argument of {names} a type or a constant, "
            f"not {sorted(typed)} and {sorted(constant)}, aligned {sorted(variant.aligned)}"
        )
    source = ASTSource(
        variant.kernel,
        {name: variant.signature.get(name, "constexpr") for name in names},
        dict(variant.constexprs),
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in variant.aligned
            if name in typed
        },
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    return compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def dump_usage(cubin: bytes) -> str:
    """What the cuobjdump of Triton says of a cubin's resources."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_usage(text: str) -> tuple[int, int]:
    """Registers and bytes of local memory: the most of any function in cuobjdump's text."""
    usages = [tuple(map(int, numbers)) for numbers in USAGE.findall(text)]
    if not usages:
        raise ValueError(f"cuobjdump tells of no function: {text!r}")
    return max(usage[0] for usage in usages), max(usage[1] + usage[2] for usage in usages)


def table(results: Sequence[Resources]) -> Iterator[str]:
    """One line per variant: registers on each GPU, then what is wrong or remarkable."""
    sms = sorted({result.sm for result in results})
    rows: dict[tuple[str, str], dict[int, Resources]] = {}
    for result in results:
        rows.setdefault((result.module, result.variant), {})[result.sm] = result
    width = max(len(f"{module}: {variant}") for module, variant in rows)
    yield f"{'registers per thread on sm_':<{width}}" + "".join(f"{sm:>5}" for sm in sms)
    for (module, variant), row in rows.items():
        cells = "".join(f"{row[sm].registers if sm in row else '-':>5}" for sm in sms)
        yield f"{f'{module}: {variant}':<{width}}{cells}"
        yield from (f"    sm_{sm}: {row[sm].remark}" for sm in sms if sm in row and row[sm].remark)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="words in names"
    )
    parser.add_argument("--sm", action="append", type=int, choices=SUPPORTED_SM, help="GPUs (all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write it as JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    chosen = jobs(kernel_modules(), options.only, options.sm or SUPPORTED_SM)
    if not chosen:
        parser.error(f"no variant has {' or '.join(options.only)} in its name")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(run, chosen))
    print("\n".join(table(results)))
    for result in results:
        print(json.dumps(asdict(result)))
    failed = sum(result.failed for result in results)
    print(f"{len(results)} kernels, {failed} failed")
    if options.output:
        write(options.output, results)
    return 1 if failed else 0


def write(path: Path, results: Sequence[Resources]) -> None:
    """The figures as JSON, one kernel a line so that a difference can be read."""
    import triton

    lines = ",\n".join(f"  {json.dumps(asdict(result))}" for result in results)
    version = json.dumps(triton.__version__)
    path.write_text(f'{{"triton": {version}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
