"""What is compiled of the convolution for every supported GPU: of the tilings that `configs_for`
gives those with the most sums a thread, and each way through the K loop.
"""

from yolov4_fast.ops.convolution_config import SCALAR, WARP, WARPGROUP, ConvConfig
from yolov4_fast.ops.kernels.convolution import UNIT, fitted, parts
from yolov4_fast.ops.kernels.convolution_kernel import SIZES, convolution_kernel
from yolov4_fast.ops.kernels.variant import Variant


def _variant(
    dtype: str,
    tiling: ConvConfig,
    size: int,
    *,
    stride: int = 1,
    split: bool = False,
    flat: int = 0,
    wide: bool = True,
    minimum_sm: int = 75,
) -> Variant:
    """With Mish and a residual, which take the most registers; without padding where 1x1."""
    config = fitted(tiling, tiling.block_k, wide)
    floats = {"source": f"*{dtype}", "weight": f"*{dtype}", "bias": "*fp32"}
    added = {} if split else {"residual": f"*{dtype}"}
    out = {"out": "*fp32" if split else f"*{dtype}"}
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    kinds = (("flat", flat), ("narrow", not wide), ("split", split))
    kind = "".join(f" {name}" for name, there in kinds if there)
    return Variant(
        name=f"convolution {dtype} {size}x{size}/{stride} {tile} warps {config.num_warps}{kind}",
        kernel=convolution_kernel,
        signature={**floats, **added, **out, **dict.fromkeys(SIZES, "i32")},
        constexprs={
            **({"residual": None} if split else {}),
            "KH": size,
            "KW": size,
            "STRIDE": stride,
            "PADDING": size // 2,
            "ACTIVATION": 0 if split else 2,
            "FLAT": flat,
            "EVEN": wide and not flat,
            "UNIT_IN": UNIT if wide else 1,
            "UNIT_OUT": UNIT if wide else 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
            "SPLIT": split,
            "PARTS": parts(config),
        },
        aligned=(*floats, *added, *out) if wide else (),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        minimum_sm=minimum_sm,
    )


WIDE_256, WIDE, WIDE_4_WARPS, HALF, LOW = WARPGROUP[:5]
VARIANTS = (
    _variant("fp16", WIDE_256, 3, minimum_sm=90),
    _variant("bf16", WIDE, 1, minimum_sm=90),
    _variant("fp16", WIDE_4_WARPS, 3, stride=2, minimum_sm=90),
    _variant("fp16", HALF, 3, split=True, minimum_sm=90),
    _variant("bf16", LOW, 3, minimum_sm=90),
    _variant("fp16", WARP[0], 3, minimum_sm=80),
    _variant("bf16", WARP[2], 1, minimum_sm=80),
    _variant("fp16", WARP[3], 3, split=True, minimum_sm=80),
    _variant("fp32", SCALAR[0], 3),
    _variant("fp16", SCALAR[0], 1),
    _variant("bf16", WARP[3], 3, wide=False, minimum_sm=80),
    _variant("fp32", SCALAR[1], 3, stride=2, flat=3, wide=False),
)
