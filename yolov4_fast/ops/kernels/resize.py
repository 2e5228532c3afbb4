"""Images of any size, uint8 or float32, to one channels-last batch; definition in ops/resize.py.

One launch for a whole batch: a table on the device says where each image lies, so that a CUDA graph
of it serves images of every size. A program makes ROWS x BLOCK neighbouring output values, which
share the positions of their columns; neighbouring threads take neighbouring channels and pixels, so
that they write one run of memory and read from few cache lines.

float32 arithmetic as in the definition, step by step, then one rounding. A byte is divided by 255
as x * 0x1.01p-8 + x * 0x1.010102p-24: the first product is exact, so that the sum is the correctly
rounded quotient with and without fused multiply-add.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from yolov4_fast.ops.kernels.variant import Variant
from yolov4_fast.ops.views import FLOATS, check_dtype, row_stride

COLUMNS = 12  # of the table
DTYPE_CODES = {torch.uint8: 0, torch.float32: 1}
BLOCK, ROWS = 128, 8

FILL = tl.constexpr(0.5)
UNIT_HIGH = tl.constexpr(float.fromhex("0x1.01p-8"))
UNIT_LOW = tl.constexpr(float.fromhex("0x1.010102p-24"))


@triton.jit
def taps(cell, size_in, size_out):
    """The two input cells that an output cell lies between, and its distance from the first."""
    step = tl.div_rn((size_in - 1).to(tl.float32), tl.maximum(size_out - 1, 1).to(tl.float32))
    last = (size_in - 1).to(tl.float32)
    position = tl.where(cell == size_out - 1, last, cell.to(tl.float32) * step)
    index = tl.minimum(position.to(tl.int32), size_in - 1)
    return index, tl.minimum(index + 1, size_in - 1), position - index.to(tl.float32)


@triton.jit
def lerp(a, b, weight):
    """a + weight (b - a), from the nearer end, as torch.lerp computes it."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1), b - a, tl.where(near, a, b))


@triton.jit
def pixels(pointers, inside):
    """float32 in 0..1 of uint8 or float32."""
    values = tl.load(pointers, inside, other=0)
    if pointers.dtype.element_ty == tl.uint8:
        values = values.to(tl.float32)
        values = values * UNIT_HIGH + values * UNIT_LOW
    return values


@triton.jit
def sample(image, inside, above, below, left, right, dy, dx):
    """image: pointer; above, below, left, right: offsets of rows and columns from it."""
    upper = lerp(pixels(image + above + left, inside), pixels(image + above + right, inside), dx)
    lower = lerp(pixels(image + below + left, inside), pixels(image + below + right, inside), dx)
    return lerp(upper, lower, dy)


@triton.jit
def resize_kernel(
    table,
    out,
    height,
    width,
    OUT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """table: [B, 12] int64, see `table_row`. out: [B, height, width, OUT_STRIDE], 3 written."""
    batch_index = tl.program_id(2)
    row = table + batch_index * 12
    address = tl.load(row)
    image_height = tl.load(row + 1).to(tl.int32)
    image_width = tl.load(row + 2).to(tl.int32)
    stride_y = tl.load(row + 3)
    stride_x = tl.load(row + 4)
    stride_c = tl.load(row + 5)
    code = tl.load(row + 6)
    top = tl.load(row + 7).to(tl.int32)
    left = tl.load(row + 8).to(tl.int32)
    region_height = tl.load(row + 9).to(tl.int32)
    region_width = tl.load(row + 10).to(tl.int32)

    # One dimension: neighbouring threads get neighbouring elements of a row, whatever the compiler.
    index = tl.arange(0, ROWS * BLOCK)
    element = tl.program_id(0) * BLOCK + index % BLOCK
    x, channel = element // 3, element % 3
    y = tl.program_id(1) * ROWS + index // BLOCK
    inside = (x >= left) & (x < left + region_width) & (y >= top) & (y < top + region_height)

    column, next_column, dx = taps(x - left, image_width, region_width)
    line, next_line, dy = taps(y - top, image_height, region_height)
    first = column * stride_x + channel * stride_c
    second = next_column * stride_x + channel * stride_c
    above = line * stride_y
    below = next_line * stride_y
    as_bytes = address.to(tl.pointer_type(tl.uint8))
    as_floats = address.to(tl.pointer_type(tl.float32))
    if code == 0:
        values = sample(as_bytes, inside, above, below, first, second, dy, dx)
    else:
        values = sample(as_floats, inside, above, below, first, second, dy, dx)

    values = tl.where(inside, values, FILL).to(out.dtype.element_ty)
    offset = ((batch_index.to(tl.int64) * height + y) * width + x) * OUT_STRIDE + channel
    tl.store(out + offset, values, (y < height) & (x < width))


def table_row(image: Tensor, region: Sequence[int]) -> list[int]:
    """What the kernel must know of an image [H, W, 3], uint8 or float32, of any strides.

    region: top, left, height and width on the canvas. The row holds the image's address: the image
    must live until the kernel has run.
    """
    return [
        image.data_ptr(),
        *image.shape[:2],
        *image.stride(),
        DTYPE_CODES[image.dtype],
        *region,
        0,
    ]


def launch(table: Tensor, out: Tensor) -> None:
    """Fill `out`, on its device's current stream; neither waits nor allocates.

    table: [B, 12] int64, contiguous, on the device: a `table_row` for each image, whose regions lie
    within the canvas. out: view [B, height, width, 3] of float32, float16 or bfloat16; the rest of
    its buffer's rows is left alone. Raises ValueError.
    """
    stride = row_stride(out, "out")
    check_dtype(out, "out", FLOATS)
    batch, height, width, channels = out.shape
    if channels != 3:
        raise ValueError(f"out must be [batch, height, width, 3], not {list(out.shape)}")
    if table.shape != (batch, COLUMNS) or table.dtype != torch.int64 or not table.is_contiguous():
        raise ValueError(
            f"table must be [{batch}, {COLUMNS}] int64 and contiguous, not {list(table.shape)} "
            f"{table.dtype} with strides {list(table.stride())}"
        )
    if table.device != out.device:
        raise ValueError(f"table is on {table.device} and out on {out.device}: one device for both")
    grid = (triton.cdiv(3 * width, BLOCK), triton.cdiv(height, ROWS), batch)
    with torch.cuda.device_of(out):
        # Unfused: a fused position - index would not be the definition's.
        resize_kernel[grid](
            table, out, height, width, OUT_STRIDE=stride, BLOCK=BLOCK, ROWS=ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _variant(dtype: str, stride: int, aligned: bool) -> Variant:
    return Variant(
        name=f"resize {dtype} rows of {stride}{'' if aligned else ' unaligned'}",
        kernel=resize_kernel,
        signature={"table": "*i64", "out": f"*{dtype}", "height": "i32", "width": "i32"},
        constexprs={"OUT_STRIDE": stride, "BLOCK": BLOCK, "ROWS": ROWS},
        aligned=("table", "out", "height", "width") if aligned else ("table",),
        fp_fusion=False,
        minimum_sm=80 if dtype == "bf16" else 75,
    )


VARIANTS = (
    _variant("fp16", 3, True),
    _variant("bf16", 3, True),
    _variant("fp32", 3, True),
    _variant("fp16", 8, True),
    _variant("fp32", 8, False),
)
