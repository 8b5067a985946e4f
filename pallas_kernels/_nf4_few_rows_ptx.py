"""PTX of the few-row kernel on `mma.sync`, and Triton functions of it: one element a thread.

In shared memory stand the 256 pairs' values 32 times, up to three maps of scales, and two buffers
of sums. Threads start copies of the maps and fill the pairs; all else is read behind the barrier.
"""

import triton.language as tl

from pallas_kernels._nf4_few_rows_triton import jit

PAIRS, SCALES, TOTALS = "nf4_few_rows_pairs", "nf4_few_rows_scales", "nf4_few_rows_sums"


def _start(maps: int) -> str:
    """PTX: shared memory, to which thread e copies scale e of maps at $1 on; $0 is the thread."""
    lines = [
        f".shared .align 128 .b32 {PAIRS}[8192]; .shared .align 16 .b32 {SCALES}[768];",
        f".shared .align 16 .b32 {TOTALS}[2048]; {{ .reg .b32 a; mov.u32 $0, %tid.x;",
        f"and.b32 a, $0, 255; shl.b32 a, a, 2; mov.u32 $0, {SCALES}; add.u32 a, a, $0;",
    ]
    for k in range(maps):
        lines.append(f"cp.async.ca.shared.global [a+{1024 * k}], [${1 + k}], 4;")
    return " ".join([*lines, "mov.u32 $0, %tid.x; }"])


def _fill() -> str:
    """PTX: thread e writes pair e to each bank; $0 is 4 times the lane, $1 its low code's value.

    Needs at least 256 threads. Before this waits, what was asked for is on its way; and $0 is read
    back from shared memory, so that nothing made of it is moved before the barrier.
    """
    lines = [
        "{ .reg .b32 a, b, c, e, l, w; mov.u32 l, %laneid; mov.u32 e, %tid.x;",
        f"bar.warp.sync 0xffffffff; shl.b32 a, e, 2; mov.u32 b, {TOTALS}; add.u32 b, b, a;",
        "shl.b32 c, l, 2; st.shared.b32 [b], c; and.b32 e, e, 255; shr.u32 w, e, 4;",
        "shfl.sync.idx.b32 w, $1, w, 0x1f, 0xffffffff; shl.b32 c, $1, 16; add.u32 w, w, c;",
        "and.b32 c, l, 7; shl.b32 c, c, 4; shl.b32 a, e, 7; add.u32 a, a, c;",
        f"mov.u32 c, {PAIRS}; add.u32 a, a, c;",
    ]
    for k in range(8):
        lines.append(f"xor.b32 c, a, {16 * k}; st.shared.v4.b32 [c], {{w, w, w, w}};")
    return " ".join([*lines, "cp.async.wait_all; bar.sync 0; ld.shared.b32 $0, [b]; }"])


def _sum(warps: int, values: int, paired: bool) -> str:
    """PTX: thread 32 k + l gets value k ($1 on) of lane l, added over warps (and lanes l, l ^ 1).

    The last operand is the buffer's place. Two of them in turn make one barrier enough: who writes
    a buffer again has passed the other's barrier, which its readers reach behind their loads.
    """
    lines = [
        "{ .reg .b32 a, b, t; .reg .f32 v; .reg .pred p; mov.u32 t, %tid.x;",
        f"mov.u32 b, {TOTALS}; add.u32 b, b, ${1 + values}; shl.b32 a, t, 2; add.u32 a, a, b;",
    ]
    lines += [f"st.shared.b32 [a+{128 * warps * k}], ${1 + k};" for k in range(values)]
    lines.append("and.b32 a, t, 31; shl.b32 a, a, 2; add.u32 a, a, b; shr.u32 b, t, 5;")
    lines.append(f"and.b32 b, b, {values - 1}; mul.lo.u32 b, b, {128 * warps}; add.u32 a, a, b;")
    lines.append(f"setp.lt.u32 p, t, {32 * values}; mov.f32 $0, 0f00000000; bar.sync 0;")
    for k in range(warps):
        lines.append(f"mov.f32 v, 0f00000000; @p ld.shared.b32 v, [a+{128 * k}];")
        lines.append("add.f32 $0, $0, v;")
    if paired:
        lines.append("shfl.sync.bfly.b32 v, $0, 1, 0x1f, 0xffffffff; add.f32 $0, $0, v;")
    return " ".join([*lines, "}"])


def _load(count: int) -> str:
    """PTX: 8 bytes of `count` neighbouring blocks at each of two addresses."""
    to = lambda k: f"ld.global.cg.b64 ${k}, [${2 * count + k // count} + {32 * (k % count)}];"
    return " ".join(to(k) for k in range(2 * count))


def _decode() -> str:
    """PTX: left operands of four products of depth 16 from 8 bytes of rows r ($16) and r + 8.

    $18 is 4 times the lane; it joins a byte first, so that a word waits for the table at once.
    """
    lines = ["{ .reg .b32 b, s, f1, f2, f3, p0, p1, q0, q1; mov.b64 {p0, p1}, $16;"]
    lines.append("mov.b64 {q0, q1}, $17; shl.b32 f1, $18, 1; shl.b32 f2, $18, 9;")
    lines.append(f"shl.b32 f3, $18, 17; mov.u32 b, {PAIRS};")
    takes = [
        "and.b32 s, {}, 0xff; shl.b32 s, s, 7; add.u32 s, s, $18;",
        "lop3.b32 s, {}, 0xff00, f1, 0xea; shr.u32 s, s, 1;",
        "lop3.b32 s, {}, 0xff0000, f2, 0xea; shr.u32 s, s, 9;",
        "lop3.b32 s, {}, 0xff000000, f3, 0xea; shr.u32 s, s, 17;",
    ]
    for byte in range(8):
        for below, word in enumerate("pq"):
            lines.append(takes[byte % 4].format(f"{word}{byte // 4}") + " add.u32 s, s, b;")
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


START, START1, START3 = (tl.constexpr(_start(maps)) for maps in (0, 1, 3))
FILL = tl.constexpr(_fill())
SUM8, SUM8_SPREAD = tl.constexpr(_sum(8, 4, False)), tl.constexpr(_sum(8, 2, True))
SUM16_SPREAD = tl.constexpr(_sum(16, 2, True))
LOAD1, LOAD2, LOAD4 = (tl.constexpr(_load(count)) for count in (1, 2, 4))
DECODE, MULTIPLY = tl.constexpr(_decode()), tl.constexpr(_multiply())
COLUMNS = tl.constexpr(
    "ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; ld.global.v4.b32 {$4, $5, $6, $7}, [$8 + 16]; "
    "bar.warp.sync 0xffffffff;"
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
def eight_columns(address):
    """16 neighbouring columns of a row of x from each address, in the order of the program."""
    return tl.inline_asm_elementwise(
        COLUMNS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l", [address], dtype=WORDS, is_pure=False, pack=1
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
def begin(map0, map1, map2, MAPS: tl.constexpr):
    """Threads' numbers; shared memory gets its scales by the time that `FILL` is through."""
    if MAPS == 1:
        return tl.inline_asm_elementwise(
            START1, "=&r,l", [map0.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    elif MAPS == 3:
        return tl.inline_asm_elementwise(
            START3, "=&r,l,l,l", [map0.to(tl.int64), map1.to(tl.int64), map2.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            START, "=&r,l", [map0.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@jit
def over_warps(sums, ROUND: tl.constexpr, WARPS: tl.constexpr, SPREAD: tl.constexpr):
    """Value k of lane l, added over all warps, in thread 32 k + l; SPREAD: over two lanes too."""
    place = ROUND % 2 * 4096
    if not SPREAD:
        return tl.inline_asm_elementwise(
            SUM8, "=&f,f,f,f,f,r", [sums[0], sums[1], sums[2], sums[3], place],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    elif WARPS == 8:
        return tl.inline_asm_elementwise(
            SUM8_SPREAD, "=&f,f,f,r", [sums[0], sums[1], place],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            SUM16_SPREAD, "=&f,f,f,r", [sums[0], sums[1], place],
            dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip


@jit
def fill(value):
    """Fills shared memory with pairs of low codes' values; 4 times the lane, behind a barrier."""
    return tl.inline_asm_elementwise(FILL, "=&r,r", [value], dtype=tl.int32, is_pure=False, pack=1)


@jit
def looked_up(at):
    """The value of the maps in shared memory at this byte."""
    return tl.inline_asm_elementwise(SCALE, "=f,r", [at], dtype=tl.float32, is_pure=True, pack=1)
