"""A kernel with its types and constants chosen: what is compiled for a GPU, and what the tests
compile for every supported one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SUPPORTED_SM = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Variant:
    """name: of the kernel and what is special, such as "resize fp16 letterbox". signature: type of
    each argument that is no constexpr, as Triton spells it ("*fp16", "i32", "fp32"), in the
    kernel's order. aligned: arguments (pointers, strides) divisible by 16. fp_fusion: whether a
    product and a sum may become one rounding.
    """

    name: str
    kernel: Any  # a triton.jit function
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    minimum_sm: int = 75
