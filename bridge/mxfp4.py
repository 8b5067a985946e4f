"""Experts in MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss's files hold them, dequantized.

A weight P [E, I, O] lies as `P_blocks` uint8 [E, O, I/32, 16], two numbers a byte with the first
one in its lower half, and `P_scales` uint8 [E, O, I/32]: 127 more than the power of two that a
block's numbers are multiplied with. Source: transformers 5.17 `integrations/mxfp4.py`.
"""

from collections.abc import Callable, Container
from functools import cache

import ml_dtypes
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
NAME = "MXFP4"
DTYPE = np.dtype(ml_dtypes.bfloat16)  # of what reading gives
WIDTH, BYTES = 32, 16  # numbers of a block, and its bytes
AT_A_TIME = 2**17  # bytes, so that what they become stays in the cache
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of 3 bits; the fourth is the sign


def weight(name: str) -> str | None:
    """The weight that a tensor of this name is part of, None where it is a tensor of its own."""
    ends = (end for end in (BLOCKS, SCALES) if name.endswith(end))
    return next((name.removesuffix(end) for end in ends), None)


def is_mxfp4(names: Container[str], name: str) -> bool:
    """Whether a weight lies in blocks."""
    return f"{name}{BLOCKS}" in names or f"{name}{SCALES}" in names


def shape(
    names: Container[str], describe: Callable[[str], tuple[tuple[int, ...], str]], name: str
) -> tuple[int, ...]:
    """The weight's shape [E, I, O], of its tensors' (shape, dtype); `names` are all there are.

    Raises ValueError naming the tensors that are missing, misshapen or there twice.
    """
    missing = [f"{name}{end}" for end in (BLOCKS, SCALES) if f"{name}{end}" not in names]
    if missing:
        raise ValueError(f"{name} is no readable {NAME}: {missing[0]} is missing")
    if name in names:
        raise ValueError(f"{name} is there twice, as it is and in {NAME}")
    found = {end: describe(f"{name}{end}") for end in (BLOCKS, SCALES)}
    blocks, scales = (found[end][0] for end in (BLOCKS, SCALES))
    wrong = [
        f"{name}{end} has dtype {dtype}, expected uint8"
        for end, (_, dtype) in found.items()
        if dtype != "uint8"
    ]
    if len(blocks) != 4 or blocks[-1] != BYTES:
        wrong.append(f"{name}{BLOCKS} has shape {blocks}, expected [E, O, I/{WIDTH}, {BYTES}]")
    if scales != blocks[:-1]:
        wrong.append(f"{name}{SCALES} has shape {scales}, the blocks' first axes are {blocks[:-1]}")
    if wrong:
        raise ValueError(f"{name} is no readable {NAME}: " + "; ".join(wrong))
    experts, height, count, _ = blocks
    return experts, count * WIDTH, height


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 [E, I, O] of `*_blocks` and `*_scales`, exact; a view of [E, O, I]."""
    experts, height, count, _ = blocks.shape
    out = np.empty((experts * height, count, BYTES), np.uint32)
    rows, shifts = blocks.reshape(out.shape), scales.reshape(out.shape[:2])
    step = max(1, AT_A_TIME // (count * BYTES))
    for at in range(0, len(out), step):
        here = slice(at, at + step)
        entries = shifts[here, :, None].astype(np.intp) << 8 | rows[here]
        np.take(_pairs(), entries, out=out[here], mode="clip")
    return out.view(DTYPE).reshape(experts, height, count * WIDTH).swapaxes(1, 2)


@cache
def _pairs() -> np.ndarray:
    """uint32 [2^16]: both bfloat16 numbers of a byte under a scale, by scale * 256 + byte."""
    signed = np.concatenate([VALUES, -VALUES])
    with np.errstate(over="ignore"):  # what passes float32 is infinite, and refused as such
        scaled = np.ldexp(signed, np.arange(256)[:, None] - 127).astype(DTYPE)
    byte = np.arange(256)
    return np.stack([scaled[:, byte & 15], scaled[:, byte >> 4]], -1).view(np.uint32).reshape(-1)
