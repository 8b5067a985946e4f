"""Quantized weight formats. A format is one file with a class and a `quantize(w)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import map_stacks
from unsloth_jax.quant import nf4

# Compiled here: run one operation at a time, quantizing holds float32 copies of a whole stack.
FORMATS: dict[str, Callable[..., Any]] = {
    "nf4": jax.jit(nf4.quantize, static_argnames=("dtype", "double", "block")),
}


def quantize(params: Params, fmt: str, where: Callable[[str], bool]) -> Params:
    """The tree with every weight whose path `where` accepts in the format `fmt`.

    Raises on an unknown format, and on a leaf there that is no float array of two axes or more.
    """
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r}, known are {sorted(FORMATS)}")

    def one(path, leaf):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"{path} is no plain array but {type(leaf).__name__}: cannot quantize")
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{path} is {leaf.dtype} {leaf.shape}: only float matrices can be quantized"
            )
        return FORMATS[fmt](leaf)

    def visit(path, leaf):
        return map_stacks(lambda part: one(path, part), leaf) if where(path) else leaf

    return tree.map_paths(visit, params)
