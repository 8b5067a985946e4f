"""Losses by hand, against torch and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother

from pallas_kernels import cross_entropy
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
COUNT = int(WEIGHTS.sum())

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


def from_scores(loss):
    """(transformers' or TRL's loss of the same tokens, its gradient by the hidden states)."""
    x, w = (torch.tensor(np.asarray(a), requires_grad=True) for a in (HIDDEN, HEAD))
    labels = torch.tensor(np.where(np.asarray(WEIGHTS) > 0, np.asarray(TARGETS), -100)).long()
    value = loss(x @ w.T, labels)
    value.backward()
    return value.item(), x.grad.numpy(), w.grad.numpy()


def assert_mean_is(loss, expected):
    """`loss(hidden, head)` is a Total; its mean and both gradients are the expected ones."""
    value, *grads = expected
    mean = lambda x, w: loss(x, w).mean()
    got, ours = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(HIDDEN, HEAD)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for mine, theirs in zip(ours, grads, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    frozen = jax.jit(jax.grad(lambda x: mean(x, HEAD)))(HIDDEN)
    np.testing.assert_allclose(frozen, grads[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["array", "bias"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
def test_label_smoothing_is_transformers_label_smoother(epsilon, kind):
    smoother = LabelSmoother(epsilon)
    expected = from_scores(
        lambda scores, labels: smoother({"logits": scores}, labels, num_items_in_batch=COUNT)
    )

    def loss(x, w):
        head = {"weight": w} if kind == "array" else {"weight": w, "bias": jnp.zeros(V)}
        logps = losses.token_logprobs(x, head, TARGETS, 5, WEIGHTS, smoothing=epsilon)
        return losses.sft(logps, WEIGHTS)

    assert_mean_is(loss, expected)


def test_smoothed_scores_under_a_cap_are_torchs_and_the_references():
    rule = cross_entropy.Rule(7, scale=2.0, cap=3.0, smoothing=0.2)
    x, y, wanted = HIDDEN.reshape(-1, D), TARGETS.reshape(-1), WEIGHTS.reshape(-1) != 0
    tx, tw = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x, HEAD))
    scores = 3 * torch.tanh(tx @ tw.T * 2 / 3)
    fields = dict(reduction="none", label_smoothing=0.2)
    nll = torch.nn.functional.cross_entropy(scores, torch.tensor(np.asarray(y)).long(), **fields)
    expected = -nll * torch.tensor(np.asarray(wanted))
    expected.sum().backward()
    total = lambda x, w: cross_entropy.token_logprobs(x, w, y, wanted, rule).logps.sum()
    got = cross_entropy.token_logprobs(x, HEAD, y, wanted, rule).logps
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-5)
    same = cross_entropy.reference(x, HEAD, y, wanted, rule).logps
    np.testing.assert_allclose(same, expected.detach().numpy(), atol=1e-5)
    grads = *jax.grad(total, argnums=(0, 1))(x, HEAD), jax.grad(lambda x: total(x, HEAD))(x)
    for ours, theirs in zip(grads, (tx.grad, tw.grad, tx.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_smoothing_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match=f"from 0 up to below 1, got {share}"):
        losses.token_logprobs(HIDDEN, {"weight": HEAD}, TARGETS, smoothing=share)


def test_dft_is_trls():
    """TRL 1.16, SFTTrainer.compute_loss: nll times its detached probability, over the count."""

    def theirs(scores, labels):
        logps = torch.log_softmax(scores, -1)
        logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        each = torch.where(labels >= 0, -logps * logps.exp().detach(), 0.0)
        return each.sum() / (labels >= 0).sum()

    def loss(x, w):
        return losses.dft(losses.token_logprobs(x, {"weight": w}, TARGETS, 5, WEIGHTS), WEIGHTS)

    assert_mean_is(loss, from_scores(theirs))


def test_dft_by_hand():
    logps = jnp.log(jnp.asarray([[0.5, 0.25, 0.1]]))
    weights = jnp.asarray([[1.0, 1.0, 0.0]])
    value, slope = jax.value_and_grad(lambda x: losses.dft(x, weights).value)(logps)
    np.testing.assert_allclose(value, 0.5 * np.log(2) + 0.25 * np.log(4), rtol=1e-6)
    np.testing.assert_allclose(slope, [[-0.5, -0.25, 0.0]], rtol=1e-6)
    assert losses.dft(logps, weights).count == 2


def test_neftune_noise_is_uniform_with_the_size_of_transformers():
    x = jnp.asarray(rng_of(5).normal(0, 1, (4, 30, 64)), jnp.float32)
    noise = np.asarray(losses.neftune(jax.random.key(0), x, 5.0) - x)
    module = torch.nn.Embedding(30, 64)
    module.neftune_noise_alpha = 5.0
    theirs = neftune_post_forward_hook(module, None, torch.zeros(x.shape)).numpy()
    bound = 5 / np.sqrt(30 * 64)
    for each in (noise, theirs):
        assert bound * 0.999 < np.abs(each).max() < bound * (1 + 1e-5)
        np.testing.assert_allclose(each.std(), bound / np.sqrt(3), rtol=0.02)
        np.testing.assert_allclose(each.mean(), 0, atol=0.03 * bound)


def test_neftune_noise_of_a_document_has_its_own_lengths_size():
    x = jnp.zeros((1, 40, 256), jnp.bfloat16)
    lengths = jnp.asarray([[4] * 4 + [36] * 36])
    got = losses.neftune(jax.random.key(1), x, 2.0, lengths)
    assert got.dtype == jnp.bfloat16
    for part, length in ((got[:, :4], 4), (got[:, 4:], 36)):
        top = np.abs(np.asarray(part, np.float32)).max()
        np.testing.assert_allclose(top, 2 / np.sqrt(length * 256), rtol=0.02)
    again = losses.neftune(jax.random.key(1), x, 2.0, lengths)
    other = losses.neftune(jax.random.key(2), x, 2.0, lengths)
    assert (again == got).all() and not (other == got).all()


def test_gradients_pass_neftune_unchanged():
    x = jnp.ones((2, 3, 4))
    slope = jax.grad(lambda x: (losses.neftune(jax.random.key(0), x, 5.0) * 3).sum())(x)
    np.testing.assert_array_equal(slope, 3 * jnp.ones_like(x))
