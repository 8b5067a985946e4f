"""Whether the first step with a learning rate reached everything that is to be trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import lora
from unsloth_jax.dims import Params
from unsloth_jax.directions import axes_of

Marks = dict[str, list[int]]


def marks(trainable: Params) -> Marks:
    """A sum of the bits of each part of each matrix that is trained as it is, by path.

    Vectors have none: a norm's weights are all near 1, where a small step is rounded away.
    """
    whole = lora.parts(trainable)[1]
    matrices = {p: x for p, x in whole.items() if axes_of(p, jax.tree.leaves(x)[0]) > 1}
    return {path: [int(_bits(x)) for x in jax.tree.leaves(leaf)] for path, leaf in matrices.items()}


@jax.jit
def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).sum(dtype=jnp.uint32)


def check(before: Marks, trainable: Params) -> None:
    """Raises RuntimeError where a `b` is still zero, or a matrix is what it was at `before`.

    Only `a` may stand still: it waits for `b`.
    """
    pairs = lora.parts(trainable)[0]
    still = [path for path, leaf in pairs.items() if path.endswith(".b") and not _any(leaf)]
    now = marks(trainable)
    still += [path for path, was in before.items() if now[path] == was]
    if still:
        raise RuntimeError(
            f"the first step changed nothing in {still}: these weights get no gradient"
        )


def _any(leaf: Any) -> bool:
    return any(np.asarray(x).any() for x in jax.tree.leaves(leaf))
