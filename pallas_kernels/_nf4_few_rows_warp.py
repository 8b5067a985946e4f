"""The few-row kernel on `mma.sync`: each thread's registers are laid out here, not by Triton.

Tensors are [THREADS], one element a thread. A quad of lanes reads a block's 32 bytes of a weight
row, so that a byte's two weights are a register of the left operand as they come, and x's columns
match them without a shuffle. A byte's pair of bfloat16 values is one 4-byte load: the 256 pairs
stand in shared memory 32 times, one copy in each bank, and no two lanes ever wait for a bank.

One or two rows of x leave columns of the right operand free: there they hold four blocks' columns
each, so that a lane reads one block of x for four of the weight, and needs two blocks' scales.
All that a program reads from global memory is asked for before the first thing that waits.
"""

import triton.language as tl

from pallas_kernels._nf4_few_rows_ptx import (
    begin,
    block_sums,
    blocks_bytes,
    eight_columns,
    fill,
    left_of,
    looked_up,
    over_warps,
)
from pallas_kernels._nf4_few_rows_triton import choose, codebook, group, jit


@jit
def stored_together(absmax, number, STEP: tl.constexpr, NESTED: tl.constexpr):
    """What is stored of the scales of STEP blocks from `number` on: one word, or each alone."""
    if NESTED:
        kind: tl.constexpr = tl.int32 if STEP == 4 else (tl.int16 if STEP == 2 else tl.uint8)
        return tl.load(absmax.to(tl.pointer_type(kind)) + number // STEP).to(tl.int32)
    else:
        found = (tl.load(absmax + number),)
        for k in tl.static_range(1, STEP):
            found = found + (tl.load(absmax + number + k),)
        return found


@jit
def scale_of(stored, wide, offset, maps, fours, PLACE: tl.constexpr, NESTED: tl.constexpr):
    """The float32 scale of block PLACE of those stored together.

    `fours` has no lower bits: what is made of it stays behind FILL, in the compiler's eyes too.
    """
    if NESTED:
        at = maps + (((stored | (fours & 3)) >> (8 * PLACE)) & 255) * 4
        return looked_up(at) * wide + offset
    else:
        return stored[PLACE]


@jit
def ask(
    tile, block, quad, place, layer, packed, absmax, nested,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    I: tl.constexpr, STEP: tl.constexpr, NESTED: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """A step's bytes and stored scales of rows quad and quad + 8 of a tile, of blocks from one.

    SPREAD: only the two scales of a row that the lane's sums need.
    """
    per_row: tl.constexpr = I // 64
    matrix, start, before = place_of(tile, O0, O1)
    height = tl.where(matrix == 0, O0, tl.where(matrix == 1, O1, O2))
    upper, lower = start + quad, start + quad + 8
    if O0 % 16 + O1 % 16 + O2 % 16 > 0:
        upper, lower = tl.minimum(upper, height - 1), tl.minimum(lower, height - 1)
    base = choose(matrix, packed[0], packed[1], packed[2]) + layer * height * (I // 2)
    base = base.to(tl.int64) + block * 32 + place * 8
    w = blocks_bytes(base + upper * (I // 2), base + lower * (I // 2), STEP)
    scales = choose(matrix, absmax[0], absmax[1], absmax[2]) + layer * height * per_row
    first, second = upper * per_row + block, lower * per_row + block
    if SPREAD:
        s = stored_together(scales, first + place % 2 * 2, 2, NESTED)
        t = stored_together(scales, second + place % 2 * 2, 2, NESTED)
    else:
        s = stored_together(scales, first, STEP, NESTED)
        t = stored_together(scales, second, STEP, NESTED)
    if NESTED:
        outer = choose(matrix, nested[0], nested[1], nested[2])
        outer += layer * ((height * per_row + 255) // 256)
        return w, s, t, tl.load(outer + first // 256), tl.load(outer + second // 256)
    else:
        return w, s, t, 0.0, 0.0


@jit
def add_step(
    total, ahead, found, right, at, then, fours, offset, maps,
    STEP: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Adds the products of a step's blocks, each scaled in float32, to four sums a thread.

    `ahead` is the first block's columns of x; those of the block at `then`, if that is not
    negative, come back beside sums.
    """
    w, s, t, wide, wide_t = found
    for k in tl.static_range(STEP):
        columns = ahead
        following = at + 128 * (k + 1) if k + 1 < STEP else then
        if following >= 0:
            ahead = columns_of(right, following)
        left = left_of(w[k], w[STEP + k], fours)
        a = scale_of(s, wide, offset, maps, fours, k, NESTED)
        b = scale_of(t, wide_t, offset, maps, fours, k, NESTED)
        sums = ()
        for c in tl.static_range(len(right)):
            p = block_sums(left, columns[c])
            old = total[c]
            new = (old[0] + p[0] * a, old[1] + p[1] * a, old[2] + p[2] * b, old[3] + p[3] * b)
            sums = sums + (new,)
        total = sums
    return total, ahead


@jit
def columns_of(right, at):
    """A block's columns of up to 8 rows of x at each address of a tuple."""
    found = ()
    for c in tl.static_range(len(right)):
        found = found + (eight_columns(right[c] + at),)
    return found


@jit
def add_spread(
    total, ahead, found, right, then, place, fours, offset, maps, NESTED: tl.constexpr
):  # fmt: skip
    """Adds a step's four blocks: column c of a product holds block c % 4 of row c // 4 of x.

    A lane's columns 2t, 2t + 1 are blocks 0, 1 or, where t is odd, 2, 3; others' sums are dropped.
    `ahead` and what comes back beside sums are as in `add_step`.
    """
    columns, odd = ahead[0], place % 2 == 1
    if then >= 0:
        ahead = columns_of(right, then)
    w, s, t, wide, wide_t = found
    p0 = block_sums(left_of(w[0], w[4], fours), columns)
    p1 = block_sums(left_of(w[1], w[5], fours), columns)
    p2 = block_sums(left_of(w[2], w[6], fours), columns)
    p3 = block_sums(left_of(w[3], w[7], fours), columns)
    upper, lower = total[0]
    first = scale_of(s, wide, offset, maps, fours, 0, NESTED)
    second = scale_of(s, wide, offset, maps, fours, 1, NESTED)
    upper += tl.where(odd, p2[0], p0[0]) * first + tl.where(odd, p3[1], p1[1]) * second
    first = scale_of(t, wide_t, offset, maps, fours, 0, NESTED)
    second = scale_of(t, wide_t, offset, maps, fours, 1, NESTED)
    lower += tl.where(odd, p2[2], p0[2]) * first + tl.where(odd, p3[3], p1[3]) * second
    return ((upper, lower),), ahead


@jit
def warp_kernel(
    x, layers, layer,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    y,
    M: tl.constexpr, I: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    NESTED: tl.constexpr, TRACED: tl.constexpr, SHUFFLED: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, STEP: tl.constexpr, TILES: tl.constexpr,
    REGISTERS: tl.constexpr,
):  # fmt: skip
    """Up to 16 rows of x with TILES times 16 weight rows; a warp takes its part of each row.

    STEP blocks are asked for at once, two steps ahead of the one that is multiplied.
    """
    per_row: tl.constexpr = I // 64
    steps: tl.constexpr = per_row // (WARPS * STEP)
    last: tl.constexpr = (O0 + 15) // 16 + (O1 + 15) // 16 + (O2 + 15) // 16 - 1
    SPREAD: tl.constexpr = STEP == 4 and M <= 2
    if TRACED:
        layer = tl.load(layers)
    layer = tl.cast(layer, tl.int64)
    thread = tl.arange(0, 32 * WARPS)
    quad, place = thread % 32 // 4, thread % 4
    part = thread // 32 * (per_row // WARPS)
    MAPS: tl.constexpr = 0 if not NESTED else (1 if O1 == 0 else 3)
    entry = layer * 256 + thread % 256
    begin(map0 + entry, map1 + entry, map2 + entry, MAPS)
    packed, absmax = (packed0, packed1, packed2), (absmax0, absmax1, absmax2)
    nested = (nested0, nested1, nested2)
    tile, stride = tl.program_id(0), tl.num_programs(0)
    now = ask(
        tile, part, quad, place, layer, packed, absmax, nested,
        O0, O1, O2, I, STEP, NESTED, SPREAD,
    )  # fmt: skip
    soon = now
    if TILES * steps > 1:
        soon = ask(
            tl.minimum(tile + stride * (1 // steps), last), part + 1 % steps * STEP, quad, place,
            layer, packed, absmax, nested, O0, O1, O2, I, STEP, NESTED, SPREAD,
        )  # fmt: skip
    offsets = (0.0, 0.0, 0.0)
    if NESTED:
        offsets = all_of(offset0 + layer, offset1 + layer, offset2 + layer, O1, O2)
    right = addresses(x, quad, place, part, M, I, SPREAD)
    ahead = columns_of(right, 0)
    fours = fill(bits_of(thread))
    nothing = nothing_yet(fours * 0.0, M, SPREAD)
    total = nothing
    for n in tl.static_range(TILES * steps):
        then = soon
        if n + 2 < TILES * steps:
            then = ask(
                tl.minimum(tile + stride * ((n + 2) // steps), last),
                part + (n + 2) % steps * STEP, quad, place,
                layer, packed, absmax, nested, O0, O1, O2, I, STEP, NESTED, SPREAD,
            )  # fmt: skip
        matrix, start, before = place_of(tl.minimum(tile + stride * (n // steps), last), O0, O1)
        offset = choose_scale(matrix, offsets)
        at = (n + 1) % steps * STEP * 128 if n + 1 < TILES * steps else -1
        if SPREAD:
            total, ahead = add_spread(
                total, ahead, now, right, at, place, fours, offset, matrix * 1024, NESTED
            )
        else:
            total, ahead = add_step(
                total, ahead, now, right, n % steps * STEP * 128, at,
                fours, offset, matrix * 1024, STEP, NESTED,
            )  # fmt: skip
        now = soon
        soon = then
        if n % steps == steps - 1:
            height = tl.where(matrix == 0, O0, tl.where(matrix == 1, O1, O2))
            inside = tile + stride * (n // steps) <= last
            put(
                y + before, total, start, tl.where(inside, height, 0), n // steps,
                M, O0 + O1 + O2, WARPS, SPREAD,
            )  # fmt: skip
            total = nothing


@jit
def nothing_yet(zero, M: tl.constexpr, SPREAD: tl.constexpr):
    """Sums of no step yet: a lane's, for each 8 rows of x."""
    nothing = ()
    for _ in tl.static_range((M + 7) // 8):
        nothing = nothing + ((zero, zero) if SPREAD else (zero, zero, zero, zero),)
    return nothing


@jit
def all_of(first, second, third, O1: tl.constexpr, O2: tl.constexpr):
    """What stands at three addresses; matrices that are not there get the first one's."""
    found = tl.load(first)
    return found, tl.load(second) if O1 > 0 else found, tl.load(third) if O2 > 0 else found


@jit
def addresses(x, quad, place, part, M: tl.constexpr, I: tl.constexpr, SPREAD: tl.constexpr):
    """Where a lane's columns of x begin: one address for each 8 rows, of the warp's first step."""
    right = ()
    for c in tl.static_range((M + 7) // 8):
        row, block = quad + 8 * c, part
        if SPREAD:
            row, block = quad // 4, part + quad % 4
        row = tl.minimum(row, M - 1)
        right = right + (x.to(tl.int64) + (row * I + place * 16 + block * 64) * 2,)
    return right


@jit
def choose_scale(matrix, offsets):
    """The offset of the scales of the matrix that a program works on."""
    return tl.where(matrix == 0, offsets[0], tl.where(matrix == 1, offsets[1], offsets[2]))


@jit
def put(
    y, total, start, height, TILE: tl.constexpr,
    M: tl.constexpr, O: tl.constexpr, WARPS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Adds all warps' sums and stores them: a lane has columns 2t, 2t + 1 of rows g, g + 8."""
    thread = tl.arange(0, 32 * WARPS)
    lane, k = thread % 32, thread // 32
    for c in tl.static_range(len(total)):
        value = over_warps(total[c], TILE * len(total) + c, WARPS, SPREAD)
        if SPREAD:
            column, row = lane % 4 // 2, start + lane // 4 + k * 8
            mine = (k < 2) & (lane % 2 == 0)
        else:
            column, row = 8 * c + lane % 4 * 2 + k % 2, start + lane // 4 + k // 2 * 8
            mine = k < 4
        where = y + column * O + row
        tl.store(where, value.to(y.dtype.element_ty), mask=mine & (column < M) & (row < height))


@jit
def bits_of(code):
    """The bits of a code's bfloat16 value."""
    return codebook(code).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@jit
def place_of(tile, O0: tl.constexpr, O1: tl.constexpr):
    """Of a group of 16 rows: its matrix, its first row there, the rows of matrices before."""
    if O1 == 0:
        return 0, tile * 16, 0
    else:
        return group(tile, 16, O0, O1)
