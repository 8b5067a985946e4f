"""Triton bodies of nf4_few_rows; importing this needs triton, so only functions import it.

Every matrix comes as five pointers: packed bytes, scales of blocks, and what makes scales of 8-bit
codes. Three matrices always come; those beyond the last one used repeat the first.
"""

from inspect import unwrap

import triton
import triton.language as tl

# A lane holds the codebook's value of its own number; shfl reads the low four bits of an index.
SHUFFLE = "shfl.sync.idx.b32 {to}, {table}, {index}, 0x101f, 0xffffffff;"


def _eight() -> str:
    """PTX that turns one word into the float32 values of its 8 codes."""
    lines = []
    for k in range(8):
        shift = k // 2 * 8 + 4 * (1 - k % 2)
        lines += [f"shr.u32 i, $8, {shift};", SHUFFLE.format(to=f"${k}", table="$9", index="i")]
    return "{ .reg .b32 i; " + " ".join(lines) + " }"


def _four() -> str:
    """PTX that turns four bytes into bfloat16 values: two words of high, two of low codes."""
    lines = []
    for k in range(4):
        out, shifts = f"${k}", [16 * (k % 2) + 8 * j + 4 * (k < 2) for j in (0, 1)]
        for j, shift in enumerate(shifts):
            lines += [
                f"shr.u32 i, $4, {shift};",
                SHUFFLE.format(to=f"v{j}", table="$5", index="i"),
            ]
        lines.append(f"prmt.b32 {out}, v0, v1, 0x7632;")
    return "{ .reg .b32 i, v0, v1; " + " ".join(lines) + " }"


def jit(kernel):
    """triton.jit of the function itself, since shape checks on import would hide its globals."""
    return triton.jit(unwrap(kernel))


EIGHT = tl.constexpr(_eight())
FOUR = tl.constexpr(_four())


@jit
def codebook(code):
    """float32 values of codes: four rounds of choosing by one bit."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    v0 = tl.where(b0, -0.6961928009986877, -1.0)
    v1 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    v2 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    v3 = tl.where(b0, 0.0, -0.09105003625154495)
    v4 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    v5 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    v6 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    v7 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, v3, v2), tl.where(b1, v1, v0))
    high = tl.where(b2, tl.where(b1, v7, v6), tl.where(b1, v5, v4))
    return tl.where(b3, high, low)


@jit
def lane_table():
    """The codebook's value at each lane's number: another value in each thread."""
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
    )
    return codebook(lane)


@jit
def eight_values(words, table, SHUFFLED: tl.constexpr):
    """float32 values of the eight codes of each little-endian word, in the weight's order."""
    if SHUFFLED:
        return tl.inline_asm_elementwise(
            EIGHT,
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f",
            [words, table],
            dtype=(
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
            ),  # fmt: skip
            is_pure=True,
            pack=1,
        )
    else:
        return (
            codebook(words >> 4), codebook(words), codebook(words >> 12), codebook(words >> 8),
            codebook(words >> 20), codebook(words >> 16), codebook(words >> 28),
            codebook(words >> 24),
        )  # fmt: skip


@jit
def two_values(pairs, table, SHUFFLED: tl.constexpr):
    """bfloat16 values of the high and of the low code of each byte."""
    if SHUFFLED:
        return tl.inline_asm_elementwise(
            FOUR,
            "=&r,=&r,=&r,=&r,r,f,f,f,f",
            [pairs, table],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        return codebook(pairs >> 4).to(tl.bfloat16), codebook(pairs).to(tl.bfloat16)


@jit
def choose(index, first, second, third):
    """The pointer of the matrix that a program works on."""
    return tl.multiple_of(tl.where(index == 0, first, tl.where(index == 1, second, third)), 16)


@jit
def stored_scales(absmax, nested, block, mask, NESTED: tl.constexpr):
    """What is stored of the scales of blocks, given by their numbers in the matrix."""
    stored = tl.load(absmax + block, mask=mask, other=0)
    wide = tl.load(nested + block // 256, mask=mask, other=0) if NESTED else stored
    return stored, wide


@jit
def unpack(word):
    """float32 values of the two bfloat16 in a word, the first in its low half."""
    low = (word << 16).to(tl.float32, bitcast=True)
    high = (word & -65536).to(tl.float32, bitcast=True)
    return low, high


@jit
def columns(x, BLOCKS: tl.constexpr, I: tl.constexpr):
    """A row of x as eight float32 tensors [BLOCKS, 1, 8]: column k of each word of eight."""
    block, word = tl.arange(0, BLOCKS)[:, None, None], tl.arange(0, 8)[None, :, None]
    at = block * 32 + word * 4 + tl.arange(0, 4)[None, None, :]
    row = tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=block < I // 64, other=0)
    even, odd = tl.split(row.reshape(BLOCKS, 8, 2, 2))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    x0, x1 = unpack(w0[:, None, :])
    x2, x3 = unpack(w1[:, None, :])
    x4, x5 = unpack(w2[:, None, :])
    x6, x7 = unpack(w3[:, None, :])
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def inner(c, x):
    """Products of eight values with eight columns, added."""
    y = c[0] * x[0]
    for k in tl.static_range(1, 8):
        y += c[k] * x[k]
    return y


@jit
def finish(out, y, s, mask):
    """Stores sums over blocks of scales [BLOCKS, ROWS] times sums over words."""
    sums = tl.sum(tl.sum(y, axis=2) * s, axis=0)
    tl.store(out, sums.to(out.dtype.element_ty), mask=mask)


@jit
def group(tile, ROWS: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr):
    """Of a group of rows: its matrix, its first row there, the rows of matrices before."""
    T0: tl.constexpr = (O0 + ROWS - 1) // ROWS
    T1: tl.constexpr = (O1 + ROWS - 1) // ROWS
    matrix = (tile >= T0).to(tl.int32) + (tile >= T0 + T1).to(tl.int32)
    start = tl.where(matrix == 0, 0, tl.where(matrix == 1, T0, T0 + T1))
    before = tl.where(matrix == 0, 0, tl.where(matrix == 1, O0, O0 + O1))
    return matrix, (tile - start) * ROWS, before


@jit
def vector_kernel(
    x, layers, layer,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    y,
    M: tl.constexpr, I: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    NESTED: tl.constexpr, TRACED: tl.constexpr, SHUFFLED: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Up to four rows of x with ROWS weight rows, whole rows at once: a program has no loop.

    Axes are [BLOCKS, ROWS, 8 words]: lanes go along a row of the weight, so that a thread's
    columns of x serve all its rows. Weights are asked for before anything that waits.
    """
    per_row: tl.constexpr = I // 64
    if TRACED:
        layer = tl.load(layers)
    layer = tl.cast(layer, tl.int64)
    matrix, start, before = group(tl.program_id(0), ROWS, O0, O1)
    height = tl.where(matrix == 0, O0, tl.where(matrix == 1, O1, O2))
    row, block = start + tl.arange(0, ROWS), tl.arange(0, BLOCKS)
    mask = (row < height)[None, :] & (block < per_row)[:, None]
    words = choose(matrix, packed0, packed1, packed2) + layer * height * (I // 2)
    words = tl.multiple_of(words, 16).to(tl.pointer_type(tl.int32))
    at = row[None, :, None] * (I // 8) + block[:, None, None] * 8 + tl.arange(0, 8)[None, None, :]
    w = tl.load(words + at, mask=mask[:, :, None], other=0)
    number = row[None, :] * per_row + block[:, None]
    absmax = choose(matrix, absmax0, absmax1, absmax2) + layer * height * per_row
    s = tl.load(absmax + number, mask=mask, other=0)
    if NESTED:
        nested = choose(matrix, nested0, nested1, nested2)
        nested += layer * ((height * per_row + 255) // 256)
        wide = tl.load(nested + number // 256, mask=mask, other=0)
        values = tl.load(choose(matrix, map0, map1, map2) + layer * 256 + tl.arange(0, 256))
        offset = tl.load(choose(matrix, offset0, offset1, offset2) + layer)
    x0 = columns(x, BLOCKS, I)
    x1 = columns(x + I, BLOCKS, I) if M > 1 else x0
    x2 = columns(x + 2 * I, BLOCKS, I) if M > 2 else x0
    x3 = columns(x + 3 * I, BLOCKS, I) if M > 3 else x0
    if NESTED:
        s = tl.gather(values, s.to(tl.int32).reshape(BLOCKS * ROWS), 0).reshape(BLOCKS, ROWS)
        s = s * wide + offset
    table = 0.0
    if SHUFFLED:
        table = lane_table()
    c = eight_values(w, table, SHUFFLED)
    y0 = inner(c, x0)
    y1 = inner(c, x1) if M > 1 else y0
    y2 = inner(c, x2) if M > 2 else y0
    y3 = inner(c, x3) if M > 3 else y0
    out, all_rows = y + before + row, O0 + O1 + O2
    finish(out, y0, s, row < height)
    if M > 1:
        finish(out + all_rows, y1, s, row < height)
    if M > 2:
        finish(out + 2 * all_rows, y2, s, row < height)
    if M > 3:
        finish(out + 3 * all_rows, y3, s, row < height)


@jit
def tile_kernel(
    x, layers, layer,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    y,
    M: tl.constexpr, I: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    NESTED: tl.constexpr, TRACED: tl.constexpr, SHUFFLED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to 64 rows of x on tensor cores: ROWS weight rows, one of SPLITS parts of their blocks.

    y is [SPLITS, M, O], in float32 if the parts are still to be added.
    """
    per_row: tl.constexpr = I // 64
    part: tl.constexpr = per_row // SPLITS
    if TRACED:
        layer = tl.load(layers)
    layer = tl.cast(layer, tl.int64)
    table = 0.0
    if SHUFFLED:
        table = lane_table()
        table = table.to(tl.bfloat16).to(tl.float32)
    index, start, before = group(tl.program_id(0), ROWS, O0, O1)
    height = tl.where(index == 0, O0, tl.where(index == 1, O1, O2))
    packed = choose(index, packed0, packed1, packed2) + layer * height * (I // 2)
    absmax = choose(index, absmax0, absmax1, absmax2) + layer * height * per_row
    nested = choose(index, nested0, nested1, nested2)
    nested += layer * ((height * per_row + 255) // 256)
    codes = choose(index, map0, map1, map2) + layer * 256
    offset = tl.load(choose(index, offset0, offset1, offset2) + layer) if NESTED else 0.0
    row = start + tl.arange(0, ROWS)
    inside = row < height
    column, pair = tl.arange(0, COLUMNS), tl.arange(0, 32)
    bytes_at = tl.multiple_of(packed, 16) + row[:, None] * (I // 2) + pair[None, :]
    x_at = x.to(tl.pointer_type(tl.int32)) + column[None, :] * (I // 2) + pair[:, None]
    begin = tl.program_id(1) * part
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    stored, wide = stored_scales(absmax, nested, row * per_row + begin, inside, NESTED)
    for step in tl.range(0, part, num_stages=STAGES):
        block = begin + step
        pairs = tl.load(bytes_at + block * 32, mask=inside[:, None], other=0)
        both = tl.load(x_at + block * 32, mask=(column < M)[None, :], other=0)
        following = row * per_row + tl.minimum(block + 1, per_row - 1)
        s = tl.load(codes + stored.to(tl.int32)) * wide + offset if NESTED else stored
        stored, wide = stored_scales(absmax, nested, following, inside, NESTED)
        high, low = two_values(pairs, table, SHUFFLED)
        even = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
        odd = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        if not SHUFFLED:  # the interpreter would multiply the bits of bfloat16
            high, low = high.to(tl.float32), low.to(tl.float32)
            even, odd = even.to(tl.float32), odd.to(tl.float32)
        sums = tl.dot(low, odd, tl.dot(high, even))
        total += sums * s[:, None]
    out = y + tl.program_id(1) * M * (O0 + O1 + O2) + before
    out += column[None, :] * (O0 + O1 + O2) + row[:, None]
    mask = inside[:, None] & (column < M)[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=mask)
