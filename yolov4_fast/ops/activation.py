"""Activations as the epilogues of the kernels know them: by number.

linear      x
leaky       x where x > 0, else 0.1 x
mish        x tanh(ln(1 + exp x)) = x n / (n + 2) with e = exp x, n = e (e + 2)  (arXiv 1908.08681)
swish       x / (1 + exp(-x))
logistic    1 / (1 + exp(-x))
relu        x where x > 0, else 0
relu6       x within 0 and 6
selu        1.0507 x where x > 0, else 1.0507 * 1.6733 (exp x - 1)  (arXiv 1706.02515)
hard_swish  x times x + 3 within 0 and 6, over 6  (arXiv 1905.02244)

The right side of Mish needs one exponential and no logarithm, and loses no digits where e is small.

prelu (x where x > 0, else a trained slope of its channel times x; arXiv 1502.01852) has no number:
it takes a vector too, and is left to `combine`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_CODES = {
    "linear": 0,
    "leaky": 1,
    "mish": 2,
    "swish": 3,
    "logistic": 4,
    "relu": 5,
    "relu6": 6,
    "selu": 7,
    "hard_swish": 8,
}
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


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
        case "relu6":
            return F.relu6(x)
        case "selu":
            return F.selu(x)
        case "hard_swish":
            return F.hardswish(x)
    return x
