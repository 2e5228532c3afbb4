"""`slope`, the derivative of `activate`, on float32 blocks for the kernels of training; and
`activate_fast`, where instructions are as dear as bytes.

Numbers of the activations: ACTIVATION_CODES in ops/activation.py.
"""

import triton
import triton.language as tl

from yolov4_fast.ops.kernels.activation import activate

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def activate_fast(z, ACTIVATION: tl.constexpr):
    """`activate` of float32 blocks; Mish in fewer instructions, to some 3e-7 of its value.

    exp2 and rsqrt are one instruction each; exp and a quotient, which mind denormal numbers and
    the largest ones, six and nine.
    """
    if ACTIVATION == 2:  # mish
        e = tl.exp2(tl.minimum(z, 20.0) * LOG2_E)
        n = e * (e + 2.0)
        root = tl.rsqrt(n + 2.0)
        z = z * (n * (root * root))
    else:
        z = activate(z, ACTIVATION)
    return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at float32 z of any shape, finite wherever z is.
    At the kinks at 0 and 6 it is torch's.

    Mish, with e = exp z, n = e (e + 2), q = n + 2, so that 1 - tanh(softplus z)^2 is
    4 (e + 1)^2 / q^2:

        slope = n / q + 4 z e (e + 1) / q^2

    From z = 20 on, where z is capped as in `activate`, that is 1 in float32.
    """
    tl.static_assert(ACTIVATION >= 0 and ACTIVATION <= 8, "unknown activation")
    if ACTIVATION == 0:  # linear
        z = tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == 1:  # leaky
        z = tl.where(z > 0, 1.0, 0.1)
    elif ACTIVATION == 2:  # mish
        z = tl.minimum(z, 20.0)
        e = tl.exp2(z * LOG2_E)
        a = e * e + e
        n = a + e
        root = tl.rsqrt(n + 2.0)
        r = root * root
        z = (n + z * (4.0 * (a * r))) * r
    elif ACTIVATION == 3:  # swish
        s = 1.0 / (1.0 + tl.exp(-z))
        z = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == 4:  # logistic
        s = 1.0 / (1.0 + tl.exp(-z))
        z = s * (1.0 - s)
    elif ACTIVATION == 5:  # relu
        z = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == 6:  # relu6
        z = tl.where((z > 0) & (z < 6), 1.0, 0.0)
    elif ACTIVATION == 7:  # selu: 1.0507 where z > 0, else 1.0507 * 1.6733 exp z
        z = tl.where(z > 0, 1.0507009873554805, 1.7580993408473766 * tl.exp(tl.minimum(z, 0.0)))
    elif ACTIVATION == 8:  # hard_swish
        z = tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1.0 / 3.0) + 0.5, 1.0))
    return z
