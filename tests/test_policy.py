"""Policy-gradient losses against TRL's own `_compute_loss`, and advantages against its rules."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from unsloth_jax import policy
from unsloth_jax.advantages import advantages
from unsloth_jax.dims import Most, Scores, Total
from unsloth_jax.policy import Completions, Loss, Tokens
from workflows import evaluate

ROWS, LENGTH, LONGEST = 6, 9, 12
HOW = {
    "epsilon": 0.2, "epsilon_high": 0.28, "delta": None, "beta": 0.0,
    "use_bias_correction_kl": True, "off_policy_mask_threshold": None,
    "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
}  # fmt: skip
CASES = {
    "on policy": (dict(), ()),
    "off policy": (dict(), ("old",)),
    "KL": (dict(beta=0.1), ("old", "reference")),
    "KL not corrected": (dict(beta=0.1, use_bias_correction_kl=False), ("old", "reference")),
    "two-sided": (dict(delta=1.3), ("old",)),
    "corrected by token": (dict(), ("old", "correction")),
    "corrected with KL": (dict(beta=0.04), ("old", "reference", "correction")),
    "far from its sampler": (dict(off_policy_mask_threshold=0.05), ("old", "sampled")),
    "high entropy": (dict(), ("old", "kept")),
}


@pytest.fixture(scope="module")
def drawn():
    """Arrays of rows of unequal length; the last has no token that counts."""
    rng = np.random.default_rng(0)
    lengths = np.asarray([9, 4, 7, 1, 6, 0])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
    logps = -rng.exponential(1.0, (ROWS, LENGTH))
    near = lambda by: (logps + rng.normal(0, by, logps.shape)).astype(np.float32)
    arrays = dict(old=near(0.4), reference=near(0.5), sampled=near(0.3))
    arrays["entropies"] = rng.exponential(1.0, mask.shape).astype(np.float32)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    advantages = np.asarray([1.2, -0.7, 0.4, -1.5, 0.0, 0.9], np.float32)
    return *map(jnp.asarray, (logps.astype(np.float32), mask, advantages)), arrays


def owned(mask):
    return jnp.broadcast_to(jnp.arange(len(mask))[:, None], mask.shape)


def given(drawn, names, mode="token_truncate"):
    """`Tokens`' fields of a case."""
    logps, mask, _, arrays = drawn
    owners = owned(mask)
    fields = {n: arrays[n] for n in names if n in arrays}
    if "correction" in names:
        of = (arrays["old"], arrays["sampled"], mask, owners, ROWS)
        fields["correction"] = policy.corrections(*of, mode=mode)
    if "kept" in names:
        least = jnp.quantile(arrays["entropies"][mask > 0], 0.6)
        fields["kept"] = (arrays["entropies"] >= least) * mask
    return Tokens(logps, mask, owners, entropies=arrays["entropies"], **fields)


ENDS = ("clip_ratio/low_min", "clip_ratio/high_max")
NAMES = {
    "old": "old_per_token_logps",
    "reference": "ref_per_token_logps",
    "sampled": "sampling_per_token_logps",
    "correction": "importance_sampling_ratio",
}


def stub(tokens: Tokens, logps, entropies, loss_type, level, settings):
    """What TRL's `_compute_loss` reads of its trainer."""
    corrected = tokens.correction is not None
    same = lambda x, *_, **__: x
    made = SimpleNamespace(
        args=SimpleNamespace(**settings, steps_per_generation=1),
        loss_type=loss_type,
        beta=settings["beta"],
        epsilon_low=settings["epsilon"],
        epsilon_high=settings["epsilon_high"],
        importance_sampling_level=level,
        off_policy_mask_threshold=settings["off_policy_mask_threshold"],
        top_entropy_quantile=1.0 if tokens.kept is None else 0.4,
        max_completion_length=LONGEST,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=same, gather=same, pad_across_processes=same
        ),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
    )
    made.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, made)
    return made


def trl(tokens: Tokens, drawn, loss_type, level, settings):
    """TRL's loss, its gradient by the log-probabilities and its metrics."""
    value = lambda x: torch.tensor(np.asarray(x))
    mask, nothing = value(drawn[1]), torch.zeros(ROWS, 0)
    logps = torch.tensor(np.asarray(tokens.logps), requires_grad=True)
    inputs = dict(
        prompt_ids=nothing, prompt_mask=nothing, completion_ids=mask, completion_mask=mask,
        advantages=value(drawn[2]), num_items_in_batch=mask.sum(),
    )  # fmt: skip
    there = {name: x for name in NAMES if (x := getattr(tokens, name)) is not None}
    inputs |= {NAMES[name]: value(x) for name, x in there.items()}
    trainer = stub(tokens, logps, value(drawn[3]["entropies"]), loss_type, level, settings)
    found = GRPOTrainer._compute_loss(trainer, None, inputs)
    found.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return found.item(), logps.grad.numpy(), metrics


def ours(tokens, completions, how):
    def mean(logps):
        found = policy.loss(tokens._replace(logps=logps), completions, how)
        told = lambda of: of.mean() if isinstance(of, Total) else of.value
        return found.total.mean(), {n: told(of) for n, of in found.metrics.items()}

    (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(tokens.logps)
    return value, gradient, metrics


def completions(drawn):
    return Completions(drawn[2], jnp.ones(ROWS))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", policy.LEVELS)
@pytest.mark.parametrize("loss_type", policy.LOSSES)
def test_loss_gradient_and_metrics_are_trls(loss_type, level, case, drawn):
    changes, names = CASES[case]
    settings = HOW | changes
    tokens = given(drawn, names)
    how = Loss(loss_type, level, max_completion_length=LONGEST, **settings)
    want, slope, told = trl(tokens, drawn, loss_type, level, settings)
    value, gradient, metrics = ours(tokens, completions(drawn), how)
    assert value == pytest.approx(want, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
    assert np.abs(slope).max() > 1e-3
    # Ratios of whole sequences are counted by sequence there, by token here.
    shared = set(told) & set(metrics) if level == "token" else {"entropy", *ENDS} & set(told)
    assert {"entropy"} <= shared and (loss_type not in policy.CLIPPED or {*ENDS} <= shared)
    for name in shared:
        assert metrics[name] == pytest.approx(told[name], rel=1e-5, abs=1e-6), name
    assert ("kl" in metrics) == bool(settings["beta"])


@pytest.mark.parametrize("loss_type", policy.LOSSES)
def test_micro_batches_order_and_layout_change_nothing(loss_type, drawn):
    tokens = given(drawn, ("old", "reference"))
    how = Loss(loss_type, "token", beta=0.1, epsilon_high=0.3, max_completion_length=LONGEST)
    a_completion = float(drawn[1].sum() / ROWS)
    loss_of = partial(policy.loss, tokens_a_completion=a_completion)

    def summed(parts):
        totals = [loss_of(t, c, how).total for t, c in parts]
        return Total(sum(t.value for t in totals), sum(t.count for t in totals)).mean()

    def cut(rows):
        taken = Tokens(*(x if x is None else x[rows] for x in tokens))
        local = owned(taken.weights)
        both = Completions(drawn[2][rows], jnp.ones(len(rows)))
        return taken._replace(owners=local), both

    whole = float(summed([(tokens, completions(drawn))]))
    # The whole batch's own mean is what the parts were told.
    assert whole == pytest.approx(float(policy.loss(tokens, completions(drawn), how).total.mean()))
    thirds = [cut(np.asarray(rows)) for rows in ([4, 0], [5, 2], [1, 3])]
    assert float(summed(thirds)) == pytest.approx(whole, rel=1e-5)
    # One row that holds all completions, and one completion of padding.
    flat = Tokens(*(x if x is None else x.reshape(1, -1) for x in tokens))
    padded = Completions(
        np.append(drawn[2], np.nan), np.append(np.ones(ROWS), 0).astype(np.float32)
    )
    assert float(summed([(flat, padded)])) == pytest.approx(whole, rel=1e-5)


def test_the_least_and_the_most_clipped_completion_are_those_of_all_micro_batches(drawn):
    tokens = given(drawn, ("old",))
    how = Loss("grpo", epsilon=0.01)

    def of(rows):
        taken = Tokens(*(x if x is None else x[rows] for x in tokens))
        both = Completions(drawn[2][rows], jnp.ones(len(rows)))
        return policy.loss(taken._replace(owners=owned(taken.weights)), both, how).metrics

    whole = of(np.arange(ROWS))
    parts = [of(np.asarray(rows)) for rows in ([4, 0], [5, 2], [1, 3])]
    found = evaluate.means(jax.device_get(parts))
    for name in (*ENDS, "clip_ratio/low_mean"):
        assert found[name] == pytest.approx(evaluate.means(jax.device_get([whole]))[name])
    assert 0 <= found["clip_ratio/low_min"] <= found["clip_ratio/low_mean"] > 0
    assert found["clip_ratio/high_max"] > max(0, *(float(p["clip_ratio/low_min"].value)
                                                  for p in parts))  # fmt: skip
    assert ENDS[1] not in evaluate.means([{ENDS[1]: Most(np.float32(-np.inf))}])


WILD = {
    "nothing counts": lambda t, c: (t._replace(weights=0 * t.weights), c),
    "one row": lambda t, c: (t, c._replace(weights=jnp.eye(ROWS)[1])),
    "no signal": lambda t, c: (t, c._replace(advantages=0 * c.advantages)),
    "impossible tokens": lambda t, c: (t._replace(logps=t.logps - np.inf), c),
    "impossible before": lambda t, c: (t._replace(old=t.old - np.inf), c),
    "impossible in the reference": lambda t, c: (t._replace(reference=t.reference - np.inf), c),
    "not a number where nothing counts": lambda t, c: (
        t._replace(**{n: jnp.where(t.weights > 0, getattr(t, n), jnp.nan)
                      for n in ("logps", "old", "reference", "correction")}),
        c,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WILD)
@pytest.mark.parametrize("level", policy.LEVELS)
@pytest.mark.parametrize("loss_type", policy.LOSSES)
def test_loss_and_gradient_are_always_finite(loss_type, level, case, drawn):
    tokens = given(drawn, ("old", "reference", "correction"))
    how = Loss(loss_type, level, beta=0.1, max_completion_length=LONGEST)
    value, gradient, metrics = ours(*WILD[case](tokens, completions(drawn)), how)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert all(np.isfinite(x) for name, x in metrics.items() if name not in ENDS)
    assert not any(np.isnan(metrics[name]) for name in ENDS if name in metrics)


@pytest.mark.parametrize("mode", policy.MISMATCH)
def test_corrections_for_the_sampler_are_trls(mode, drawn):
    _, mask, _, arrays = drawn
    sampled = arrays["sampled"].at[0, 3].set(jnp.nan)  # vLLM has none for such a token
    bounds = dict(clip_min=0.6, clip_max=1.4)
    of = (arrays["old"], sampled, mask, owned(mask), ROWS)
    found = policy.corrections(*of, mode=mode, **bounds)
    gap = np.nan_to_num((arrays["old"] - sampled) * mask, nan=0.0)
    gap = gap.sum(1, keepdims=True) if mode.startswith("sequence") else gap
    ratio = np.exp(gap)
    outside = (ratio < 0.6) | (ratio > 1.4)
    want = ratio.clip(0.6, 1.4) if mode.endswith("truncate") else np.where(outside, 0, ratio)
    want = np.broadcast_to(want, mask.shape)
    inside = np.asarray(mask) > 0
    np.testing.assert_allclose(np.asarray(found)[inside], want[inside], rtol=1e-5)
    assert outside.any() and not outside.all()


def test_the_kl_term_of_a_group_can_be_left_out(drawn):
    tokens = given(drawn, ("old", "reference"))
    how = Loss("grpo", beta=0.3)
    pulled = jnp.float32([1, 1, 0, 0, 1, 1])
    flat = completions(drawn)._replace(advantages=drawn[2] * pulled)
    _, all_pulled, _ = ours(tokens, flat, how)
    _, some, _ = ours(tokens, flat._replace(pulled=pulled), how)
    rows = np.asarray(pulled) > 0
    some, all_pulled = np.asarray(some), np.asarray(all_pulled)
    np.testing.assert_array_equal(some[rows], all_pulled[rows])
    assert not some[~rows].any() and np.abs(all_pulled[~rows]).max() > 1e-3


@pytest.mark.parametrize("scores", [Scores(), Scores(0.25, None), Scores(0.5, 3.0)])
def test_tempered_scores_are_the_familys_over_the_temperature(scores):
    x = np.random.default_rng(1).normal(0, 4, (3, 50)).astype(np.float32)
    of = lambda how: (
        x * how.scale if how.cap is None else how.cap * np.tanh(x * how.scale / how.cap)
    )
    np.testing.assert_allclose(of(policy.tempered(scores, 0.7)), of(scores) / 0.7, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(loss_type="gpro"), r"loss_type='gpro'.*did you mean 'grpo'"),
        (dict(importance_sampling_level="word"), "importance_sampling_level='word'.*sequence"),
        (dict(loss_type="dr_grpo"), "max_completion_length"),
        (dict(epsilon=-0.1), "epsilon=-0.1, expected a number of at least 0"),
        (dict(delta=0.5), "delta=0.5, expected a number of at least 1"),
        (dict(beta=float("nan")), "beta=nan"),
        (dict(sapo_temperature_neg=0), "sapo_temperature_neg=0"),
    ],
)
def test_what_no_loss_takes_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        policy.check(Loss()._replace(**changes))


def trls_advantages(rewards, weights, groups, scale, aggregation):
    """What `_generate_and_score_completions` of TRL 1.16 does with rewards, in torch."""
    rewards, weights = torch.tensor(rewards), torch.tensor(weights)
    nothing = torch.isnan(rewards).all(1)
    if aggregation == "normalize_then_sum":
        each = rewards.view(-1, groups, rewards.shape[1])
        each = (each - torch.nanmean(each, 1, keepdim=True)) / (
            nanstd(each, dim=1, keepdim=True) + 1e-4
        )
        total = (each.view(rewards.shape) * weights).nansum(1)
        total[nothing] = torch.nan
        found = (total - torch.nanmean(total)) / (nanstd(total) + 1e-4)
        return torch.nan_to_num(found, nan=0.0)
    total = (rewards * weights).nansum(1)
    total[nothing] = torch.nan
    by_group = total.view(-1, groups)
    found = (by_group - torch.nanmean(by_group, 1, keepdim=True)).view(-1)
    if scale != "none":
        each = nanstd(by_group, dim=1).repeat_interleave(groups)
        found = found / ((each if scale == "group" else nanstd(total)) + 1e-4)
    return torch.nan_to_num(found, nan=0.0)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale, aggregation, holes):
    rng = np.random.default_rng(2)
    rewards, weights = rng.normal(0, 2, (12, 3)), np.asarray([1.0, 0.5, -2.0])
    if holes:
        rewards[rng.random(rewards.shape) < 0.3] = np.nan
        rewards[5] = np.nan
    how = dict(scale_rewards=scale, multi_objective_aggregation=aggregation)
    found = advantages(rewards, weights, 4, **how)
    want = trls_advantages(rewards, weights, 4, scale, aggregation).numpy()
    np.testing.assert_allclose(found.values, want, rtol=1e-5, atol=1e-6)
    assert found.values.dtype == np.float32 and not found.flat.any()
    assert np.isnan(found.rewards).sum() == holes and (found.values[5] == 0) == holes


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_without_a_difference_have_no_advantage(scale):
    # A mean of 0.1 three times is not 0.1 in floating point.
    rewards = np.asarray([0.1, 0.1, 0.1, 0.0, 1.0, 0.5, np.nan, np.nan, 7.0])[:, None]
    found = advantages(rewards, np.ones(1), 3, scale_rewards=scale)
    assert found.flat.tolist() == [True, False, True]
    assert not found.values[:3].any() and not found.values[6:].any()
    assert found.values[3] < 0 < found.values[4] and found.values[5] == 0


def test_rows_that_do_not_count_have_no_part_in_means_and_deviations():
    rewards = np.asarray([1.0, 3.0, 100.0, 2.0])[:, None]
    valid = np.asarray([True, True, False, True])
    found = advantages(rewards, np.ones(1), 4, valid)
    want = advantages(rewards[valid], np.ones(1), 3)
    np.testing.assert_array_equal(found.values[valid], want.values)
    assert found.values[2] == 0 and np.isnan(found.rewards[2])
    alone = advantages(rewards, np.ones(1), 4, np.arange(4) == 2)
    assert not alone.values.any() and alone.flat.all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scale_rewards="std"), "scale_rewards='std'.*group"),
        (dict(multi_objective_aggregation="sum"), "multi_objective_aggregation='sum'"),
        (dict(num_generations=5), "4 completions are no whole groups of 5"),
        (dict(weights=np.ones(2)), "2 weights for 1 reward functions"),
        (dict(valid=np.ones(3, bool)), "valid has shape"),
        (
            dict(rewards=np.asarray([[1.0], [-np.inf], [0], [0]])),
            "reward 0 of completion 1 is -inf",
        ),
    ],
)
def test_rewards_that_do_not_fit_are_refused(changes, message):
    given = dict(rewards=np.zeros((4, 1)), weights=np.ones(1), num_generations=2) | changes
    with pytest.raises(ValueError, match=message):
        advantages(**given)


def test_a_worked_example():
    """Two completions of one token each: ratio 2 with advantage 1 is cut at 1.2, by hand."""
    logps, old = np.log([[0.5], [0.1]]), np.log([[0.25], [0.1]])
    ones = jnp.ones((2, 1))
    tokens = Tokens(jnp.float32(logps), ones, owned(ones), jnp.float32(old))
    both = Completions(jnp.float32([1.0, -1.0]), jnp.ones(2))
    value, gradient, metrics = ours(tokens, both, Loss("dapo"))
    assert value == pytest.approx((-1.2 + 1.0) / 2, rel=1e-6)
    np.testing.assert_allclose(gradient, [[0.0], [0.5]], atol=1e-6)
    assert metrics["clip_ratio/high_mean"] == 0.5 and metrics["ratio"] == pytest.approx(1.5)
