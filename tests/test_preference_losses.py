"""Preference losses: TRL's recorded numbers, by hand, finite differences, padding, accumulation.

tests/oracles/preference_losses.py made the numbers with TRL's own code.
"""

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unsloth_jax import losses, preference
from unsloth_jax.dims import Total
from unsloth_jax.preference import Answers

RECORDED = json.loads((Path(__file__).parent / "data" / "preference_losses.json").read_text())
GIVEN = RECORDED["given"]
ANSWERS = GIVEN["answers"]
ROWS, PAIRS = len(ANSWERS), len(ANSWERS) // 2
LABELS = jnp.asarray(GIVEN["labels"])
given = lambda name: jnp.asarray(GIVEN[name], jnp.float32)
LOGPS, REFERENCE = given("logps"), given("reference")
T = LOGPS.shape[1] + 1
MASK = jnp.asarray([[start <= t < end for t in range(T)] for start, end in ANSWERS], jnp.float32)
OWNERS = jnp.broadcast_to(jnp.arange(ROWS)[:, None], (ROWS, T - 1))
ONES = jnp.ones(PAIRS)


def answers(logps) -> Answers:
    """Every row's, from log-probabilities of the tokens after the first."""
    return Answers(*preference.summed(logps, MASK[:, 1:], OWNERS, ROWS), REFERENCE)


def pair(every: Answers) -> tuple[Answers, Answers]:
    """TRL's rows: the chosen answers, then the rejected ones."""
    pick = lambda rows: jax.tree.map(lambda x: x[rows], every)
    return pick(slice(0, PAIRS)), pick(slice(PAIRS, None))


def dpo(logps, **settings):
    return preference.dpo(*pair(answers(logps)), ONES, **settings)


def kto(logps, shift=0.0, **settings):
    mismatched = Answers(given("kl_logps") + shift, jnp.ones(ROWS), given("kl_reference"))
    kl = preference.kto_statistics(mismatched, jnp.ones(ROWS))["kl"].mean()
    return preference.kto(answers(logps), LABELS, jnp.ones(ROWS), kl, **settings)


def from_scores(family, scores, **settings):
    """ORPO, whose nll counts the prompt too, and CPO, from scores [rows, T, V]."""
    logps = jax.nn.log_softmax(scores[:, :-1])
    picked = jnp.take_along_axis(logps, jnp.asarray(GIVEN["ids"])[:, 1:, None], axis=-1)[..., 0]
    there = jnp.asarray([[t < end for t in range(T)] for _, end in ANSWERS], jnp.float32)
    supervised = (there if family == "orpo" else MASK)[:PAIRS, 1:]
    nll = losses.sft(picked[:PAIRS], supervised)
    tokens = preference.nll_statistics(supervised, ONES)["tokens_a_pair"].mean()
    sides = (side._replace(reference=None) for side in pair(answers(picked)))
    loss = preference.orpo if family == "orpo" else preference.cpo
    return loss(*sides, ONES, nll, tokens, **settings)


FAMILIES = {
    "dpo": (dpo, LOGPS),
    "kto": (kto, LOGPS),
    "orpo": (partial(from_scores, "orpo"), given("scores")),
    "cpo": (partial(from_scores, "cpo"), given("scores")),
}
CASES = [(family, i) for family in FAMILIES for i in range(len(RECORDED[family]))]


@pytest.mark.parametrize(("family", "number"), CASES)
def test_value_gradient_and_metrics_are_trls(family, number):
    loss, at = FAMILIES[family]
    case = RECORDED[family][number]
    mean = lambda x: (lambda total, metrics: (total.mean(), metrics))(*loss(x, **case["settings"]))
    (value, metrics), grad = jax.value_and_grad(mean, has_aux=True)(at)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-5, atol=1e-5)
    # Stand-ins for models give the tokens outside of answers a slope of their own.
    counted = MASK[:, 1:] if at.ndim == 2 else 1.0
    np.testing.assert_allclose(grad, np.asarray(case["grad"]) * counted, rtol=1e-4, atol=1e-5)
    assert np.abs(grad).max() > 1e-4
    ours = {name: total.mean() for name, total in metrics.items()}
    if family == "kto":
        ours["rewards/margins"] = ours["rewards/chosen"] - ours["rewards/rejected"]
    if case["settings"].get("cpo_alpha", 1.0) == 0:
        ours["nll_loss"] = 0.0
    assert set(ours) == set(case["metrics"])
    for name, wanted in case["metrics"].items():
        np.testing.assert_allclose(ours[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_numbers_are_of_the_version_named_and_of_every_loss():
    assert RECORDED["versions"]["trl"].startswith("1.16.")
    kinds = lambda family: {c["settings"].get("loss_type", "kto") for c in RECORDED[family]}
    assert kinds("dpo") == set(preference.DPO)
    assert kinds("cpo") == set(preference.CPO)
    assert kinds("kto") == set(preference.KTO)


def test_conservative_dpo_is_the_mean_over_both_labels():
    """Pairs are the wrong way round in a share e; TRL's CPO writes the same of its margin."""
    plain, _ = dpo(LOGPS)
    sides = pair(answers(LOGPS))
    swapped, _ = preference.dpo(*sides[::-1], ONES)
    smooth, _ = dpo(LOGPS, label_smoothing=0.1)
    np.testing.assert_allclose(smooth.value, 0.9 * plain.value + 0.1 * swapped.value, rtol=1e-5)


def one(logp, reference=0.0, tokens=1.0) -> Answers:
    return Answers(*(jnp.asarray([x], jnp.float32) for x in (logp, tokens, reference)))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_losses_of_one_pair_by_hand():
    chosen, rejected = one(-2.0, -3.0, 4.0), one(-5.0, -4.0, 2.0)  # ratios 1 and -1
    value = lambda **s: float(preference.dpo(chosen, rejected, jnp.ones(1), **s)[0].value)
    np.testing.assert_allclose(value(beta=0.5), -log_sigmoid(1.0), rtol=1e-6)
    np.testing.assert_allclose(value(loss_type="hinge", beta=0.25), 0.5, rtol=1e-6)
    # Means a token: 1/4 and -1/2, so a margin of 3/4 where 1 / (2 beta) = 5/4 is wanted.
    np.testing.assert_allclose(value(loss_type="ipo", beta=0.4), 0.25, rtol=1e-6)
    tenth = (0.9 * -log_sigmoid(2.0) - 0.1 * -log_sigmoid(-2.0)) / 0.8
    got = value(loss_type="robust", beta=1.0, label_smoothing=0.1)
    np.testing.assert_allclose(got, tenth, rtol=1e-6)


def test_orpo_of_one_pair_by_hand():
    """Mean probabilities 0.8 and 0.2: odds 4 and 1/4, ratio 16; nll 3 over 6 tokens."""
    sides = one(2 * math.log(0.8), tokens=2.0), one(3 * math.log(0.2), tokens=3.0)
    nll = Total(jnp.float32(3.0), jnp.float32(6.0))
    total, metrics = preference.orpo(*sides, jnp.ones(1), nll, jnp.float32(6.0), beta=0.1)
    np.testing.assert_allclose(total.value, 0.5 - 0.1 * math.log(16 / 17), rtol=1e-6)
    np.testing.assert_allclose(metrics["log_odds_chosen"].value, math.log(16), rtol=1e-6)


def test_simpo_of_one_pair_by_hand():
    sides = one(-2.0, tokens=4.0), one(-3.0, tokens=2.0)  # means -0.5 and -1.5
    nll, settings = Total(jnp.zeros(()), jnp.zeros(())), dict(cpo_alpha=0.0, beta=2.0)
    total, _ = preference.cpo(
        *sides, jnp.ones(1), nll, jnp.zeros(()), loss_type="simpo", simpo_gamma=1.5, **settings
    )
    np.testing.assert_allclose(total.value, -log_sigmoid(2.0 * 1.0 - 1.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("desirable", "kl", "exponent"), [(1, 0.5, -1.5), (0, 0.5, 1.5), (1, -4.0, -2.0)]
)
def test_kto_of_one_answer_by_hand(desirable, kl, exponent):
    """A ratio of 2 over the KL, which is 0 where its estimate is below."""
    label = jnp.asarray([bool(desirable)])
    fields = dict(beta=1.0, desirable_weight=3.0, undesirable_weight=3.0)
    total, metrics = preference.kto(one(-1.0, -3.0), label, jnp.ones(1), jnp.float32(kl), **fields)
    np.testing.assert_allclose(total.value, 3 / (1 + math.exp(-exponent)), rtol=1e-6)
    assert metrics["kl"].mean() == max(kl, 0.0)
    assert metrics["rewards/chosen"].count == desirable


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_finite_differences(family):
    loss, at = FAMILIES[family]
    settings = {"dpo": {"beta": 0.5}, "kto": {"beta": 0.5}}.get(family, {})
    value = jax.jit(lambda x: loss(x, **settings)[0].value)
    along = jnp.asarray(np.random.default_rng(1).normal(0, 1, at.shape), jnp.float32)
    step = 1e-2
    slope = (value(at + step * along) - value(at - step * along)) / (2 * step)
    got = (jax.grad(value)(at) * along).sum()
    assert abs(got) > 1e-2
    np.testing.assert_allclose(got, slope, rtol=5e-3, atol=1e-3)


def test_a_policy_that_is_its_reference_has_no_margin_and_no_kl():
    same = Answers(REFERENCE, jnp.ones(ROWS), REFERENCE)
    total, metrics = preference.dpo(*pair(same), ONES)
    np.testing.assert_allclose(total.mean(), math.log(2), rtol=1e-6)
    assert metrics["rewards/margins"].value == 0 and metrics["rewards/chosen"].value == 0
    assert preference.kto_statistics(same, jnp.ones(ROWS))["kl"].value == 0
    loss, _ = preference.kto(same, LABELS, jnp.ones(ROWS), jnp.zeros(()))
    assert loss.mean() == 0.5


def padded(side: Answers) -> Answers:
    """Three more rows of things that no row may hold."""
    junk = jnp.asarray([jnp.nan, -jnp.inf, 0.0])
    return jax.tree.map(lambda x: jnp.concatenate([x, junk]), side)


PADDABLE = {
    **{f"dpo {n}": (preference.dpo, dict(loss_type=n)) for n in preference.DPO},
    "orpo": (preference.orpo, {}),
    **{f"cpo {n}": (preference.cpo, dict(loss_type=n)) for n in preference.CPO},
    **{f"kto {n}": (preference.kto, dict(loss_type=n)) for n in preference.KTO},
}


@pytest.mark.parametrize("case", PADDABLE)
def test_rows_without_weight_change_nothing_whatever_they_hold(case):
    loss, settings = PADDABLE[case]
    if "exo" in case:
        settings = settings | {"label_smoothing": 0.1}
    nll = Total(jnp.float32(3.0), jnp.float32(6.0)), jnp.float32(2.0)
    extra = nll if loss in (preference.orpo, preference.cpo) else ()

    def totals(logps, pad):
        every = answers(logps)
        change = padded if pad else lambda side: side
        if loss is preference.kto:
            label = jnp.concatenate([LABELS, jnp.asarray([True, False, True])]) if pad else LABELS
            weights = jnp.ones(ROWS)
            sides, more = (change(every), label), (jnp.float32(0.3),)
        else:
            weights, more = ONES, extra
            sides = tuple(map(change, pair(every)))
        weights = jnp.concatenate([weights, jnp.zeros(3)]) if pad else weights
        return loss(*sides, weights, *more, **settings)

    def graded(pad):
        with_metrics = lambda x: (lambda t, m: (t.value, (t, m)))(*totals(x, pad))
        return jax.value_and_grad(with_metrics, has_aux=True)(LOGPS)

    got, expected = graded(True), graded(False)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)


def test_packed_answers_sum_to_those_of_rows_of_their_own():
    weights = MASK[:, 1:]
    apart = preference.summed(LOGPS, weights, OWNERS, ROWS)
    flat = lambda x: x.reshape(2, -1)
    values = jnp.where(flat(weights) == 0, jnp.nan, flat(LOGPS))
    owners = jnp.where(flat(weights) == 0, -1, flat(OWNERS))
    packed = preference.summed(values, flat(weights), owners, ROWS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), packed, apart)
    np.testing.assert_array_equal(apart[1], [end - start for start, end in ANSWERS])
    fewer = preference.summed(LOGPS, weights, OWNERS, 3)
    np.testing.assert_array_equal(fewer[0], apart[0][:3])


def test_micro_batches_add_up_to_the_whole_batch():
    """With the statistics of the whole batch, as ORPO's nll over tokens needs them."""
    scores = given("scores")
    whole, _ = from_scores("orpo", scores)
    logps = jax.nn.log_softmax(scores[:, :-1])
    picked = jnp.take_along_axis(logps, jnp.asarray(GIVEN["ids"])[:, 1:, None], axis=-1)[..., 0]
    there = jnp.asarray([[t < end for t in range(1, T)] for _, end in ANSWERS], jnp.float32)
    chosen, rejected = pair(answers(picked))
    weights, parts = there[:PAIRS], []
    counts = [preference.nll_statistics(weights[i : i + 1], ONES[i : i + 1]) for i in range(PAIRS)]
    tokens = jax.tree.map(lambda *x: sum(x), *counts)["tokens_a_pair"].mean()
    for i in range(PAIRS):
        rows = slice(i, i + 1)
        sides = (jax.tree.map(lambda x, rows=rows: x[rows], s) for s in (chosen, rejected))
        nll = losses.sft(picked[rows], weights[rows])
        parts.append(preference.orpo(*sides, ONES[rows], nll, tokens)[0])
    total = jax.tree.map(lambda *x: sum(x), *parts)
    np.testing.assert_allclose(total.mean(), whole.mean(), rtol=1e-6)


def test_orpo_stays_finite_for_an_answer_of_probability_one():
    sides = one(0.0), one(-1.0)
    nll = Total(jnp.zeros(()), jnp.ones(()))
    loss = lambda x: (
        preference.orpo(sides[0]._replace(logps=x), sides[1], jnp.ones(1), nll, jnp.ones(()))[
            0
        ].value
    )
    value, grad = jax.value_and_grad(loss)(jnp.zeros(1))
    assert np.isfinite(value) and np.isfinite(grad).all()


REFUSALS = {
    "dpo": (lambda: dpo(LOGPS, loss_type="sigmoidal"), r"'sigmoidal'.*nearest: sigmoid.*known: \["),
    "cpo": (
        lambda: from_scores("cpo", given("scores"), loss_type="simp"),
        r"CPO loss_type 'simp' is not supported; nearest: simpo; known: \['sigmoid', 'hinge'",
    ),
    "kto": (lambda: kto(LOGPS, loss_type="bco"), r"KTO loss_type 'bco' .*known: \['kto', 'apo_"),
    "smoothing": (
        lambda: dpo(LOGPS, loss_type="hinge", label_smoothing=0.1),
        r"'hinge' has no label_smoothing, got 0.1; \['sigmoid', 'sigmoid_norm', 'robust', 'exo",
    ),
    "share": (
        lambda: dpo(LOGPS, loss_type="robust", label_smoothing=0.5),
        r"label_smoothing of 'robust' is from 0 up to below 0.5, got 0.5",
    ),
    "exo": (
        lambda: dpo(LOGPS, loss_type="exo_pair"),
        r"'exo_pair' is from 0 \(not 0 itself\) up to below 1.0, got 0.0",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_unknown_is_refused_with_what_is_known(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()
