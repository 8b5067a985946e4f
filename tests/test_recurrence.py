"""Chunked recurrences and the causal convolution, token by token and in transformers' torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from pallas_kernels import causal_conv, recurrence

BATCH, LENGTH, GROUPS, HEADS, KEY, VALUE = 2, 45, 2, 4, 8, 6
CHUNK = 16
# Documents start inside chunks, at their borders, one token after another, and not at all.
STARTS = {0: [0, 5, 16, 17, 40], 1: [0]}
run = jax.jit(recurrence.recur, static_argnames="chunk")
step_by_step = jax.jit(recurrence.reference)


def inputs(delta: bool, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
    q, k = (draw(BATCH, LENGTH, GROUPS, KEY) for _ in range(2))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = draw(BATCH, LENGTH, HEADS, VALUE)
    decay = -jnp.exp(draw(BATCH, LENGTH, HEADS) - 2)
    beta = jax.nn.sigmoid(draw(BATCH, LENGTH, HEADS)) if delta else None
    return q, k, v, decay, beta


def started(rows: dict[int, list[int]]) -> jax.Array:
    out = np.zeros((BATCH, LENGTH), bool)
    for row, at in rows.items():
        out[row, at] = True
    return jnp.asarray(out)


def a_state(seed: int = 3) -> jax.Array:
    shape = (BATCH, HEADS, KEY, VALUE)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


@pytest.mark.parametrize("rows", [STARTS, {0: [7], 1: []}], ids=["documents", "going on"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta rule", "mamba"])
def test_chunks_equal_one_token_after_the_other(delta, rows):
    given = (*inputs(delta), started(rows), a_state())
    for ours, wanted in zip(run(*given, chunk=CHUNK), step_by_step(*given), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5 * float(wanted.std()))


@pytest.mark.parametrize("delta", [True, False], ids=["delta rule", "mamba"])
def test_the_gradient_of_chunks_is_that_of_tokens(delta):
    given, starts, state = inputs(delta), started(STARTS | {1: [3]}), a_state()
    weigh = jnp.asarray(np.random.default_rng(1).normal(0, 1, given[2].shape), jnp.float32)

    def gradients(fn):
        def loss(given, state):
            y, last = fn(*given, starts, state)
            return (y * weigh).sum() + (last * last).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(given, state))

    chunked = lambda *given: recurrence.recur(*given, chunk=CHUNK)
    for ours, wanted in zip(gradients(chunked), gradients(recurrence.reference), strict=True):
        assert float(jnp.linalg.norm(ours - wanted)) <= 1e-5 * float(jnp.linalg.norm(wanted))


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def test_the_delta_rule_equals_transformers():
    given = inputs(True)
    found, last = run(*given, started({}), a_state(), chunk=CHUNK)
    q, k, v, decay, beta = map(tensor, given)
    options = dict(initial_state=tensor(a_state()), output_final_state=True)
    # Its queries are divided by the root of their width.
    for theirs in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule):
        wanted, kept = theirs(q * KEY**0.5, k, v, decay, beta, **options)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
        np.testing.assert_allclose(last, kept.numpy(), atol=1e-5)


def test_mamba_equals_transformers():
    c, b, x, _, _ = inputs(False)
    rng = np.random.default_rng(2)
    dt = jnp.asarray(rng.uniform(0.1, 1, (BATCH, LENGTH, HEADS)), jnp.float32)
    a = -jnp.asarray(rng.uniform(0.1, 1, HEADS), jnp.float32)
    given = (c, b, x * dt[..., None], dt * a[None, None], None)
    found, last = run(*given, started({}), a_state(), chunk=CHUNK)
    wanted, kept = falcon.mamba2_chunk_scan(
        *map(tensor, (x, dt, a, b, c)), chunk_size=8, return_final_states=True,
        initial_states=tensor(a_state()).transpose(-1, -2),
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(last, kept.transpose(-1, -2).numpy(), atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
def test_the_convolution_equals_transformers_in_every_document(biased):
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
    x, w, bias = draw(BATCH, LENGTH, 10), draw(10, 1, 4), draw(10) if biased else None
    found = causal_conv.convolve(x, w, bias, started(STARTS))
    for row, at in STARTS.items():
        for start, end in zip(at, [*at[1:], LENGTH], strict=True):
            part = tensor(x[row : row + 1, start:end]).transpose(1, 2)
            theirs = qwen.causal_conv1d_fn(
                part, tensor(w[:, 0]), bias if bias is None else tensor(bias)
            )
            np.testing.assert_allclose(found[row, start:end], theirs[0].T.numpy(), atol=1e-6)
    tail = jnp.zeros((BATCH, 3, 10))
    for t in range(5):
        y, tail = causal_conv.step(x[:, t], w, bias, tail)
        np.testing.assert_allclose(y, found[:, t], atol=1e-6)
