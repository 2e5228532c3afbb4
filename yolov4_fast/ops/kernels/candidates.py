"""The two kernels of `decode`: which anchors hold an object, and the candidates of those.

Both take up to three heads, whose arguments end in 0, 1 and 2; a head that is not there has no
cells. `pick` takes a head's own.
"""

import triton
import triton.language as tl


@triton.jit
def pick(head, first, second, third):
    return tl.where(head == 0, first, tl.where(head == 1, second, third))


@triton.jit
def filter_kernel(
    map0,
    map1,
    map2,
    cells0,
    cells1,
    cells2,
    stride0,
    stride1,
    stride2,
    anchors0,
    anchors1,
    anchors2,
    entries0,
    entries1,
    entries2,
    bound0,
    bound1,
    bound2,
    listed,
    found,
    counts,
    RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """listed: [B, sum of cells * anchors] int32, numbers of the anchors that pass, head by head,
    anchor by anchor, cell by cell; found: [B] int32, how many, zero before. RESET: counts = 0.
    """
    batch = tl.program_id(1).to(tl.int64)
    if RESET and tl.program_id(0) == 0:
        tl.store(counts + batch, 0)
    first0 = tl.cdiv(cells0 * anchors0, BLOCK)
    first1 = first0 + tl.cdiv(cells1 * anchors1, BLOCK)
    program = tl.program_id(0)
    head = (program >= first0).to(tl.int32) + (program >= first1).to(tl.int32)
    cells = pick(head, cells0, cells1, cells2)
    stride = pick(head, stride0, stride1, stride2)
    anchors = pick(head, anchors0, anchors1, anchors2)
    start = pick(head, 0, cells0 * anchors0, cells0 * anchors0 + cells1 * anchors1)
    # A cell's anchors are neighbours, as in memory.
    index = (program - pick(head, 0, first0, first1)) * BLOCK + tl.arange(0, BLOCK)
    cell, anchor = index // anchors, index % anchors
    image = pick(head, map0, map1, map2) + batch * cells * stride
    offset = cell * stride + anchor * pick(head, entries0, entries1, entries2) + 4
    inside = cell < cells
    objectness = tl.load(image + offset, inside, other=0.0).to(tl.float32)
    passes = inside & (objectness > pick(head, bound0, bound1, bound2))  # NaN does not
    rank = tl.cumsum(passes.to(tl.int32), 0)
    count = tl.sum(passes.to(tl.int32), 0)
    if count > 0:
        base = tl.atomic_add(found + batch, count, sem="relaxed")
        all_anchors = cells0 * anchors0 + cells1 * anchors1 + cells2 * anchors2
        slots = listed + batch * all_anchors + base + rank - 1
        tl.store(slots, start + anchor * cells + cell, passes)


@triton.jit
def probability(raw, new_coords):
    """Of raw float64 values; with new_coords they are it already."""
    return tl.where(new_coords, raw, 1.0 / (1.0 + tl.exp(-raw)))


@triton.jit
def chosen(index, axis: tl.constexpr, PAIRS: tl.constexpr, COUNT: tl.constexpr):
    """PAIRS[2 * index + axis], float64 to the last bit."""
    value = tl.full((), 0.0, tl.float64)
    for i in tl.static_range(COUNT):
        value = tl.where(index == i, tl.full((), PAIRS[2 * i + axis], tl.float64), value)
    return value


@triton.jit
def span(entry, cell, cells, scale, shift, anchor, new_coords, placement):
    """Where the box begins and ends on an axis, float32. entry: of tx or ty; tw or th is 2 on."""
    t = tl.load(entry).to(tl.float64)
    s = tl.load(entry + 2).to(tl.float64)
    center = probability(t, new_coords) * scale - shift + cell.to(tl.float64)
    center /= cells.to(tl.float64)
    size = tl.where(new_coords, 4 * s * s, tl.exp(s)) * anchor
    begin, end = center - 0.5 * size, center + 0.5 * size
    if placement is not None:
        zoom = tl.load(placement).to(tl.float64)
        offset = tl.load(placement + 2).to(tl.float64)
        begin = begin * zoom + offset
        end = end * zoom + offset
    return begin.to(tl.float32), end.to(tl.float32)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # NaN is not less either


@triton.jit
def append_kernel(
    map0,
    map1,
    map2,
    cells0,
    cells1,
    cells2,
    width0,
    width1,
    width2,
    stride0,
    stride1,
    stride2,
    anchors0,
    anchors1,
    anchors2,
    classes0,
    classes1,
    classes2,
    listed,
    found,
    placement,
    boxes,
    scores,
    class_ids,
    numbers,
    counts,
    first_number,
    capacity,
    confidence,
    SCALES: tl.constexpr,
    ANCHORS: tl.constexpr,
    ANCHOR_COUNT: tl.constexpr,
    NEW_COORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """SCALES: scale_x_y and (scale_x_y - 1) / 2 of each head. ANCHORS: width and height of each
    anchor of each head, relative to the input. NEW_COORDS: bit i of head i.
    """
    batch = tl.program_id(1).to(tl.int64)
    pairs0, pairs1 = cells0 * anchors0, cells1 * anchors1
    numbers0, numbers1 = pairs0 * classes0, pairs1 * classes1
    all_anchors = pairs0 + pairs1 + cells2 * anchors2
    x_placement, y_placement = placement, placement
    if placement is not None:
        x_placement = placement + 4 * batch
        y_placement = x_placement + 1
    count = tl.load(found + batch)
    k = tl.program_id(0)
    while k < count:
        index = tl.load(listed + batch * all_anchors + k)
        k += tl.num_programs(0)
        head = (index >= pairs0).to(tl.int32) + (index >= pairs0 + pairs1).to(tl.int32)
        cells = pick(head, cells0, cells1, cells2)
        width = pick(head, width0, width1, width2)
        stride = pick(head, stride0, stride1, stride2)
        classes = pick(head, classes0, classes1, classes2)
        local = index - pick(head, 0, pairs0, pairs0 + pairs1)
        anchor, cell = local // cells, local % cells
        new_coords = ((NEW_COORDS >> head) & 1) != 0
        row = pick(head, map0, map1, map2) + batch * cells * stride
        row += cell * stride + anchor * (5 + classes)
        objectness = probability(tl.load(row + 4).to(tl.float64), new_coords)
        if objectness.to(tl.float32) > confidence:
            scale = chosen(head, 0, SCALES, 3)
            shift = chosen(head, 1, SCALES, 3)
            which = pick(head, 0, anchors0, anchors0 + anchors1) + anchor
            x_anchor = chosen(which, 0, ANCHORS, ANCHOR_COUNT)
            y_anchor = chosen(which, 1, ANCHORS, ANCHOR_COUNT)
            x1, x2 = span(row, cell % width, width, scale, shift, x_anchor, new_coords, x_placement)
            y1, y2 = span(
                row + 1, cell // width, cells // width, scale, shift, y_anchor, new_coords,
                y_placement,
            )  # fmt: skip
            finite = (is_finite(x1) & is_finite(x2)) & (is_finite(y1) & is_finite(y2))
            number = first_number + pick(head, 0, numbers0, numbers0 + numbers1) + local * classes
            for chunk in tl.static_range(CHUNKS):
                c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
                raw = tl.load(row + 5 + c, c < classes, other=0.0).to(tl.float64)
                score = (objectness * probability(raw, new_coords)).to(tl.float32)
                hit = (c < classes) & (score > confidence)
                rank = tl.cumsum(hit.to(tl.int32), 0)
                hits = tl.sum(hit.to(tl.int32), 0)
                if finite & (hits > 0):
                    slot = tl.atomic_add(counts + batch, hits, sem="relaxed") + rank - 1
                    kept = hit & (slot < capacity)
                    slot = batch * capacity + slot
                    tl.store(scores + slot, score, kept)
                    tl.store(class_ids + slot, c, kept)
                    tl.store(numbers + slot, number + c, kept)
                    tl.store(boxes + 4 * slot, x1, kept)
                    tl.store(boxes + 4 * slot + 1, y1, kept)
                    tl.store(boxes + 4 * slot + 2, x2, kept)
                    tl.store(boxes + 4 * slot + 3, y2, kept)
