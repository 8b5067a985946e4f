"""Completions behind one prompt in a row, against each behind a prompt of its own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unsloth_jax import decoder, lora, losses
from workflows import grpo_objective
from workflows.grpo_rows import Layout

# Prompts by their tokens; four completions of each, one without a token.
PROMPTS = (5, 19, 12)
COMPLETIONS = ((7, 20, 1, 13), (9, 0, 30, 4), (2, 11, 8, 8))
GROUP, SCALE = 4, 0.7
NAMES = (
    "llama", "mistral", "qwen2_yarn_window", "gemma2", "qwen3_5_text", "falcon_h1", "mixtral",
    "qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3",
)  # fmt: skip


def drawn():
    """(prompts, completions) as token ids."""
    prompts = [tiny.draw(n, size) for n, size in enumerate(PROMPTS)]
    sizes = [size for group in COMPLETIONS for size in group]
    return prompts, [tiny.draw(100 + n, size) if size else [] for n, size in enumerate(sizes)]


def layout(batch: int, **how) -> Layout:
    return Layout(len(PROMPTS), GROUP, batch, (max(PROMPTS), 30), limit=64, **how)


def laid(how: Layout):
    prompts, completions = drawn()
    learnt = [[n % 5 != 3 for n in range(len(one))] for one in completions]
    worth = [[np.sin(n + 3 * m) for n in range(len(one))] for m, one in enumerate(completions)]
    return how.laid(prompts, completions, learnt, {"drawn": worth}, {"real": np.ones(12)})


def adapted(name: str):
    pair = tiny.pair(name)
    targets = lora.TARGETS if "experts" not in str(jax.tree.structure(pair.params)) else ATTENTION
    adapters = lora.init(jax.random.key(1), pair.params, 4, targets)
    leaves, kind = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return pair, kind.unflatten(drawn)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@partial(jax.jit, static_argnums=(0, 1))
def together(family, c, params, adapters, batch):
    """(sum, log p) and gradients of rows with shared prompts, over micro-batches."""
    told = grpo_objective.scored(family, c, SCALE, 1.0)

    def one(adapters, b):
        logps = told(adapters, params, b)[0]
        weights = grpo_objective.behind(b.weights, b)
        return (logps * b.beside["drawn"] * weights).sum(), logps * weights

    grads, logps = jax.lax.map(
        lambda b: jax.grad(one, has_aux=True)(adapters, b), batch._replace(key=None)
    )
    return jax.tree.map(lambda g: g.sum(0), grads), logps


@partial(jax.jit, static_argnums=(0, 1))
def alone(family, c, params, adapters, rows, weights, worth):
    """The same of rows of their own."""
    tokens, positions, segments = rows

    def one(adapters):
        hidden = decoder.forward(
            family, c, lora.attach(params, adapters, SCALE), tokens, positions, segments
        )
        head = family.head(c, lora.attach(params, adapters, SCALE))
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        logps = losses.token_logprobs(hidden, head, targets, scores=family.scores(c)) * weights
        return (logps * worth).sum(), logps

    return jax.grad(one, has_aux=True)(adapters)


def of_its_own(pair, adapters):
    prompts, completions = drawn()
    whole = [prompts[n // GROUP] + one for n, one in enumerate(completions)]
    rows = tiny.padded(whole, 64)
    weights, worth = np.zeros((2, *rows[0].shape), np.float32)
    for n, one in enumerate(completions):
        start = len(prompts[n // GROUP]) - 1
        for i in range(len(one)):
            weights[n, start + i], worth[n, start + i] = i % 5 != 3, np.sin(i + 3 * n)
    grads, logps = alone(pair.family, pair.config, pair.params, adapters, rows, weights, worth)
    return grads, np.asarray(logps)[weights > 0]


@pytest.mark.parametrize("name", tiny.entries(NAMES))
def test_completions_behind_one_prompt_are_as_behind_their_own(name, figure):
    pair, adapters = adapted(name)
    want, each = of_its_own(pair, adapters)
    batch = laid(layout(8))
    assert batch.tokens.shape[:2] == (2, 2) and batch.shared.places.shape[2] == GROUP
    grads, logps = together(pair.family, pair.config, pair.params, adapters, batch)
    got = np.asarray(logps)[grpo_objective.behind(batch.weights, batch) > 0]
    figure(f"{name}'s shared prompts, log-probabilities", np.abs(got - each).max(), 1e-5 * 20)
    for one, other in zip(*map(jax.tree.leaves, (grads, want)), strict=True):
        gap, size = np.abs(one - other).max(), np.abs(other).max()
        figure(f"{name}'s shared prompts, gradients", gap / size, 1e-5)
