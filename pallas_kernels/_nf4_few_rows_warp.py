"""The few-row kernel on `mma.sync`: each thread's registers are laid out here, not by Triton.

Tensors are [THREADS], one element a thread. A quad of lanes reads a block's 32 bytes of a weight
row, so that a byte's two weights are a register of the left operand as they come, and x's columns
match them without a shuffle. A byte's pair of bfloat16 values is one 4-byte load: the 256 pairs
stand in shared memory 32 times, one copy in each bank, and no two lanes ever wait for a bank.
"""

import triton.language as tl

from pallas_kernels._nf4_few_rows_triton import choose, codebook, group, jit

PAIRS, SCALES = "nf4_few_rows_pairs", "nf4_few_rows_scales"


def _fill() -> str:
    """PTX: thread e writes pair e ($1) to each bank, three maps' scales; $0 is 4 times the lane."""
    lines = [
        f".shared .align 128 .b32 {PAIRS}[8192]; .shared .align 16 .b32 {SCALES}[768];",
        "{ .reg .b32 a, b, c, e, l; mov.u32 l, %laneid; mov.u32 a, %tid.x; and.b32 a, a, 255;",
        f"mov.u32 b, {PAIRS}; shl.b32 e, a, 2; shl.b32 a, a, 7; add.u32 a, a, b;",
    ]
    for k in range(8):
        lines.append(f"add.u32 c, l, {k}; and.b32 c, c, 7; shl.b32 c, c, 4; add.u32 c, c, a;")
        lines.append("st.shared.v4.b32 [c], {$1, $1, $1, $1};")
    lines.append(f"mov.u32 b, {SCALES}; add.u32 a, e, b;")
    lines += [f"st.shared.b32 [a+{1024 * k}], ${2 + k};" for k in range(3)]
    return " ".join([*lines, "bar.sync 0; shl.b32 $0, l, 2; }"])


def _load(count: int) -> str:
    """PTX: 8 bytes of `count` neighbouring blocks at each of two addresses."""
    to = lambda k: f"ld.global.cg.b64 ${k}, [${2 * count + k // count} + {32 * (k % count)}];"
    return " ".join(to(k) for k in range(2 * count))


def _decode() -> str:
    """PTX: left operands of four products of depth 16 from 8 bytes of rows r ($16) and r + 8."""
    lines = ["{ .reg .b32 b, s, p0, p1, q0, q1; mov.b64 {p0, p1}, $16; mov.b64 {q0, q1}, $17;"]
    lines.append(f"mov.u32 b, {PAIRS};")
    places = ["shl.b32 s, {}, 7;", "shr.u32 s, {}, 1;", "shr.u32 s, {}, 9;", "shr.u32 s, {}, 17;"]
    for byte in range(8):
        for below, word in enumerate("pq"):
            lines.append(places[byte % 4].format(f"{word}{byte // 4}"))
            lines.append("lop3.b32 s, s, 0x7f80, $18, 0xea; add.u32 s, s, b;")
            lines.append(f"ld.shared.b32 ${4 * (byte // 2) + 2 * (byte % 2) + below}, [s];")
    return " ".join([*lines, "}"])


def _multiply() -> str:
    """PTX: the four products' sum: operands on the left $4 to $19, on the right $20 to $27."""
    lines, before = ["{ .reg .f32 z; mov.f32 z, 0f00000000;"], "z, z, z, z"
    for k in range(4):
        left = ", ".join(f"${4 + 4 * k + i}" for i in range(4))
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
            f"{{{left}}}, {{${20 + 2 * k}, ${21 + 2 * k}}}, {{{before}}};"
        )
        before = "$0, $1, $2, $3"
    return " ".join([*lines, "}"])


FILL = tl.constexpr(_fill())
LOAD1, LOAD2, LOAD4 = (tl.constexpr(_load(count)) for count in (1, 2, 4))
DECODE, MULTIPLY = tl.constexpr(_decode()), tl.constexpr(_multiply())
COLUMNS = tl.constexpr(
    "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$8]; ld.global.nc.v4.b32 {$4, $5, $6, $7}, [$8 + 16];"
)
SCALE = tl.constexpr(
    f"{{ .reg .b32 s; mov.u32 s, {SCALES}; add.u32 s, s, $1; ld.shared.b32 $0, [s]; }}"
)
TO_DECODE = tl.constexpr(",".join(["=&r"] * 16 + ["l", "l", "r"]))
TO_MULTIPLY = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24))
WORDS = tl.constexpr((tl.int32,) * 8)
LEFT = tl.constexpr((tl.int32,) * 16)
SUMS = tl.constexpr((tl.float32,) * 4)
LONGS1, LONGS2, LONGS4 = (tl.constexpr((tl.int64,) * (2 * count)) for count in (1, 2, 4))


@jit
def eight_columns(address, KEPT: tl.constexpr):
    """16 neighbouring columns of a row of x from each address; KEPT ones are asked for once."""
    return tl.inline_asm_elementwise(
        COLUMNS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l", [address], dtype=WORDS, is_pure=KEPT, pack=1
    )


@jit
def blocks_bytes(upper, lower, COUNT: tl.constexpr):
    """8 bytes of COUNT blocks of the row at one address, then of that at the other."""
    if COUNT == 4:
        return tl.inline_asm_elementwise(
            LOAD4, "=&l,=&l,=&l,=&l,=&l,=&l,=&l,=&l,l,l", [upper, lower], dtype=LONGS4,
            is_pure=False, pack=1,
        )  # fmt: skip
    elif COUNT == 2:
        return tl.inline_asm_elementwise(
            LOAD2, "=&l,=&l,=&l,=&l,l,l", [upper, lower], dtype=LONGS2, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            LOAD1, "=&l,=&l,l,l", [upper, lower], dtype=LONGS1, is_pure=False, pack=1
        )


@jit
def block_sums(left, right):
    """Sums of a block of 16 rows with 8 columns: (row, 2t), (row, 2t + 1), two of row + 8."""
    return tl.inline_asm_elementwise(
        MULTIPLY,
        TO_MULTIPLY,
        [left[0], left[1], left[2], left[3], left[4], left[5], left[6], left[7],
         left[8], left[9], left[10], left[11], left[12], left[13], left[14], left[15],
         right[0], right[1], right[2], right[3], right[4], right[5], right[6], right[7]],
        dtype=SUMS, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def left_of(upper, lower, fours):
    """Left operands of a block's four products from 8 bytes of rows r and r + 8."""
    return tl.inline_asm_elementwise(
        DECODE, TO_DECODE, [upper, lower, fours], dtype=LEFT, is_pure=True, pack=1
    )


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
def scale_of(stored, wide, offset, maps, PLACE: tl.constexpr, NESTED: tl.constexpr):
    """The float32 scale of block PLACE of those stored together."""
    if NESTED:
        at = maps + ((stored >> (8 * PLACE)) & 255) * 4
        value = tl.inline_asm_elementwise(
            SCALE, "=f,r", [at], dtype=tl.float32, is_pure=True, pack=1
        )
        return value * wide + offset
    else:
        return stored[PLACE]


@jit
def ask(
    tile, block, quad, place, layer, packed, absmax, nested,
    O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
    I: tl.constexpr, STEP: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """A step's bytes and stored scales of rows quad and quad + 8 of a tile, of blocks from one."""
    per_row: tl.constexpr = I // 64
    matrix, start, before = group(tile, 16, O0, O1)
    height = tl.where(matrix == 0, O0, tl.where(matrix == 1, O1, O2))
    upper = tl.minimum(start + quad, height - 1)
    lower = tl.minimum(start + quad + 8, height - 1)
    base = choose(matrix, packed[0], packed[1], packed[2]) + layer * height * (I // 2)
    base = base.to(tl.int64) + block * 32 + place * 8
    w = blocks_bytes(base + upper * (I // 2), base + lower * (I // 2), STEP)
    scales = choose(matrix, absmax[0], absmax[1], absmax[2]) + layer * height * per_row
    first, second = upper * per_row + block, lower * per_row + block
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
    total, found, right, at, fours, offset, maps,
    STEP: tl.constexpr, NESTED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Adds the products of a step's blocks, each scaled in float32, to four sums a thread."""
    w, s, t, wide, wide_t = found
    for k in tl.static_range(STEP):
        left = left_of(w[k], w[STEP + k], fours)
        a = scale_of(s, wide, offset, maps, k, NESTED)
        b = scale_of(t, wide_t, offset, maps, k, NESTED)
        sums = ()
        for c in tl.static_range(len(right)):
            p = block_sums(left, eight_columns(right[c] + (at + 128 * k), KEPT))
            old = total[c]
            new = (old[0] + p[0] * a, old[1] + p[1] * a, old[2] + p[2] * b, old[3] + p[3] * b)
            sums = sums + (new,)
        total = sums
    return total


@jit
def over_warps(value, WARPS: tl.constexpr):
    """Sums of equal lanes of all warps [32]."""
    return tl.sum(value.reshape(WARPS, 32), axis=0)


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
    if TRACED:
        layer = tl.load(layers)
    layer = tl.cast(layer, tl.int64)
    thread = tl.arange(0, 32 * WARPS)
    quad, place = thread % 32 // 4, thread % 4
    part = thread // 32 * (per_row // WARPS)
    packed, absmax = (packed0, packed1, packed2), (absmax0, absmax1, absmax2)
    nested = (nested0, nested1, nested2)
    tile, stride = tl.program_id(0), tl.num_programs(0)
    now = ask(tile, part, quad, place, layer, packed, absmax, nested, O0, O1, O2, I, STEP, NESTED)
    soon = now
    if TILES * steps > 1:
        soon = ask(
            tl.minimum(tile + stride * (1 // steps), last), part + 1 % steps * STEP, quad, place,
            layer, packed, absmax, nested, O0, O1, O2, I, STEP, NESTED,
        )  # fmt: skip
    code = thread % 256
    pair = word_of_pair(code)
    if NESTED:
        s0 = tl.load(map0 + layer * 256 + code)
        s1 = tl.load(map1 + layer * 256 + code) if O1 > 0 else s0
        s2 = tl.load(map2 + layer * 256 + code) if O2 > 0 else s0
    else:
        s0 = codebook(code)
        s1, s2 = s0, s0
    fours = tl.inline_asm_elementwise(
        FILL, "=r,r,f,f,f", [pair, s0, s1, s2], dtype=tl.int32, is_pure=False, pack=1
    )
    zero = fours * 0.0
    right, nothing = (), ()
    for c in tl.static_range((M + 7) // 8):
        row = tl.minimum(quad + 8 * c, M - 1)
        right = right + (x.to(tl.int64) + (row * I + place * 16 + part * 64) * 2,)
        nothing = nothing + ((zero, zero, zero, zero),)
    total = nothing
    for n in tl.static_range(TILES * steps):
        then = soon
        if n + 2 < TILES * steps:
            then = ask(
                tl.minimum(tile + stride * ((n + 2) // steps), last),
                part + (n + 2) % steps * STEP, quad, place,
                layer, packed, absmax, nested, O0, O1, O2, I, STEP, NESTED,
            )  # fmt: skip
        matrix, start, before = group(tl.minimum(tile + stride * (n // steps), last), 16, O0, O1)
        offset = tl.load(choose(matrix, offset0, offset1, offset2) + layer) if NESTED else 0.0
        total = add_step(
            total, now, right, n % steps * STEP * 128, fours, offset, matrix * 1024,
            STEP, NESTED, M == 1 and TILES == 1,
        )  # fmt: skip
        now = soon
        soon = then
        if n % steps == steps - 1:
            height = tl.where(matrix == 0, O0, tl.where(matrix == 1, O1, O2))
            inside = tile + stride * (n // steps) <= last
            put(y + before, total, start, tl.where(inside, height, 0), M, O0 + O1 + O2, WARPS)
            total = nothing


@jit
def put(y, total, start, height, M: tl.constexpr, O: tl.constexpr, WARPS: tl.constexpr):
    """Adds all warps' sums and stores them: a lane has columns 2t, 2t + 1 of rows g, g + 8."""
    lane = tl.arange(0, 32)
    for c in tl.static_range((M + 7) // 8):
        for k in tl.static_range(4):
            if M > 1 or k % 2 == 0:
                column, row = 8 * c + lane % 4 * 2 + k % 2, start + lane // 4 + k // 2 * 8
                value = over_warps(total[c][k], WARPS).to(y.dtype.element_ty)
                tl.store(y + column * O + row, value, mask=(column < M) & (row < height))


@jit
def word_of_pair(code):
    """The bfloat16 values of a byte's high code (lower half) and low code, in one word."""
    high = codebook(code >> 4).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    low = codebook(code).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return (high & 0xFFFF) | (low << 16)
