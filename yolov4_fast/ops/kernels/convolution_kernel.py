"""Convolution + bias + activation + residual as one matrix product over channels-last views.

    out[m, n] = sum over k of source[m, k] weight[n, k]      m: B * OH * OW cells, n: filters,
                                                             k: KH * KW * I of the window
No patch matrix is ever made: each step of the K loop gathers the source rows that one tap of the
kernel meets. Three ways through the loop, chosen at compile time:

    1x1    no window, so no bounds to look at: a plain matrix product (stride 1: rows are cells)
    taps   BLOCK_K channels of one tap a step, taps innermost, so that the nine reads of a channel
           block follow each other and the tap's number needs divisions by constants only. Which
           taps of a cell lie inside the map is worked out once, as bits.
    flat   K as one axis, for sources with few channels (the three of an image): their number is a
           compile-time value there, for the divisions

One loop rather than a loop nest, because the pipeliner then never drains between taps. Sizes and
strides are run-time values, unspecialised: one binary serves every layer of a kind. The channels
and row strides come as multiples of a unit, so that the compiler knows 16-byte loads are aligned.

Programs go through the tiles in groups of GROUP_M rows of tiles, so that those that run together
share source rows and filters in L2. With SPLIT a program takes a part of the K loop and writes
float32 sums, which mish_bn adds in order.
"""

import triton
import triton.language as tl

from yolov4_fast.ops.kernels.activation import activate

SIZES = (
    *("rows", "filters", "channels", "height", "width", "out_height", "out_width"),
    *("source_step", "residual_step", "out_step"),
)


@triton.jit
def finish(
    sums,
    bias,
    residual,
    out,
    m,
    first,
    rows,
    filters,
    residual_step,
    out_step,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Bias, activation, residual and one rounding of the sums [len(m), len(n)].

    PARTS > 1: by halves of the columns, so that the registers of a large tile suffice.
    """
    BLOCK_N: tl.constexpr = sums.shape[1]
    if PARTS > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        halves = sums.reshape((sums.shape[0], 2, HALF)).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            finish(
                halves[half],
                bias,
                residual,
                out,
                m,
                first + half * HALF,
                rows,
                filters,
                residual_step,
                out_step,
                ACTIVATION,
                PARTS // 2,
            )
    else:
        n = first + tl.arange(0, BLOCK_N)
        written = (m < rows)[:, None] & (n < filters)[None, :]
        row = m.to(tl.int64)
        values = sums + tl.load(bias + n, n < filters, other=0.0)[None, :]
        values = activate(values, ACTIVATION)
        if residual is not None:
            added = residual + row[:, None] * residual_step + n[None, :]
            values += tl.load(added, written, other=0.0).to(tl.float32)
        target = out + row[:, None] * out_step + n[None, :]
        tl.store(target, values.to(out.dtype.element_ty), written)


@triton.jit
def store_sums(sums, out, m, n, rows, filters):
    """The sums as they are, float32, into out [rows, filters]."""
    written = (m < rows)[:, None] & (n < filters)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * filters + n[None, :], sums, written)


@triton.jit(do_not_specialize=SIZES)
def convolution_kernel(
    source,
    weight,
    bias,
    residual,
    out,
    rows,
    filters,
    channels,
    height,
    width,
    out_height,
    out_width,
    source_step,
    residual_step,
    out_step,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    UNIT_IN: tl.constexpr,
    UNIT_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """channels and source_step come divided by UNIT_IN; filters, residual_step and out_step by
    UNIT_OUT. out: float32 [tl.num_programs(1), rows, filters] where SPLIT. FLAT: the number of
    channels where K is one axis, else 0. EVEN: BLOCK_K divides the channels.
    """
    TAPS: tl.constexpr = KH * KW
    POINTWISE: tl.constexpr = TAPS == 1 and PADDING == 0
    channels *= UNIT_IN
    source_step *= UNIT_IN
    filters *= UNIT_OUT
    depth = TAPS * channels

    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(filters, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    place = tl.program_id(0) - group * (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + place % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (place // group_rows) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)

    # Rows beyond the last read the last one again: no mask in the loop, and nothing is stored.
    cell = tl.minimum(m, rows - 1)
    if not (POINTWISE and STRIDE == 1):
        line = cell // out_width
        image = line // out_height
        y = (line - image * out_height) * STRIDE - PADDING
        x = (cell - line * out_width) * STRIDE - PADDING
        cell = (image * height + y) * width + x
    source_row = source + cell.to(tl.int64) * source_step
    filter_row = weight + tl.minimum(n, filters - 1) * depth
    if PADDING > 0 and not FLAT:
        BITS: tl.constexpr = tl.int32 if TAPS < 32 else tl.int64
        inside = tl.zeros((BLOCK_M,), BITS)
        for bit in tl.static_range(TAPS):
            row_inside = (y + bit // KW >= 0) & (y + bit // KW < height)
            column_inside = (x + bit % KW >= 0) & (x + bit % KW < width)
            inside |= (row_inside & column_inside).to(BITS) << bit

    if FLAT:
        steps = tl.cdiv(depth, BLOCK_K)
    else:
        steps = tl.cdiv(channels, BLOCK_K) * TAPS
    if SPLIT:
        share = tl.cdiv(steps, tl.num_programs(1))
        first = tl.program_id(1) * share
        steps = tl.minimum(first + share, steps)
    else:
        first = 0
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, steps):
        if FLAT:
            index = step * BLOCK_K + k
            tap = index // FLAT
            tap_y = tap // KW
            tap_x = tap - tap_y * KW
            near_y = y[:, None] + tap_y[None, :]
            near_x = x[:, None] + tap_x[None, :]
            there = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
            shift = (tap_y * width + tap_x) * source_step + index - tap * FLAT
            known = index < depth
            a = tl.load(source_row[:, None] + shift[None, :], there & known[None, :], other=0.0)
            b = tl.load(filter_row[None, :] + index[:, None], known[:, None], other=0.0)
        else:
            block = step // TAPS
            tap = step - block * TAPS
            channel = block * BLOCK_K + k
            shift = (tap // KW * width + tap % KW) * source_step
            a_pointers = source_row[:, None] + (shift + channel)[None, :]
            b_pointers = filter_row[None, :] + (tap * channels + channel)[:, None]
            if PADDING > 0:
                there = ((inside >> tap) & 1) != 0
                if EVEN:
                    a = tl.load(a_pointers, there[:, None], other=0.0)
                else:
                    known = channel < channels
                    a = tl.load(a_pointers, there[:, None] & known[None, :], other=0.0)
            elif EVEN:
                a = tl.load(a_pointers)
            else:
                a = tl.load(a_pointers, (channel < channels)[None, :], other=0.0)
            if EVEN:
                b = tl.load(b_pointers)
            else:
                b = tl.load(b_pointers, (channel < channels)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")

    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * rows * filters
        store_sums(sums, out, m, n, rows, filters)
    else:
        residual_step *= UNIT_OUT
        out_step *= UNIT_OUT
        finish(
            sums,
            bias,
            residual,
            out,
            m,
            first_n,
            rows,
            filters,
            residual_step,
            out_step,
            ACTIVATION,
            PARTS,
        )
