"""Random 4-bit models made on the device, without a file and without a peak above their size."""

import itertools
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import nf4
from unsloth_jax import quant, tree
from unsloth_jax.dims import Params
from unsloth_jax.models import family_of, tree_of
from unsloth_jax.quant.nf4 import NF4
from workflows.bench import configs

CODE_RMS = float(np.sqrt(np.mean(nf4.CODES.astype(np.float64) ** 2)))


def model(shape: str) -> tuple[ModuleType, Any, Params]:
    """(family, config, parameters as shapes) of a name in `configs` or a config.json.

    Projections are NF4 with nested statistics, everything else bfloat16.
    """
    fields = configs.config(shape)
    family = family_of(fields)
    c = family.config(fields)

    def quantized() -> Params:
        dense = tree_of(family, c, lambda _, shape: jnp.zeros(shape, jnp.bfloat16))
        return quant.quantize(dense, "nf4", lambda p: p.endswith("_proj.weight"))

    return family, c, jax.eval_shape(quantized)


def random(shapes: Params, seed: int = 3407) -> Params:
    """Parameters for a tree of shapes: matrices with deviation 1/sqrt(inputs), vectors of ones."""
    keys = itertools.count(seed)
    return tree.map_paths(lambda path, leaf: _leaf(next(keys), leaf, "*" in path), shapes)


def _leaf(key: int, leaf: Any, stacked: bool) -> Any:
    if len(leaf.shape) - stacked == 1:
        return jnp.ones(leaf.shape, leaf.dtype)
    deviation = leaf.shape[-1] ** -0.5
    if not isinstance(leaf, NF4):
        return _uniform(_bytes(key, leaf.shape), deviation).astype(leaf.dtype)
    middle = deviation / CODE_RMS
    return leaf.replace(
        packed=_bytes(key, leaf.packed.shape),
        absmax=_bytes(-key, leaf.absmax.shape),
        nested_absmax=jnp.full(leaf.nested_absmax.shape, middle / 4, jnp.float32),
        nested_map=jnp.broadcast_to(nf4.dynamic_map(), leaf.nested_map.shape),
        offset=jnp.full(leaf.offset.shape, middle, jnp.float32),
    )


def _bytes(key: int, shape: tuple[int, ...]) -> jax.Array:
    """Random bytes, drawn in parts: JAX's generator needs several times what it returns."""
    parts = next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if np.prod(shape) % n == 0)
    keys = jax.random.split(jax.random.key(key), parts)
    return _drawn(keys, int(np.prod(shape)) // parts).reshape(shape)


@partial(jax.jit, static_argnums=1)
def _drawn(keys: jax.Array, size: int) -> jax.Array:
    return jax.lax.map(lambda key: jax.random.bits(key, (size,), jnp.uint8), keys)


@jax.jit
def _uniform(drawn: jax.Array, deviation: jax.typing.ArrayLike) -> jax.Array:
    """bfloat16 values spread evenly around 0; a byte's own deviation is 73.9."""
    return ((drawn.astype(jnp.float32) - 127.5) * (deviation / 73.9)).astype(jnp.bfloat16)
