"""Losses by hand, against torch and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unsloth_jax import losses
from unsloth_jax.dims import Total
from unsloth_jax.leaves import Lora

B, T, D, V = 2, 9, 16, 50
rng = np.random.default_rng(0)
HIDDEN = jnp.asarray(rng.normal(0, 1, (B, T, D)), jnp.float32)
HEAD = jnp.asarray(rng.normal(0, 0.5, (V, D)), jnp.float32)
BIAS = jnp.asarray(rng.normal(0, 0.5, V), jnp.float32)
TARGETS = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
WEIGHTS = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)

logprobs = jax.jit(losses.token_logprobs, static_argnums=3)


def in_torch(hidden, head, bias=None):
    """(-cross entropy [B, T], the leaf tensors) on torch."""
    leaves = [torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, head)]
    scores = leaves[0] @ leaves[1].T + (0 if bias is None else torch.tensor(np.asarray(bias)))
    flat, targets = scores.reshape(-1, V), torch.tensor(np.asarray(TARGETS)).long().reshape(-1)
    nll = torch.nn.functional.cross_entropy(flat, targets, reduction="none")
    return -nll.reshape(B, T), leaves


@pytest.mark.parametrize("chunk", [1, 4, 5, 18, 1000])
def test_token_logprobs_are_torchs_cross_entropy_for_any_chunk(chunk):
    expected, _ = in_torch(HIDDEN, HEAD)
    got = logprobs(HIDDEN, {"weight": HEAD}, TARGETS, chunk)
    assert got.shape == (B, T) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


def test_token_logprobs_add_the_heads_bias():
    expected, _ = in_torch(HIDDEN, HEAD, BIAS)
    got = logprobs(HIDDEN, {"weight": HEAD, "bias": BIAS}, TARGETS, 4)
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)


def test_token_logprobs_stay_finite_for_huge_scores():
    got = logprobs(HIDDEN * 1e4, {"weight": HEAD}, TARGETS, 4)
    assert np.isfinite(got).all() and got.min() < -1e4


def test_16_bit_hidden_states_give_float32_logprobs():
    got = logprobs(HIDDEN.astype(jnp.bfloat16), {"weight": HEAD}, TARGETS, 4)
    expected = logprobs(HIDDEN, {"weight": HEAD}, TARGETS, 4)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=0.1)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_gradients_reach_hidden_states_and_head_as_in_torch(chunk):
    loss = lambda x, w: -(losses.token_logprobs(x, {"weight": w}, TARGETS, chunk) * WEIGHTS).sum()
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(HIDDEN, HEAD)
    logps, leaves = in_torch(HIDDEN, HEAD)
    (-(logps * torch.tensor(np.asarray(WEIGHTS))).sum()).backward()
    for ours, leaf in zip(got, leaves, strict=True):
        np.testing.assert_allclose(ours, leaf.grad.numpy(), atol=1e-5)


def slope(loss, at, along, step=1e-2):
    return (loss(at + step * along) - loss(at - step * along)) / (2 * step)


def lora_head(b):
    a = jnp.asarray(rng_of(1).normal(0, 1, (3, D)), jnp.float32)
    return Lora(jnp.asarray(HEAD), a, b, jnp.float32(0.5))


def rng_of(seed):
    return np.random.default_rng(seed)


HEADS = {
    "trained": (lambda w: (HIDDEN, {"weight": w}), HEAD),
    "adapted": (lambda b: (HIDDEN, {"weight": lora_head(b)}), jnp.ones((V, 3)) / 10),
    "tied": (lambda w: (w[TARGETS], {"weight": w}), HEAD),
    "frozen": (lambda x: (x, {"weight": HEAD}), HIDDEN),
}


@pytest.mark.parametrize("case", HEADS)
def test_gradients_equal_finite_differences(case):
    parts, at = HEADS[case]

    def loss(x):
        hidden, head = parts(x)
        return losses.sft(losses.token_logprobs(hidden, head, TARGETS, 4), WEIGHTS).value

    loss = jax.jit(loss)
    along = jnp.asarray(rng_of(2).normal(0, 0.25, at.shape), jnp.float32)
    grad = jax.grad(loss)(at)
    usual = float(jnp.linalg.norm(grad)) / 4  # the slope along a random direction of this length
    assert usual > 0.5
    assert abs((grad * along).sum() - slope(loss, at, along)) <= 5e-3 * usual


def test_sft_sums_and_counts_the_weighted_tokens():
    logps = jnp.asarray([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    weights = jnp.asarray([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    total = losses.sft(logps, weights)
    assert (float(total.value), float(total.count)) == (14.0, 3.0)
    np.testing.assert_allclose(total.mean(), 14 / 3, rtol=1e-6)


def test_padding_does_not_change_a_total():
    longer = lambda x: jnp.concatenate([x, jnp.ones_like(x)], axis=1)
    total = losses.sft(logprobs(HIDDEN, {"weight": HEAD}, TARGETS, 4), WEIGHTS)
    weights = jnp.concatenate([WEIGHTS, 0 * WEIGHTS], axis=1)
    logps = logprobs(longer(HIDDEN), {"weight": HEAD}, longer(TARGETS), 4)
    padded = losses.sft(logps, weights)
    np.testing.assert_allclose(padded.value, total.value, rtol=1e-6)
    assert padded.count == total.count


def test_totals_add_up_exactly_and_the_mean_of_none_is_zero():
    logps = logprobs(HIDDEN, {"weight": HEAD}, TARGETS, 4)
    parts = [losses.sft(logps[i : i + 1], WEIGHTS[i : i + 1]) for i in range(B)]
    whole, added = losses.sft(logps, WEIGHTS), jax.tree.map(jnp.add, *parts)
    np.testing.assert_allclose(added.mean(), whole.mean(), rtol=1e-6)
    assert Total(jnp.zeros(()), jnp.zeros(())).mean() == 0
