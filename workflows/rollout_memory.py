"""What a rollout takes of a device, and how many completions that leaves room for."""

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unsloth_jax import decoding, plan, rollout, unstack
from unsloth_jax.dims import Params
from workflows import generate
from workflows.keywords import say

EIGHT = 8  # slots, fewer of which are no use to plain weights
DRAWING = 16  # bytes a token of the vocabulary and slot: scores and what draws from them


class Fits(NamedTuple):
    """What the device has room for."""

    slots: int
    plain: bool  # whether plain arrays of the layers' weights are made


def fits(
    family: ModuleType,
    c: Any,
    params: Params,
    room: int,
    before: float | int = 0,
    weights: str = "auto",
    memory: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> Fits:
    """How many slots of `room` tokens fit beside what is held now, and beside plain weights.

    `before` tokens of prompts are held for each slot elsewhere. "auto" makes plain weights where at
    least EIGHT slots fit beside them, or as many as without.
    """
    each = slot_bytes(family, c, room, dtype) + int(before * token_bytes(family, c, dtype))
    free = generate.free_bytes(memory)
    beside = (free - unstack.plain_bytes(family, params)) // each
    if weights == "auto" and beside < min(EIGHT, free // each):
        say(
            "rollouts read the weights as they are stored, which is slower: plain ones and "
            f"{EIGHT} slots of {room} tokens don't fit into {free / 2**30:.1f} GiB"
        )
        return Fits(free // each, False)
    return Fits(free // each, False) if weights == "stored" else Fits(beside, True)


def slot_bytes(family: ModuleType, c: Any, room: int, dtype: Any) -> int:
    """What a slot takes: its cache, the tokens it has seen, and a token's scores as it is drawn."""
    slot = jax.eval_shape(lambda: rollout.empty(family, c, 1, room, 1, dtype))
    return plan.size(slot) + DRAWING * c.vocab


def token_bytes(family: ModuleType, c: Any, dtype: Any) -> int:
    """Keys and values of one token."""
    cache = jax.eval_shape(lambda: decoding.empty(family, c, 1, 1, dtype))
    return plan.size((cache.keys, cache.values))
