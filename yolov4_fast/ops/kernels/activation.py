"""Activations on float32 blocks, for the epilogue of any kernel: `activate`.

Finite for every finite x (SELU: whose result is), and NaN stays NaN: a poisoned buffer must not
turn into zeros. Numbers of the activations: ACTIVATION_CODES in ops/activation.py.
"""

import triton
import triton.language as tl

from yolov4_fast.ops.activation import SELU_ALPHA, SELU_SCALE

POSITIVE = tl.constexpr(SELU_SCALE)
NEGATIVE = tl.constexpr(SELU_SCALE * SELU_ALPHA)


@triton.jit
def exp_minus_1(x):
    """exp(x) - 1 for x <= 0: near zero by its series, where the difference has lost its digits."""
    series = 1.0 + x / 8.0
    for i in tl.static_range(7, 1, -1):
        series = 1.0 + x / i * series
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x: float32 block of any shape; ACTIVATION: one of the values of ACTIVATION_CODES.

    Mish: exp 20 is already 2^29, where n / (n + 2) is 1 in float32, so larger x are capped before
    the exponential; the quotient is formed before the product, which else overflows for large x.
    """
    tl.static_assert(ACTIVATION >= 0 and ACTIVATION <= 8, "unknown activation")
    if ACTIVATION == 1:  # leaky
        x = tl.where(x > 0, x, 0.1 * x)
    elif ACTIVATION == 2:  # mish
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        x = x * (n / (n + 2.0))
    elif ACTIVATION == 3:  # swish
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == 4:  # logistic
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACTIVATION == 5:  # relu
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 6:  # relu6
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == 7:  # selu
        x = tl.where(x > 0, x * POSITIVE, exp_minus_1(tl.where(x > 0, 0.0, x)) * NEGATIVE)
    elif ACTIVATION == 8:  # hard_swish
        x = x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0)
    return x
