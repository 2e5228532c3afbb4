"""Activations on float32 blocks, for the epilogue of any kernel: `activate`.

Finite for every finite x, and NaN stays NaN (a poisoned buffer must not turn into zeros). Numbers
of the activations: ACTIVATION_CODES in ops/activation.py.
"""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x: float32 block of any shape; ACTIVATION: one of the values of ACTIVATION_CODES.

    Mish: exp 20 is already 2^29, where n / (n + 2) is 1 in float32, so larger x are capped before
    the exponential; the quotient is formed before the product, which else overflows for large x.
    """
    tl.static_assert(ACTIVATION >= 0 and ACTIVATION <= 5, "unknown activation")
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
    return x
