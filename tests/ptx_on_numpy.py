"""Inline PTX for Triton's interpreter, which has none: the few instructions our kernels use.

All threads of a program step together; a register is an array [threads]. `mma` follows the PTX
manual's fragments of m16n8k16, in float32.
"""

import ctypes
import re

import numpy as np

SHARED = {}  # places of what programs declared, by name
DECLARED = {}  # place and bytes
MEMORY = np.zeros(64 * 1024, np.uint8)


def floats(bits):
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


def halves(words):
    """[warps, 32, 2] float32 of the two bfloat16 in each word."""
    return np.stack([floats(words << 16), floats(words & 0xFFFF0000)], -1).reshape(-1, 32, 2)


def operands(text):
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def several(text):
    return [part.strip() for part in text.strip("{} ").split(",")]


def multiply(a, b, c):
    """Fragments of d = a b + c: a of four words, b of two, c of four float32, each [threads]."""
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    warps = len(a[0]) // 32
    left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
    for k in range(4):
        for j in range(2):
            left[:, g + 8 * (k % 2), 2 * t + j + 8 * (k // 2)] = halves(a[k])[:, :, j]
            if k < 2:
                right[:, 2 * t + j + 8 * k, g] = halves(b[k])[:, :, j]
    product = left @ right
    found = [product[:, g + 8 * (k // 2), 2 * t + k % 2].reshape(-1) for k in range(4)]
    pairs = zip(found, c, strict=True)
    return [(p + floats(old)).astype(np.float32).view(np.uint32) for p, old in pairs]


def address(values, text):
    base, _, more = text.strip("[]").partition("+")
    return values[base.strip()].astype(np.int64) + int(more or 0)


def add_floats(a, b):
    return (floats(a) + floats(b)).astype(np.float32).view(np.uint32)


ARITHMETIC = {
    "add": np.add, "mul": np.multiply, "and": np.bitwise_and, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift, "setp": np.less, "add.f32": add_floats,
}  # fmt: skip


def step(values, threads, name, given):
    """Runs one instruction on the registers."""
    read = lambda k: values[given[k]] if given[k] in values else constant(given[k], threads)
    kind = name.split(".")[0]
    if kind == "mov" and given[0].startswith("{"):
        low, high = several(given[0])
        values[low] = (values[given[1]] & 0xFFFFFFFF).astype(np.uint32)
        values[high] = (values[given[1]] >> np.uint64(32)).astype(np.uint32)
    elif kind == "mov":
        values[given[0]] = read(1)
    elif kind in ARITHMETIC:
        assert kind != "setp" or name == "setp.lt.u32", name
        values[given[0]] = ARITHMETIC.get(name, ARITHMETIC[kind])(read(1), read(2))
    elif kind == "lop3":
        assert given[4] == "0xea", given
        values[given[0]] = read(1) & read(2) | read(3)
    elif kind == "shfl":
        assert given[3:] == ["0x1f", "0xffffffff"], given
        lanes, other = np.arange(threads), read(2).astype(np.int64)
        source = {"idx": other % 32, "bfly": lanes % 32 ^ other}[name.split(".")[2]]
        values[given[0]] = values[given[1]][lanes // 32 * 32 + source]
    elif kind == "mma":
        groups = [[values[part] for part in several(text)] for text in given[1:]]
        values.update(zip(several(given[0]), multiply(*groups), strict=True))
    elif kind in ("ld", "st", "cp") and name != "cp.async.wait_all":
        move(values, threads, name, given)
    else:
        assert name in ("bar.sync", "bar.warp.sync", "cp.async.wait_all"), name


def move(values, threads, name, given):
    """Runs one load, store or copy; a copy is done at once."""
    if name.startswith("st.shared"):
        words = np.stack([values[part] for part in several(given[1])], 1)
        at = address(values, given[0])[:, None] + np.arange(4 * words.shape[1])
        MEMORY[at] = np.ascontiguousarray(words).view(np.uint8)
    elif name.startswith("ld.shared"):
        at = address(values, given[1])[:, None] + np.arange(4)
        values[given[0]] = np.ascontiguousarray(MEMORY[at]).view(np.uint32)[:, 0]
    elif name.startswith("cp.async"):
        raw = b"".join(ctypes.string_at(int(a), 4) for a in address(values, given[1]))
        at = address(values, given[0])[:, None] + np.arange(int(given[2]))
        MEMORY[at] = np.frombuffer(raw, np.uint8).reshape(threads, 4)
    else:
        assert name.startswith("ld.global"), name
        kept = np.uint64 if name.endswith("b64") else np.uint32
        to = several(given[0])
        size = np.dtype(kept).itemsize * len(to)
        raw = b"".join(ctypes.string_at(int(a), size) for a in address(values, given[1]))
        words = np.frombuffer(raw, kept).reshape(threads, len(to))
        values.update({part: words[:, k].copy() for k, part in enumerate(to)})


def constant(text, threads):
    lane = np.arange(threads, dtype=np.uint32)
    if text in ("%laneid", "%tid.x"):
        return lane % 32 if text == "%laneid" else lane
    if text in SHARED:
        return np.full(threads, SHARED[text], np.uint32)
    return np.full(threads, int(text[2:], 16) if text.startswith("0f") else int(text, 0), np.uint32)


def declare(text):
    for found in re.finditer(r"\.b32 (\w+)\[(\d+)\]", text):
        place = sum(size for _, size in DECLARED.values())
        DECLARED[found[1]] = place, 4 * int(found[2])
        SHARED[found[1]] = place


def run(program, values, threads):
    for line in program.split(";"):
        line = re.sub(r"^\{ (?=\.reg)", "", line.strip())
        if line.startswith(".shared"):
            if line.split()[-1].split("[")[0] not in DECLARED:
                declare(line)
        elif line and line != "}" and not line.startswith(".reg"):
            where, _, plain = line.rpartition("@")[2].partition(" ")
            name, _, rest = (plain if line.startswith("@") else line).partition(" ")
            given = operands(rest)
            before = values.get(given[0]) if given else None
            step(values, threads, name, given)
            if line.startswith("@"):
                values[given[0]] = np.where(values[where], values[given[0]], before)


class Results(list):
    def get_result(self, k):
        return self[k]


def create_inline_asm(builder, program, constraints, inputs, kinds, pure, pack):
    """What `InterpreterBuilder` leaves out; registers of inputs follow those of outputs."""
    from triton.runtime.interpreter import TensorHandle

    threads = max(np.size(one.data) for one in inputs)
    values = {}
    for k, one in enumerate(inputs):
        data = np.broadcast_to(one.data, (threads,))
        unsigned = np.uint64 if data.itemsize == 8 else np.uint32
        values[f"${len(kinds) + k}"] = np.ascontiguousarray(data).view(unsigned)
    run(program, values, threads)
    made = Results()
    for k, kind in enumerate(kinds):
        scalar = getattr(kind, "scalar", kind)
        to = {"int32": np.int32, "int64": np.int64, "fp32": np.float32}[scalar.name]
        made.append(TensorHandle(values[f"${k}"].view(to), scalar))
    return made
