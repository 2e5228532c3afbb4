"""Builds the C++ operators into yolov4_fast/_C; the rest of the packaging is in pyproject.toml.

The operators use only torch's stable ABI and no Python API, so that one build serves every Python
from 3.11 and every torch from 2.11, compiles in seconds and needs neither nvcc nor a GPU.
"""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = ["csrc/*.cpp", "csrc/cpu/*.cpp"]

ROOT = Path(__file__).parent

extension = CppExtension(
    name="yolov4_fast._C",
    sources=sorted(
        str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern)
    ),
    depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
    define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # 2.11
    extra_compile_args=[
        "-O3",
        "-fvisibility=hidden",
        # Contracted multiply-adds would make results depend on the machine's vector extension.
        "-ffp-contract=off",
        # Nothing reads errno or the exception flags; NaN and comparisons stay exact.
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-g0",
    ],
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
