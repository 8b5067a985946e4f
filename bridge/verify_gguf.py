"""A finished GGUF file against the weights it should hold: names, order of rows, rounding.

The file is read by the loader's tables and gguf's dequantisers, not by the code that wrote it.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from bridge import gguf_blocks, gguf_header
from bridge.gguf_source import EMBEDDING, FLOATS, GGUFWeights
from bridge.safetensors_file import Weight

SMALLEST = 1e-6  # weights below this have no relative error worth a message
# A tensor may pass its type's usual error by as much as rounding its source anew does, and a bit.
AGAIN = 1.05
# Beyond this multiple of a type's usual error a tensor is lost, however hard it is to round.
BROKEN = 4.0
STEP = 2.0**-24  # spacing of float16's smallest numbers, which scales of tiny blocks have


class Limit(NamedTuple):
    """What rounding does at worst to a block: rms error <= share x largest value + floor."""

    share: float
    floor: float


# Shares: a third above the worst of normal, heavy-tailed, uniform, sparse and half-step weights.
# Floors: an error of float16's smallest step times the largest integers that it is multiplied with.
BLOCKS = {
    Kind.Q8_0: Limit(0.006, STEP * 127),
    Kind.Q5_0: Limit(0.075, STEP * 16),
    Kind.Q5_1: Limit(0.045, STEP * 32),
    Kind.Q6_K: Limit(0.022, STEP * 128 * 32),
    Kind.Q5_K: Limit(0.03, STEP * 63 * 32),
    Kind.Q4_K: Limit(0.05, STEP * 63 * 16),
}


class Rounding(NamedTuple):
    """Relative root mean square error of one tensor, and the most that it was allowed."""

    name: str  # the file's
    kind: Kind
    error: float
    bound: float


class Block(NamedTuple):
    """One block's rms error, and the most that it is allowed."""

    row: int
    error: float
    bound: float

    @property
    def excess(self) -> float:
        return math.inf if math.isnan(self.error) else self.error - self.bound


def verify(path: str | Path, weights: Iterable[Weight]) -> dict[str, Rounding]:
    """Rounding of every tensor by Hugging Face name, once all of the file is as `weights` say.

    `weights` are read one at a time, all of their rows compared: F32, F16 and BF16 are exactly
    what that rounding gives, other types stay within `gguf_blocks.ERROR`, except where the same
    rounding of the weight itself does not, and each block within `BLOCKS`. Raises ValueError
    naming tensor, type, error and bound; for tensors missing, surplus or of another shape; and
    where the vocabulary and the embedding have unequal length.
    """
    file = gguf_header.read(path)
    source, wanted = GGUFWeights(file), {w.name: w for w in weights}
    there = {*source.stored} | (set(source.tensors) - set(source.stored.values()))
    if there != wanted.keys():
        differ = sorted(there ^ wanted.keys())
        raise ValueError(f"{path}: {len(differ)} tensors missing or surplus: {differ[:4]}")
    tokens = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    rows = source.tensors[source.stored[EMBEDDING]].shape[0]
    if tokens != rows:
        raise ValueError(f"{path}: {tokens} tokens, token_embd.weight has {rows} rows")
    return {name: _verified(source, w) for name, w in wanted.items()}


def worst(found: Iterable[Rounding]) -> dict[str, dict[str, float | str]]:
    """By type: the tensor of the largest error, its error and bound."""
    rows = sorted(found, key=lambda r: (r.kind.name, r.error))
    return {r.kind.name: {"tensor": r.name, "error": r.error, "bound": r.bound} for r in rows}


def _verified(source: GGUFWeights, weight: Weight) -> Rounding:
    """Compares one tensor; raises ValueError where it is not the weight rounded."""
    name = source.stored.get(weight.name, weight.name)
    kind, shape = source.tensors[name].kind, source.tensors[name].shape
    want = np.asarray(weight.read()).astype(np.float32, copy=False)
    if source.offset(weight.name):
        want = want + np.float32(source.offset(weight.name))
    if want.shape != shape:
        raise ValueError(f"{source.path}: {name} has shape {shape}, {weight.name} {want.shape}")
    error, block, others = _compared(source.pieces(weight.name), want, kind)
    bound = bound_of(error, want, kind)
    where = f"{source.path}: {name} came back"
    if others:
        raise ValueError(
            f"{where} with {others} values that are not {weight.name} in {kind.name} "
            f"({error:.2%} off, none is rounding)"
        )
    if not error <= bound:
        raise ValueError(f"{where} {error:.2%} off in {kind.name}, at most {bound:.2%} is rounding")
    if block.excess > 0:
        raise ValueError(
            f"{where} with a block in {kind.name} of {weight.name}'s row {block.row} that is "
            f"{block.error:.3g} off (rms), at most {block.bound:.3g} is rounding"
        )
    return Rounding(name, kind, error, bound)


def bound_of(error: float, want: np.ndarray, kind: Kind) -> float:
    """The relative error that a tensor may have; rounded anew only where `error` is not usual."""
    usual = gguf_blocks.ERROR[kind]
    if error <= usual:
        return usual
    anew, *_ = _compared(_again(want, kind), want, kind)
    return min(max(usual, AGAIN * anew), BROKEN * usual)


def _compared(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], want: np.ndarray, kind: Kind
) -> tuple[float, Block, int]:
    """(relative rms error, the worst block, values that a plain type holds otherwise)."""
    off = size = 0.0
    others, block = 0, Block(0, 0.0, math.inf)
    for rows, back in pieces:
        exact = want[rows]
        gap = back - exact
        off, size = off + float(np.vdot(gap, gap)), size + float(np.vdot(exact, exact))
        if kind in FLOATS:
            others += int(np.count_nonzero(back != exact.astype(FLOATS[kind]).astype(np.float32)))
        else:
            block = max(block, _worst_block(rows, gap, exact, kind), key=lambda b: b.excess)
    rms = lambda total: math.sqrt(total / want.size)
    return rms(off) / max(rms(size), SMALLEST), block, others


def _worst_block(rows: np.ndarray, gap: np.ndarray, exact: np.ndarray, kind: Kind) -> Block:
    """The block that passes its limit by most, or comes nearest to it."""
    width, limit = GGML_QUANT_SIZES[kind][0], BLOCKS[kind]
    gap, exact = gap.reshape(-1, width), exact.reshape(-1, width)
    error = np.sqrt(np.einsum("bv,bv->b", gap, gap) / width)
    bound = limit.share * np.maximum(exact.max(1), -exact.min(1)) + limit.floor
    at = int(np.argmax(np.where(np.isnan(error), np.inf, error - bound)))
    return Block(int(rows[at * len(rows) // len(error)]), float(error[at]), float(bound[at]))


def _again(want: np.ndarray, kind: Kind) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of a weight rounded anew."""
    step = max(1, 2**20 // int(np.prod(want.shape[1:])))
    for at in range(0, len(want), step):
        rows = np.arange(at, min(at + step, len(want)))
        back = gguf_blocks.decode(gguf_blocks.encode(want[rows], kind), kind)
        yield rows, back.reshape(want[rows].shape)
