"""The chunked head against torch and against the same from all scores at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import cross_entropy
from pallas_kernels.cross_entropy import Rule

N, D, V = 23, 16, 50
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(0, 1, (N, D)), jnp.float32)
W = jnp.asarray(rng.normal(0, 0.5, (V, D)), jnp.float32)
TARGETS = jnp.asarray(rng.integers(0, V, N), jnp.int32)
G = jnp.asarray(rng.normal(0, 1, N), jnp.float32)
WANTED = {
    "all": jnp.ones(N, bool),
    "some": jnp.asarray(rng.integers(0, 2, N), bool),
    "one": jnp.arange(N) == 7,
    "none": jnp.zeros(N, bool),
}
RULES = {
    "plain": Rule(),
    "chunks": Rule(chunk=5),
    "scaled": Rule(chunk=4, scale=0.25),
    "capped": Rule(chunk=7, scale=2.0, cap=3.0),
    "entropy": Rule(chunk=6, cap=20.0, entropy=True),
}


def in_torch(rule, wanted):
    x, w = (torch.tensor(np.asarray(a), requires_grad=True) for a in (X, W))
    s = x @ w.T * rule.scale
    s = s if rule.cap is None else rule.cap * torch.tanh(s / rule.cap)
    targets = torch.tensor(np.asarray(TARGETS)).long()
    nll = torch.nn.functional.cross_entropy(s, targets, reduction="none")
    logps = -nll * torch.tensor(np.asarray(wanted))
    entropy = torch.distributions.Categorical(logits=s).entropy() * torch.tensor(np.asarray(wanted))
    (logps * torch.tensor(np.asarray(G))).sum().backward()
    return logps.detach().numpy(), entropy.detach().numpy(), x.grad.numpy(), w.grad.numpy()


@pytest.mark.parametrize(
    "wanted",
    ["some", *(pytest.param(name, marks=pytest.mark.slow) for name in ("all", "one", "none"))],
)
@pytest.mark.parametrize("rule", RULES)
def test_values_and_both_gradients_are_torchs(rule, wanted):
    rule, wanted = RULES[rule], WANTED[wanted]
    logps, entropy, dx, dw = in_torch(rule, wanted)

    def loss(x, w):
        got = cross_entropy.token_logprobs(x, w, TARGETS, wanted, rule)
        return (got.logps * G).sum(), got

    (_, got), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(X, W)
    np.testing.assert_allclose(got.logps, logps, atol=1e-5)
    for ours, theirs in zip(grads, (dx, dw), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    # A frozen head takes another road to the same gradient.
    alone = jax.jit(jax.grad(lambda x: loss(x, W)[0]))(X)
    np.testing.assert_allclose(alone, dx, atol=2e-5)
    if rule.entropy:
        np.testing.assert_allclose(got.entropy, entropy, atol=1e-5)
    else:
        assert got.entropy is None


@pytest.mark.parametrize("rule", RULES)
def test_the_reference_says_the_same(rule):
    for wanted in WANTED.values():
        got = cross_entropy.token_logprobs(X, W, TARGETS, wanted, RULES[rule])
        expected = cross_entropy.reference(X, W, TARGETS, wanted, RULES[rule])
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, expected)


def test_rows_that_are_not_wanted_cost_no_chunk():
    # NaN in a chunk that is computed would reach its neighbours' sums through 0 * NaN.
    x = jnp.where(WANTED["some"][:, None], X, jnp.nan)
    got = cross_entropy.token_logprobs(x, W, TARGETS, WANTED["some"], Rule(chunk=4))
    expected = cross_entropy.token_logprobs(X, W, TARGETS, WANTED["some"], Rule(chunk=4))
    np.testing.assert_array_equal(got.logps, expected.logps)


def test_entropy_has_no_gradient():
    rule = RULES["entropy"]
    total = lambda x: cross_entropy.token_logprobs(x, W, TARGETS, None, rule).entropy.sum()
    assert not np.any(jax.grad(total)(X))


def test_16_bit_inputs_give_float32_results_and_16_bit_gradients():
    x, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    loss = lambda x: cross_entropy.token_logprobs(x, w, TARGETS).logps.sum()
    value, grad = jax.value_and_grad(loss)(x)
    assert value.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    expected = jax.grad(lambda x: cross_entropy.token_logprobs(x, W, TARGETS).logps.sum())(X)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(grad.astype(jnp.float32), expected, atol=2e-2 * scale)


def test_no_array_of_all_scores_is_compiled():
    loss = lambda x: cross_entropy.token_logprobs(x, W, TARGETS, None, Rule(chunk=5)).logps.sum()
    text = jax.jit(jax.grad(loss)).lower(X).compile().as_text()
    assert f"f32[{N},{V}]" not in text and f"f32[5,{V}]" in text


def test_a_chunk_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        cross_entropy.token_logprobs(X, W, TARGETS, None, Rule(chunk=0))
