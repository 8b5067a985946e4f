"""What GRPO lowers: a policy-gradient loss of completions that share their prompts."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from unsloth_jax import decoder, lora, losses, policy, remat, shared_prompts
from unsloth_jax.dims import Batch, Measured, Params, Shared, Total
from unsloth_jax.policy import Completions, Loss, Tokens
from workflows.objective import Objective

# Arrays beside a step's rows: [M, B, C] of tokens behind the prompts, [M, B, k] of completions,
# [M] of steps.
OF_TOKENS = ("drawn", "old", "reference", "correction")
OF_COMPLETIONS = ("advantages", "real", "pulled")
OF_STEP = ("tokens_a_completion", "entropy_least")


def grpo(
    how: Loss, temperature: float | int, beside: tuple[str, ...], sizes: tuple[int, int, int]
) -> Objective:
    """The loss `how` of completions that were drawn at `temperature`, 0 counting as 1.

    `beside` names the arrays that batches have of OF_TOKENS, OF_COMPLETIONS and OF_STEP; `sizes`
    are the most that rows have: completions, tokens behind the prompt, of one with its prompt.
    """
    policy.check(how)
    unknown = set(beside) - {*OF_TOKENS, *OF_COMPLETIONS, *OF_STEP}
    assert not unknown, unknown

    def loss(
        family: ModuleType,
        c: Any,
        scale: float,
        memory: remat.Memory = remat.PLAIN,
        documents: int | None = 1,
    ) -> Callable:
        told = scored(family, c, scale, temperature, memory, documents)

        def fn(adapters: Params, frozen: Params, b: Batch) -> Measured:
            return _of(*told(adapters, frozen, b), b, how)

        return fn

    count, behind, width = sizes

    def shapes(accumulation: int, rows: int) -> dict[str, Any]:
        of = {name: (accumulation, rows, behind) for name in OF_TOKENS}
        of |= {name: (accumulation, rows, count) for name in OF_COMPLETIONS}
        of |= {name: (accumulation,) for name in OF_STEP}
        return {name: jax.ShapeDtypeStruct(of[name], jnp.float32) for name in beside}

    def shared(accumulation: int, rows: int) -> Shared:
        of = ((accumulation, rows, count, width), (accumulation, rows, behind))
        return Shared(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in of))

    settings = json.dumps(how._asdict() | {"temperature": temperature})
    return Objective(
        f"grpo/1 {settings}",
        loss,
        perplexity=False,
        beside=shapes,
        counts="completions",
        rests=True,
        shared=shared,
    )


def _of(logps: Array, entropies: Array, b: Batch, how: Loss) -> Measured:
    there, kept = b.beside, None
    weights, owners = behind(b.weights, b), owned(b)
    if "entropy_least" in there:
        kept = (entropies >= there["entropy_least"]).astype(jnp.float32)
    tokens = Tokens(
        logps, weights, owners, there.get("old"), there.get("reference"), there["drawn"],
        there.get("correction"), entropies, kept,
    )  # fmt: skip
    each = (there.get(name) for name in OF_COMPLETIONS)
    completions = Completions(*(None if x is None else x.reshape(-1) for x in each))
    found = policy.loss(tokens, completions, how, there["tokens_a_completion"])
    # Of the policy that drew them, where another update has not moved it on.
    drew = jax.lax.stop_gradient(logps) if tokens.old is None else tokens.old
    gap = jnp.where(weights > 0, jnp.abs(drew - there["drawn"]), 0)
    difference = Total(gap.sum(), weights.sum())
    return found._replace(
        metrics=found.metrics | {"sampling/sampling_logp_difference/mean": difference}
    )


def behind(x: Any, b: Batch) -> Any:
    """The part of x [..., R] that stands behind the prompts, [..., C]."""
    return x[..., x.shape[-1] - b.shared.owners.shape[-1] :]


def owned(b: Batch) -> Array:
    """Numbers in their micro-batch of the completions of tokens behind the prompts; else -1."""
    owners, count = jnp.asarray(b.shared.owners), b.shared.places.shape[-2]
    rows = owners.shape[-2]
    first = count * jnp.arange(rows).reshape(*(1,) * (owners.ndim - 2), rows, 1)
    return jnp.where(owners < 0, -1, owners + first)


def scored(
    family: ModuleType,
    c: Any,
    scale: float,
    temperature: float | int,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = 1,
) -> Callable[[Params | None, Params, Batch], tuple[Array, Array]]:
    """fn(adapters or None, frozen, micro-batch) -> log p at `temperature` and entropies [B, C].

    Of targets with weight; others hold anything finite.
    """
    scores = policy.tempered(family.scores(c), temperature or 1.0)

    def fn(adapters: Params | None, frozen: Params, b: Batch) -> tuple[Array, Array]:
        params = frozen if adapters is None else lora.attach(frozen, adapters, scale)
        hidden = decoder.forward(
            family, c, params, b.tokens, b.positions, b.segments, memory, documents, b.embedded,
            b.shared,
        )  # fmt: skip
        hidden = shared_prompts.predicting(hidden, b.shared)
        return losses.token_logprobs_and_entropies(
            hidden, family.head(c, params), behind(b.targets, b), memory.chunk,
            behind(b.weights, b), scores,
        )  # fmt: skip

    return fn


def of_each(family: ModuleType, c: Any, scale: float, temperature: float | int) -> Callable:
    """`scored`, jitted, of micro-batches one after another."""
    one = scored(family, c, scale, temperature)
    return jax.jit(
        lambda adapters, frozen, batches: jax.lax.map(lambda b: one(adapters, frozen, b), batches)
    )
