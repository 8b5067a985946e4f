"""Quantized weight formats. A format is one file with a class and a `quantize(w)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import nf4_fp8
from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Stacks, map_stacks
from unsloth_jax.quant import int8, nf4

# Compiled here: run one operation at a time, quantizing holds float32 copies of a whole stack.
FORMATS: dict[str, Callable[..., Any]] = {
    "nf4": jax.jit(nf4.quantize, static_argnames=("dtype", "double", "block")),
    "int8": jax.jit(int8.quantize, static_argnames=("dtype",)),
}
KINDS = {nf4.NF4: "nf4", int8.Int8: "int8"}


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


def stored(params: Params) -> str | None:
    """The format, of FORMATS, of the first quantized leaf; None where there is none."""
    for leaf in tree.flatten(params).values():
        for part in leaf.parts if isinstance(leaf, Stacks) else (leaf,):
            if type(part) in KINDS:
                return KINDS[type(part)]
    return None


def matmul_in(params: Params, dtype: str, emulate: bool = False) -> Params:
    """The tree with its stacks of NF4 weights multiplied in `dtype`.

    That is "bf16", "fp8", or "fp8_backward", which leaves the forward pass in bf16. Stacks of an
    uneven layout keep bf16. Raises ValueError for another name, and for fp8 where no stack is left
    or, unless XLA may `emulate` it, this device has no such products.
    """
    if dtype not in nf4.PRODUCTS:
        raise ValueError(f"unknown matmul dtype {dtype!r}, known are {sorted(nf4.PRODUCTS)}")
    reasons = []

    def one(leaf):
        if not isinstance(leaf, nf4.NF4) or len(leaf.shape) != 3:
            return leaf
        if dtype != "bf16":
            uneven = nf4_fp8.uneven(leaf.layout)
            reasons.append(uneven if emulate else nf4_fp8.supports(leaf.layout, leaf.packed))
            if uneven:
                return leaf
        return leaf.replace(matmul_dtype=dtype)

    found = tree.map_paths(lambda _, leaf: map_stacks(one, leaf), params)
    if dtype != "bf16" and None not in reasons:
        why = reasons[0] if reasons else "there are no stacks of NF4 weights (load_in_4bit=True)"
        raise ValueError(f"frozen weights can't be multiplied in fp8: {why}")
    return found
