"""Raw maps as TensorRT has them, plane by plane, to every box and its scores: one Triton kernel.

It is compiled ahead into a plan (aot_decode.py), so it keeps to what such a kernel can do: no
buffer that is cleared before, no atomics, every output written in full, scalars only of 32 bits.
Unlike the kernels of ops/kernels, which list the few candidates, it writes all boxes; where nothing
in a block passes, that is all it does.
"""

import triton
import triton.language as tl

from yolov4_fast.ops.kernels.candidates import chosen, is_finite, probability


@triton.jit
def span(t, s, cell, cells, scale, shift, anchor, NEW_COORDS: tl.constexpr):
    """Where boxes begin and end on an axis, float32; t: tx or ty, s: tw or th, float64. anchor: in
    cells.
    """
    center = probability(t, NEW_COORDS) * scale - shift + cell.to(tl.float64)
    center /= cells.to(tl.float64)
    size = (4 * s * s if NEW_COORDS else tl.exp(s)) * anchor
    return (center - 0.5 * size).to(tl.float32), (center + 0.5 * size).to(tl.float32)


@triton.jit
def dense_kernel(
    raw,
    height,
    width,
    boxes,
    scores,
    SCALE: tl.constexpr,
    ANCHORS: tl.constexpr,
    ANCHOR_COUNT: tl.constexpr,
    STRIDE: tl.constexpr,
    NEW_COORDS: tl.constexpr,
    CLASSES: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """raw: [B, A * (5 + C), height, width]. boxes: [B, A * height * width, 4] float32 xyxy relative
    to the input, 0 where one is not finite. scores: [B, A * height * width, C] float32, 0 where one
    is not over the confidence. SCALE: scale_x_y and (scale_x_y - 1) / 2. ANCHORS: width and height
    of each anchor in pixels. CONFIDENCE: float32. The grid: blocks of cells, anchors, images.
    """
    anchor = tl.program_id(1)
    image_anchor = tl.program_id(2).to(tl.int64) * ANCHOR_COUNT + anchor
    cells = height * width
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    planes = raw + image_anchor * (5 + CLASSES) * cells + cell
    rows = image_anchor * cells + cell
    objectness = tl.load(planes + 4 * cells, inside, other=0.0).to(tl.float64)
    objectness = probability(objectness, NEW_COORDS)
    passes = inside & (objectness.to(tl.float32) > CONFIDENCE)  # NaN does not
    scale = tl.full((), SCALE[0], tl.float64)
    shift = tl.full((), SCALE[1], tl.float64)
    x_anchor = chosen(anchor, 0, ANCHORS, ANCHOR_COUNT) / (width * STRIDE).to(tl.float64)
    y_anchor = chosen(anchor, 1, ANCHORS, ANCHOR_COUNT) / (height * STRIDE).to(tl.float64)
    x = tl.load(planes, inside, other=0.0).to(tl.float64)
    y = tl.load(planes + cells, inside, other=0.0).to(tl.float64)
    w = tl.load(planes + 2 * cells, inside, other=0.0).to(tl.float64)
    h = tl.load(planes + 3 * cells, inside, other=0.0).to(tl.float64)
    x1, x2 = span(x, w, cell % width, width, scale, shift, x_anchor, NEW_COORDS)
    y1, y2 = span(y, h, cell // width, height, scale, shift, y_anchor, NEW_COORDS)
    finite = (is_finite(x1) & is_finite(x2)) & (is_finite(y1) & is_finite(y2))
    tl.store(boxes + 4 * rows, tl.where(finite, x1, 0.0), inside)
    tl.store(boxes + 4 * rows + 1, tl.where(finite, y1, 0.0), inside)
    tl.store(boxes + 4 * rows + 2, tl.where(finite, x2, 0.0), inside)
    tl.store(boxes + 4 * rows + 3, tl.where(finite, y2, 0.0), inside)
    passes &= finite
    any_passes = tl.max(passes.to(tl.int32), 0) > 0
    for start in tl.static_range(0, CLASSES, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = inside[:, None] & (c < CLASSES)[None, :]
        out = scores + rows[:, None] * CLASSES + c[None, :]
        if any_passes:
            here = valid & passes[:, None]
            entry = planes[:, None] + (5 + c)[None, :] * cells
            score = tl.load(entry, here, other=0.0).to(tl.float64)
            score = (objectness[:, None] * probability(score, NEW_COORDS)).to(tl.float32)
            tl.store(out, tl.where(here & (score > CONFIDENCE), score, 0.0), valid)
        else:
            tl.store(out, tl.zeros((BLOCK, BLOCK_C), tl.float32), valid)
