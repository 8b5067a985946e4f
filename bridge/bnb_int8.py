"""int8 weights in bitsandbytes' safetensors layout, both ways.

The weight `m.weight` is int8 [O, I]; beside it lie `m.SCB`, float32 [O], the largest absolute value
of each row, and `m.weight_format`, 0 for rows in their order. Source: bitsandbytes 0.50
`Linear8bitLt`.
"""

from collections.abc import Callable, Container
from typing import Any

import numpy as np

from unsloth_jax.quant.int8 import Int8

Read = Callable[[str], np.ndarray]  # a tensor by its full name; KeyError where there is none

SCALE, LAYOUT = "SCB", "weight_format"
FORMAT = "int8 with a scale a row"
ROWS = 0  # the one layout that bitsandbytes still reads, too


def is_int8(names: Container[str], name: str) -> bool:
    """Whether one of int8's members stands beside the weight `name`."""
    return bool(members(names, name))


def members(names: Container[str], name: str) -> list[str]:
    """Names of the tensors that belong to the weight `name`, itself excluded."""
    if not name.endswith(".weight"):
        return []
    return [key for key in (scale_of(name), _beside(name, LAYOUT)) if key in names]


def scale_of(name: str) -> str:
    """The full name of a weight's scales."""
    return _beside(name, SCALE)


def _beside(name, member):
    return f"{name.removesuffix('weight')}{member}"


def parts(read: Read, name: str, names: Container[str], dtype: str) -> Int8:
    """The weight `name` with host arrays in its fields; it dequantizes to `dtype`.

    Raises one error with every member that is missing or of another shape, dtype or layout.
    """
    codes, wrong = read(name), []
    if codes.dtype != np.int8 or codes.ndim != 2:
        wrong.append(f"it is {codes.dtype} {codes.shape}, expected int8 with two axes")
    key = scale_of(name)
    scale = read(key) if key in names else None
    if scale is None:
        wrong.append(f"{key} is missing")
    elif (scale.dtype, scale.shape) != (np.float32, codes.shape[:1]):
        wrong.append(f"{key} is {scale.dtype} {scale.shape}, expected float32 {codes.shape[:1]}")
    elif (scale < 0).any():
        wrong.append(f"{key} holds negative numbers")
    key = _beside(name, LAYOUT)
    if key in names and (read(key).size != 1 or int(read(key).reshape(-1)[0]) != ROWS):
        wrong.append(f"{key} is {read(key).tolist()}, expected {ROWS}, rows in their order")
    if wrong:
        raise ValueError(f"{name} is no readable int8 weight:\n  " + "\n  ".join(wrong))
    return Int8(codes, scale, dtype=dtype)


def tensors(name: str, leaf: Int8) -> dict[str, np.ndarray]:
    """The tensors of one weight as bitsandbytes saves them, by full name. Raises on a stack."""
    if len(leaf.shape) != 2:
        raise ValueError(f"{name} is a stack of shape {leaf.shape}: save its matrices one by one")
    found: dict[str, Any] = {name: leaf.codes, scale_of(name): leaf.absmax}
    found[_beside(name, LAYOUT)] = np.uint8(ROWS)
    return {key: np.asarray(value) for key, value in found.items()}
