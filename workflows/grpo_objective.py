"""What GRPO lowers: a policy-gradient loss of whole completions, one a row."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from unsloth_jax import decoder, lora, losses, policy, remat
from unsloth_jax.dims import Batch, Measured, Most, Params, Total
from unsloth_jax.policy import Completions, Loss, Tokens
from workflows.objective import Objective

# Arrays beside a step's rows: [M, B, T] of targets, [M, B] of completions, [M] of steps.
OF_TOKENS = ("drawn", "old", "reference", "correction")
OF_ROWS = ("advantages", "real", "pulled")
OF_STEP = ("tokens_a_completion", "entropy_least")
GAP = "sampling/sampling_logp_difference"


def grpo(how: Loss, temperature: float | int, beside: tuple[str, ...], width: int) -> Objective:
    """The loss `how` of completions that were drawn at `temperature`, 0 counting as 1.

    `beside` names the arrays that batches have of OF_TOKENS, OF_ROWS and OF_STEP; `width` is the
    longest row's.
    """
    policy.check(how)
    unknown = set(beside) - {*OF_TOKENS, *OF_ROWS, *OF_STEP}
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

    def shapes(accumulation: int, rows: int) -> dict[str, Any]:
        of = {name: (accumulation, rows, width) for name in OF_TOKENS}
        of |= {name: (accumulation, rows) for name in OF_ROWS}
        of |= {name: (accumulation,) for name in OF_STEP}
        return {name: jax.ShapeDtypeStruct(of[name], jnp.float32) for name in beside}

    settings = json.dumps(how._asdict() | {"temperature": temperature})
    return Objective(
        f"grpo/1 {settings}",
        loss,
        perplexity=False,
        beside=shapes,
        counts="completions",
        rests=True,
    )


def _of(logps: Array, entropies: Array, b: Batch, how: Loss) -> Measured:
    there = b.beside
    owners = jax.lax.broadcasted_iota(jnp.int32, logps.shape, 0)
    kept = None
    if "entropy_least" in there:
        kept = (entropies >= there["entropy_least"]).astype(jnp.float32)
    tokens = Tokens(
        logps, b.weights, owners, there.get("old"), there.get("reference"), there["drawn"],
        there.get("correction"), entropies, kept,
    )  # fmt: skip
    completions = Completions(there["advantages"], there["real"], there.get("pulled"))
    found = policy.loss(tokens, completions, how, there["tokens_a_completion"])
    # Of the policy that drew them, where another update has not moved it on.
    drew = jax.lax.stop_gradient(logps) if tokens.old is None else tokens.old
    gap = jnp.where(b.weights > 0, jnp.abs(drew - there["drawn"]), 0)
    difference = Total(gap.sum(), b.weights.sum())
    apart = {f"{GAP}/mean": difference, f"{GAP}/max": Most(gap.max())}
    return found._replace(metrics=found.metrics | apart)


def scored(
    family: ModuleType,
    c: Any,
    scale: float,
    temperature: float | int,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = 1,
) -> Callable[[Params | None, Params, Batch], tuple[Array, Array]]:
    """fn(adapters or None, frozen, micro-batch) -> log p at `temperature` and entropies [B, T].

    Of targets with weight; others hold anything finite.
    """
    scores = policy.tempered(family.scores(c), temperature or 1.0)

    def fn(adapters: Params | None, frozen: Params, b: Batch) -> tuple[Array, Array]:
        params = frozen if adapters is None else lora.attach(frozen, adapters, scale)
        hidden = decoder.forward(
            family, c, params, b.tokens, b.positions, b.segments, memory, documents, b.embedded
        )
        head = family.head(c, params)
        return losses.token_logprobs_and_entropies(
            hidden, head, b.targets, memory.chunk, b.weights, scores
        )

    return fn


def of_each(family: ModuleType, c: Any, scale: float, temperature: float | int) -> Callable:
    """`scored`, jitted, of micro-batches [M, B, T] one after another."""
    one = scored(family, c, scale, temperature)
    return jax.jit(
        lambda adapters, frozen, batches: jax.lax.map(lambda b: one(adapters, frozen, b), batches)
    )
