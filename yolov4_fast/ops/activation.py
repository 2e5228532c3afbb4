"""Darknet's activations, as the epilogues of the kernels know them: by number.

linear    x
leaky     x where x > 0, else 0.1 x
mish      x tanh(ln(1 + exp x)) = x n / (n + 2) with e = exp x, n = e (e + 2)  (arXiv 1908.08681)
swish     x / (1 + exp(-x))
logistic  1 / (1 + exp(-x))
relu      x where x > 0, else 0

The right side of Mish needs one exponential and no logarithm, and loses no digits where e is small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_CODES = {"linear": 0, "leaky": 1, "mish": 2, "swish": 3, "logistic": 4, "relu": 5}


def activation_code(name: str) -> int:
    """The number of an activation. Raises ValueError where there is none of that name."""
    if name not in ACTIVATION_CODES:
        raise ValueError(
            f"the activation must be one of {', '.join(ACTIVATION_CODES)}, not {name!r}"
        )
    return ACTIVATION_CODES[name]


def activate_reference(x: Tensor, name: str) -> Tensor:
    """The definition in torch, in x's dtype (kernels compute in float32). Raises ValueError."""
    activation_code(name)
    match name:
        case "leaky":
            return F.leaky_relu(x, 0.1)
        case "mish":
            return F.mish(x)
        case "swish":
            return F.silu(x)
        case "logistic":
            return torch.sigmoid(x)
        case "relu":
            return F.relu(x)
    return x
