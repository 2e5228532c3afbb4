"""Builds the C++ and CUDA operators into yolov4_fast/_C; the rest of the packaging is in
pyproject.toml.

The operators use only torch's stable ABI and no Python API, so that one build serves every Python
from 3.11 and every torch from 2.11. The CUDA kernels are built where torch has CUDA and a matching
nvcc is found, for every GPU of ARCHITECTURES that it knows, or of TORCH_CUDA_ARCH_LIST ("8.6 9.0");
no GPU is needed. YOLOV4_FAST_CUDA=0 leaves them out, 1 insists on them.

CUDA's runtime is linked statically: it needs nothing but the driver, and that only when a kernel is
launched, and shares the device's primary context and its streams with whatever runtime torch has.

Where the CUDA kernels are built and NvInfer.h of TensorRT 10 or later is found too, under
TENSORRT_ROOT or on the compiler's own path, the plugin of csrc/tensorrt is built into
yolov4_fast/libyolov4_fast_tensorrt<major>.so, a library of its own without torch. It needs the
headers only. YOLOV4_FAST_TENSORRT=0 leaves it out, 1 insists on it.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

ROOT = Path(__file__).parent
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SWITCH = "YOLOV4_FAST_CUDA"
TENSORRT_SWITCH = "YOLOV4_FAST_TENSORRT"
LEAST_TENSORRT = 10

# Contracted multiply-adds would make results depend on the machine.
CXX_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    # Nothing reads errno or the exception flags; NaN and comparisons stay exact.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-g0",
]
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden"]


def missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        return "no nvcc was found; CUDA_HOME can name its folder"
    version = nvcc("--version")
    found = re.search(r"release (\d+)\.\d+", version)
    if found is None:
        return f"nvcc does not say its version: {version!r}"
    if found[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {found[0]} and torch's CUDA is {torch.version.cuda}"
    if not cuda_library_folders():
        return f"libcudart_static.a is not under {cuda_folder()}"
    return None


def nvcc(*options: str) -> str:
    """What it prints on either way out."""
    command = [str(Path(str(CUDA_HOME), "bin", "nvcc")), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def cuda_folder() -> Path:
    """Where nvcc itself lies: on the PATH there may be a link to it, or a script that calls it."""
    top = re.search(r"^#\$ TOP=(.+)$", nvcc("--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    return Path(top[1].strip() if top else str(CUDA_HOME)).resolve()


def cuda_library_folders() -> list[str]:
    folders = [cuda_folder() / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").is_file()][:1]


def architecture_flags() -> list[str]:
    """Machine code for each architecture, and PTX of the last for those to come."""
    known = nvcc("--list-gpu-code").split()
    chosen = re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    wanted = [int(major + minor) for major, minor in chosen] or ARCHITECTURES
    numbers = sorted(number for number in wanted if f"sm_{number}" in known)
    if not numbers:
        raise SystemExit(f"nvcc knows none of the architectures {wanted}; it knows {known}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def is_wanted(switch: str, what: str, missing: Callable[[], str | None]) -> bool:
    """Whether to build: as the switch says, or where nothing is missing."""
    wanted = os.environ.get(switch, "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"{switch} must be 0 or 1, not {wanted!r}")
    reason = f"{switch}=0" if wanted == "0" else missing()
    if wanted == "1" and reason:
        raise SystemExit(f"{switch}=1, but {what} cannot be built: {reason}")
    if reason:
        print(f"yolov4_fast: building without {what}: {reason}")
    return reason is None


def tensorrt_include() -> list[str]:
    root = os.environ.get("TENSORRT_ROOT")
    return [f"-I{Path(root, 'include')}"] if root else []


def tensorrt_major() -> int | None:
    """The major version of the TensorRT whose headers nvcc finds."""
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as source:
        source.write("#include <NvInfer.h>\nfound_tensorrt = NV_TENSORRT_MAJOR\n")
        source.flush()
        try:
            text = nvcc("-E", *tensorrt_include(), source.name)
        except subprocess.CalledProcessError:
            return None
    found = re.search(r"found_tensorrt = (\d+)", text)
    return int(found[1]) if found else None


def missing_for_tensorrt() -> str | None:
    """Why the plugin cannot be built beside the CUDA kernels, or None."""
    major = tensorrt_major()
    if major is None:
        return "no NvInfer.h was found; TENSORRT_ROOT can name TensorRT's folder"
    if major < LEAST_TENSORRT:
        return f"NvInfer.h is of TensorRT {major}; {LEAST_TENSORRT} or later is needed"
    return None


def build_plugin(folder: Path) -> None:
    output = folder / f"libyolov4_fast_tensorrt{tensorrt_major()}.so"
    print(f"yolov4_fast: building {output.name}")
    host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
    command = [
        *[str(Path(str(CUDA_HOME), "bin", "nvcc")), "-shared", "-std=c++17", "-O3", "-fmad=false"],
        *["--cudart=static", *(f"-Xcompiler={flag}" for flag in host), *architecture_flags()],
        *[*tensorrt_include(), "-o", str(output)],
        *[str(path) for name in ("cpp", "cu") for path in files(f"csrc/tensorrt/*.{name}")],
        "-ldl",
    ]
    subprocess.run(command, check=True)


def make_extension(cuda: bool) -> CppExtension:
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp"]
    if cuda:
        patterns += ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
    flags = {"cxx": CXX_FLAGS}
    if cuda:
        flags["nvcc"] = [*NVCC_FLAGS, *architecture_flags()]
    return CppExtension(
        name="yolov4_fast._C",
        sources=[str(path.relative_to(ROOT)) for name in patterns for path in files(name)],
        depends=[
            str(path.relative_to(ROOT)) for path in [*files("csrc/**/*.h"), *files("csrc/**/*.cuh")]
        ],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # 2.11
        extra_compile_args=flags,
        libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"] if cuda else [],
        library_dirs=cuda_library_folders() if cuda else [],
        py_limited_api=True,
    )


def files(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


class Build(BuildExtension):
    with_plugin = False

    def run(self) -> None:
        super().run()
        if self.with_plugin:  # where _C is in the end: with --inplace not where it was built
            build_plugin(Path(self.get_ext_fullpath(self.extensions[0].name)).parent)


with_cuda = is_wanted(SWITCH, "the CUDA kernels", missing_for_cuda)
Build.with_plugin = is_wanted(
    TENSORRT_SWITCH,
    "the TensorRT plugin",
    missing_for_tensorrt if with_cuda else lambda: "the CUDA kernels are left out",
)
setup(
    ext_modules=[make_extension(with_cuda)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
