"""Loads the compiled operators, `torch.ops.yolov4_fast.*`, once for every module of this package.

Each operator has a readable torch definition beside it (`*_reference`), which runs only when asked
for: a missing extension is an error, never a silent slow path.
"""

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["extension", "reference"]

BUILD_COMMAND = "pip install --no-build-isolation -e ."
PACKAGE = Path(__file__).resolve().parents[1]


def load(folder: Path = PACKAGE) -> Path:
    """Register the operators of the library in `folder` and return its path.

    Raises ImportError, naming the command that builds it, where it is missing or does not load.
    """
    found = sorted(folder.glob("_C*.so"))
    if not found:
        raise ImportError(
            f"the compiled operators of yolov4_fast are not in {folder}; "
            f"build them with: {BUILD_COMMAND}"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        if "libtorch_cuda" in str(error) and torch.version.cuda is None:
            raise ImportError(
                f"the compiled operators {found[0]} were built for a torch with CUDA and this is "
                f"torch {torch.__version__}, without it; build them again with: {BUILD_COMMAND}"
            ) from error
        raise ImportError(
            f"the compiled operators {found[0]} do not load with torch {torch.__version__} "
            f"({error}); build them again with: {BUILD_COMMAND}"
        ) from error
    return found[0]


def check_implementation(name: str) -> None:
    if name not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {', '.join(get_args(Implementation))}, not {name!r}"
        )


def has_cuda() -> bool:
    """Whether the operators were built with their CUDA kernels; says nothing of a GPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("yolov4_fast::diou_nms", "CUDA")


def check_device(tensor: Tensor, operator: str) -> None:
    """Raise RuntimeError for a CUDA tensor where the operators were built without CUDA."""
    if tensor.is_cuda and not has_cuda():
        raise RuntimeError(
            f"the compiled operators have no CUDA kernel of {operator}: they were built without "
            "nvcc, or with a torch without CUDA; where both are there build them again with: "
            f"{BUILD_COMMAND}"
        )


LIBRARY = load()
