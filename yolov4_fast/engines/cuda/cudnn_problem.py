"""A fused convolution as cuDNN is told of it: shapes, strides, types, and a graph of operations.

    out = (activation(convolution(source, weight) * rescale + bias) + residual * residual_scale)
          * out_scale

in float32, with one rounding at the end; the three scales exist for 8-bit tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov4_fast.ops.activation import SELU_ALPHA, SELU_SCALE, activation_code
from yolov4_fast.ops.views import row_stride

FP8 = torch.float8_e4m3fn
DTYPES = (torch.float16, torch.bfloat16, torch.float32, FP8)

# Numbers of the tensors of a graph.
SOURCE, WEIGHT, BIAS, RESIDUAL, OUT, RESCALE, RESIDUAL_SCALE, OUT_SCALE = range(1, 9)
ONE, TWO, LIMIT, ZERO, THREE, SIX, SIXTH, POSITIVE, NEGATIVE = range(9, 18)
VECTOR = 16  # bytes that a kernel loads at once
CONSTANTS = {
    ONE: 1.0,
    TWO: 2.0,
    LIMIT: 20.0,
    ZERO: 0.0,
    THREE: 3.0,
    SIX: 6.0,
    SIXTH: 1 / 6,
    POSITIVE: SELU_SCALE,
    NEGATIVE: SELU_SCALE * SELU_ALPHA,
}
CONSTANTS_OF = {  # of activations
    "mish": (TWO, LIMIT),
    "swish": (ONE,),
    "logistic": (ONE,),
    "relu6": (SIX,),
    "selu": (ONE, ZERO, POSITIVE, NEGATIVE),
    "hard_swish": (THREE, SIX, SIXTH),
}


@dataclass(frozen=True)
class Problem:
    """What a plan is made for: shapes, types and the strides of rows, in elements.

    padding is the same on all sides. residual_row and residual_dtype: None where there is no
    residual. dtype: of source and filters.
    """

    batch: int
    height: int  # of the source
    width: int
    channels: int
    filters: int
    size: int
    stride: int
    padding: int
    activation: str
    dtype: torch.dtype
    out_dtype: torch.dtype
    source_row: int
    out_row: int
    residual_dtype: torch.dtype | None = None
    residual_row: int | None = None

    def __post_init__(self) -> None:
        activation_code(self.activation)  # raises ValueError for an unknown one
        if (self.residual_dtype is None) != (self.residual_row is None):
            raise ValueError("a residual has both a type and a row stride")
        for dtype in (self.dtype, self.out_dtype, self.residual_dtype):
            if dtype is not None and dtype not in DTYPES:
                raise ValueError(f"dtype must be {' or '.join(map(str, DTYPES))}, not {dtype}")

    @classmethod
    def of(
        cls,
        source: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        stride: int,
        padding: int,
        activation: str,
        residual: Tensor | None = None,
    ) -> Problem:
        """Of view tensors [B, H, W, C] and filters OHWI. Raises ValueError where they are none or
        do not fit together.
        """
        batch, height, width, channels = source.shape
        filters, size, _, inputs = weight.shape
        if inputs != channels or not weight.is_contiguous() or weight.dtype != source.dtype:
            raise ValueError(
                f"filters must be contiguous [O, k, k, {channels}] {source.dtype}, not "
                f"{list(weight.shape)} {weight.dtype}"
            )
        problem = cls(
            batch=batch,
            height=height,
            width=width,
            channels=channels,
            filters=filters,
            size=size,
            stride=stride,
            padding=padding,
            activation=activation,
            dtype=source.dtype,
            out_dtype=out.dtype,
            source_row=row_stride(source, "the source"),
            out_row=row_stride(out, "the output"),
            residual_dtype=None if residual is None else residual.dtype,
            residual_row=None if residual is None else row_stride(residual, "the residual"),
        )
        for name, tensor in (("the output", out), ("the residual", residual)):
            if tensor is not None and tensor.shape != problem.out_shape:
                raise ValueError(
                    f"{name} must be {list(problem.out_shape)}, not {list(tensor.shape)}"
                )
        return problem

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[B, height, width, filters]."""
        height, width = (
            (side + 2 * self.padding - self.size) // self.stride + 1
            for side in (self.height, self.width)
        )
        return self.batch, height, width, self.filters

    @property
    def aligned(self) -> bool:
        """Whether the channels of a cell are whole vectors."""
        return self.channels * self.dtype.itemsize % VECTOR == 0

    @property
    def dense(self) -> bool:
        """Whether the tensors fill their buffers: no slices, and whole vectors in each cell."""
        return (
            self.aligned
            and self.filters * self.out_dtype.itemsize % VECTOR == 0
            and self.source_row == self.channels
            and self.out_row == self.filters
            and self.residual_row in (None, self.filters)
        )

    def constants(self) -> tuple[int, ...]:
        """Numbers of the constants that its activation takes, as tensors of one element."""
        return CONSTANTS_OF.get(self.activation, ())

    def scales(self) -> tuple[int, ...]:
        """Numbers of the scales it takes: RESCALE [filters], the others [1], all float32."""
        pairs = (
            (RESCALE, self.dtype),
            (RESIDUAL_SCALE, self.residual_dtype),
            (OUT_SCALE, self.out_dtype),
        )
        return tuple(number for number, dtype in pairs if dtype == FP8)


def describe(graph: Any, problem: Problem) -> None:
    """Add the operations of a problem to a graph."""
    import cudnn

    batch, height, width, filters = problem.out_shape

    def image(number: int, channels: int, rows: int, columns: int, row: int, dtype: Any) -> Any:
        """NCHW sizes with the strides of a channels-last slice."""
        return graph.tensor(
            dim=[batch, channels, rows, columns],
            stride=[rows * columns * row, 1, columns * row, row],
            data_type=cudnn_type(dtype),
            uid=number,
        )

    def vector(number: int, channels: int) -> Any:
        return graph.tensor(
            dim=[1, channels, 1, 1],
            stride=[channels, 1, channels, channels],
            data_type=cudnn.data_type.FLOAT,
            uid=number,
        )

    size, channels, scales = problem.size, problem.channels, problem.scales()
    x = graph.conv_fprop(
        image(SOURCE, channels, problem.height, problem.width, problem.source_row, problem.dtype),
        graph.tensor(
            dim=[filters, channels, size, size],
            stride=[size * size * channels, 1, size * channels, channels],
            data_type=cudnn_type(problem.dtype),
            uid=WEIGHT,
        ),
        padding=[problem.padding] * 2,
        stride=[problem.stride] * 2,
        dilation=[1, 1],
    )
    if RESCALE in scales:
        x = graph.mul(x, vector(RESCALE, filters))
    x = _activate(graph, graph.add(x, vector(BIAS, filters)), problem.activation, vector)
    if problem.residual_row is not None and problem.residual_dtype is not None:
        residual = image(
            RESIDUAL, filters, height, width, problem.residual_row, problem.residual_dtype
        )
        if RESIDUAL_SCALE in scales:
            residual = graph.mul(residual, vector(RESIDUAL_SCALE, 1))
        x = graph.add(x, residual)
    if OUT_SCALE in scales:
        x = graph.mul(x, vector(OUT_SCALE, 1))
    x.set_output(True).set_data_type(cudnn_type(problem.out_dtype)).set_uid(OUT)
    x.set_dim([batch, filters, height, width])
    row = problem.out_row
    x.set_stride([height * width * row, 1, width * row, row])


def _activate(graph: Any, x: Any, name: str, vector: Callable[[int, int], Any]) -> Any:
    """cuDNN's softplus and tanh would make Mish of five approximations an element, one of them good
    to 11 bits only; e (e + 2) / (e (e + 2) + 2) takes two, good to 22. exp(min(x, 20)) is finite.
    SELU's exp(x) - 1 is off by 1e-7 near zero, which is far below the rounding of sums.
    """
    match name:
        case "leaky":
            return graph.relu(x, negative_slope=0.1)
        case "relu":
            return graph.relu(x)
        case "mish":
            e = graph.exp(graph.min(x, vector(LIMIT, 1)))
            two = vector(TWO, 1)
            n = graph.mul(e, graph.add(e, two))
            return graph.mul(x, graph.div(n, graph.add(n, two)))
        case "swish":
            return graph.div(x, graph.add(graph.exp(graph.neg(x)), vector(ONE, 1)))
        case "logistic":
            one = vector(ONE, 1)
            return graph.div(one, graph.add(graph.exp(graph.neg(x)), one))
        case "relu6":
            return graph.min(graph.relu(x), vector(SIX, 1))
        case "selu":
            fall = graph.sub(graph.exp(graph.min(x, vector(ZERO, 1))), vector(ONE, 1))
            rise = graph.mul(graph.relu(x), vector(POSITIVE, 1))
            return graph.add(rise, graph.mul(fall, vector(NEGATIVE, 1)))
        case "hard_swish":
            step = graph.min(graph.relu(graph.add(x, vector(THREE, 1))), vector(SIX, 1))
            return graph.mul(x, graph.mul(step, vector(SIXTH, 1)))
    return x


def cudnn_type(dtype: torch.dtype) -> Any:
    """What cuDNN calls a type."""
    import cudnn

    types = cudnn.data_type
    return {
        torch.float16: types.HALF,
        torch.bfloat16: types.BFLOAT16,
        torch.float32: types.FLOAT,
        FP8: types.FP8_E4M3,
    }[dtype]
