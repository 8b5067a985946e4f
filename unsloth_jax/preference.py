"""Preference losses: log-probabilities of whole answers in, undivided sums and metrics out.

They are those of TRL 1.16, over the whole global batch. A row of weight 0 is padding and may hold
anything. Metrics are `Total`s without gradient under TRL's names; TRL's `rewards/margins` of KTO
is the difference of two of them.
"""

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unsloth_jax.dims import Total

Metrics = dict[str, Total]
Rows = Float[Array, " N"]
Number = float | int
CERTAIN = -1e-7  # an answer of probability 1 has infinite odds; they end here


class Answers(NamedTuple):
    """Sums over each answer's tokens. `reference` is None for losses without a reference."""

    logps: Array  # float32 [N], the policy's
    tokens: Array  # float32 [N], how many there are
    reference: Array | None = None  # float32 [N], the frozen policy's


class Margins(NamedTuple):
    """What a DPO loss is made of, [N] each."""

    chosen: Array  # log p / p_reference of the answer
    rejected: Array
    chosen_tokens: Array
    rejected_tokens: Array


def summed(
    values: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    owners: Int[Array, "B T"],
    count: int,
) -> tuple[Float[Array, " count"], Float[Array, " count"]]:
    """Weighted sum and weight of each of `count` answers; a token's owner is its answer's number.

    Tokens of another number are left out, so packed rows and rows of one's own serve alike.
    """
    flat = jnp.where((owners < 0) | (owners >= count), count, owners).reshape(-1)
    kept = jnp.where(weights == 0, 0.0, values) * weights
    gather = lambda x: jax.ops.segment_sum(x.reshape(-1), flat, count + 1)[:count]
    return gather(kept), gather(weights)


def _sigmoid(m: Margins, beta: Number, e: Number) -> Array:
    return _both_ways(beta * (m.chosen - m.rejected), e)


def _sigmoid_norm(m: Margins, beta: Number, e: Number) -> Array:
    return _both_ways(beta * _means(m), e)


def _hinge(m: Margins, beta: Number, e: Number) -> Array:
    return jax.nn.relu(1 - beta * (m.chosen - m.rejected))


def _ipo(m: Margins, beta: Number, e: Number) -> Array:
    return (_means(m) - 1 / (2 * beta)) ** 2


def _robust(m: Margins, beta: Number, e: Number) -> Array:
    margin = beta * (m.chosen - m.rejected)
    clean, flipped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return ((1 - e) * clean - e * flipped) / (1 - 2 * e)


def _exo_pair(m: Margins, beta: Number, e: Number) -> Array:
    margin = beta * (m.chosen - m.rejected)
    gap = lambda x, share: jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - math.log(share))
    return gap(margin, 1 - e) + gap(-margin, e)


def _nca_pair(m: Margins, beta: Number, e: Number) -> Array:
    log = jax.nn.log_sigmoid
    chosen, rejected = beta * m.chosen, beta * m.rejected
    return -log(chosen) - 0.5 * log(-chosen) - 0.5 * log(-rejected)


def _bco_pair(m: Margins, beta: Number, e: Number) -> Array:
    return -jax.nn.log_sigmoid(beta * m.chosen) - jax.nn.log_sigmoid(-beta * m.rejected)


def _sppo_hard(m: Margins, beta: Number, e: Number) -> Array:
    return (m.chosen - 0.5 / beta) ** 2 + (m.rejected + 0.5 / beta) ** 2


def _apo_zero(m: Margins, beta: Number, e: Number) -> Array:
    return 1 - jax.nn.sigmoid(beta * m.chosen) + jax.nn.sigmoid(beta * m.rejected)


def _apo_down(m: Margins, beta: Number, e: Number) -> Array:
    margin = beta * (m.chosen - m.rejected)
    return jax.nn.sigmoid(beta * m.chosen) + 1 - jax.nn.sigmoid(margin)


def _both_ways(margin: Array, e: Number) -> Array:
    """-log sigmoid where a share `e` of the pairs is the wrong way round (conservative DPO)."""
    log = jax.nn.log_sigmoid
    return -(1 - e) * log(margin) - (e * log(-margin) if e else 0.0)


def _means(m: Margins) -> Array:
    """The margin a token: IPO's authors' form of its loss."""
    mean = lambda x, tokens: x / jnp.maximum(tokens, 1)
    return mean(m.chosen, m.chosen_tokens) - mean(m.rejected, m.rejected_tokens)


DPO: dict[str, Callable[[Margins, Number, Number], Array]] = {
    "sigmoid": _sigmoid,  # arXiv:2305.18290
    "sigmoid_norm": _sigmoid_norm,  # arXiv:2411.15124
    "hinge": _hinge,  # arXiv:2305.10425
    "ipo": _ipo,  # arXiv:2310.12036
    "robust": _robust,  # arXiv:2403.00409
    "exo_pair": _exo_pair,  # arXiv:2402.00856
    "nca_pair": _nca_pair,  # arXiv:2402.05369
    "bco_pair": _bco_pair,  # arXiv:2404.04656
    "sppo_hard": _sppo_hard,  # arXiv:2405.00675
    "apo_zero": _apo_zero,  # arXiv:2408.06266
    "apo_down": _apo_down,
}
SMOOTHED = {"sigmoid": 1.0, "sigmoid_norm": 1.0, "robust": 0.5, "exo_pair": 1.0, "simpo": 1.0}
CPO = ("sigmoid", "hinge", "ipo", "simpo")
KTO = ("kto", "apo_zero_unpaired")


def dpo(
    chosen: Answers,
    rejected: Answers,
    weights: Rows,
    *,
    loss_type: str = "sigmoid",
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
) -> tuple[Total, Metrics]:
    """Sum over pairs of TRL's DPO losses, and their number.

    "sigmoid" with `label_smoothing` is conservative DPO. Raises ValueError for an unknown type or
    for smoothing that the type does not have.
    """
    check("DPO", loss_type, DPO, label_smoothing)
    chosen, rejected = _kept(chosen, weights), _kept(rejected, weights)
    ratios = [side.logps - side.reference for side in (chosen, rejected)]
    margins = Margins(*ratios, chosen.tokens, rejected.tokens)
    total = _total(DPO[loss_type](margins, beta, label_smoothing), weights)
    return total, _pair_metrics([beta * r for r in ratios], (chosen, rejected), weights)


def orpo(
    chosen: Answers,
    rejected: Answers,
    weights: Rows,
    nll: Total,
    tokens_a_pair: Float[Array, ""],
    *,
    beta: Number = 0.1,
) -> tuple[Total, Metrics]:
    """Sum over pairs of nll - beta log sigmoid(log odds ratio) (arXiv:2403.07691).

    Odds are of mean log-probabilities a token. `nll` is `losses.sft` of the chosen rows, TRL's
    over prompt and answer; its mean over tokens weighs as much as the pairs' mean, wherefore
    `tokens_a_pair` is `nll_statistics`' mean over the whole global batch.
    """
    means = [_mean_logps(side, weights) for side in (chosen, rejected)]
    # Any probability but 1 does for padding.
    safe = [jnp.where(weights == 0, -1.0, jnp.minimum(x, CERTAIN)) for x in means]
    odds = [x - _log1mexp(x) for x in safe]
    log_odds = odds[0] - odds[1]
    ratio = jax.nn.log_sigmoid(log_odds)
    value, count = _total(-beta * ratio, weights)
    metrics = _pair_metrics([beta * x for x in means], _sides(means), weights) | {
        "nll_loss": _still(nll),
        "log_odds_ratio": _still(_total(ratio, weights)),
        "log_odds_chosen": _still(_total(log_odds, weights)),
    }
    return Total(value + nll.value / _positive(tokens_a_pair), count), metrics


def cpo(
    chosen: Answers,
    rejected: Answers,
    weights: Rows,
    nll: Total,
    tokens_a_pair: Float[Array, ""],
    *,
    loss_type: str = "sigmoid",
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    cpo_alpha: Number = 1.0,
    simpo_gamma: Number = 0.5,
) -> tuple[Total, Metrics]:
    """Sum over pairs of CPO's losses (arXiv:2401.08417) plus cpo_alpha times the answers' nll.

    "simpo" with cpo_alpha 0 is SimPO (arXiv:2405.14734), "simpo" and "ipo" take means a token.
    `nll` is `losses.sft` of the chosen answers, `tokens_a_pair` as in `orpo`. Raises ValueError
    as `dpo` does.
    """
    check("CPO", loss_type, CPO, label_smoothing)
    averaged = loss_type in ("ipo", "simpo")
    sides = _kept(chosen, weights), _kept(rejected, weights)
    logps = [_mean_logps(s, weights) if averaged else s.logps for s in sides]
    ones = jnp.ones_like(weights)
    gap = simpo_gamma / beta if loss_type == "simpo" else 0.0
    rule = DPO["sigmoid" if loss_type == "simpo" else loss_type]
    each = rule(Margins(logps[0] - gap, logps[1], ones, ones), beta, label_smoothing)
    value, count = _total(each, weights)
    metrics = _pair_metrics([beta * x for x in logps], _sides(logps), weights)
    added = cpo_alpha * nll.value / _positive(tokens_a_pair)
    return Total(value + added, count), metrics | {"nll_loss": _still(nll)}


def nll_statistics(token_weights: Float[Array, "B T"], weights: Rows) -> dict[str, Total]:
    """What `orpo` and `cpo` need of the whole global batch: supervised tokens a pair."""
    return {"tokens_a_pair": Total(token_weights.sum(), weights.sum())}


def kto(
    answers: Answers,
    desirable: Bool[Array, " N"],
    weights: Rows,
    kl: Float[Array, ""],
    *,
    loss_type: str = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
) -> tuple[Total, Metrics]:
    """Sum over answers of 1 - sigmoid of what they gain over the batch's KL (arXiv:2402.01306).

    `kl` is `kto_statistics`' mean over the whole global batch; it has no gradient, and below 0 it
    counts as 0. "apo_zero_unpaired" (arXiv:2408.06266) is without. ValueError for another type.
    """
    check("KTO", loss_type, KTO, 0.0)
    kept = _kept(answers, weights)
    ratio = kept.logps - kept.reference
    kl = jax.lax.stop_gradient(jnp.maximum(kl, 0.0)) if loss_type == "kto" else jnp.zeros(())
    sign = jnp.where(desirable, 1.0, -1.0)
    factor = jnp.where(desirable, desirable_weight, undesirable_weight)
    each = factor * jax.nn.sigmoid(-beta * sign * (ratio - kl))
    good, bad = weights * desirable, weights * ~desirable
    metrics = {
        "rewards/chosen": _total(beta * ratio, good),
        "rewards/rejected": _total(beta * ratio, bad),
        "logps/chosen": _total(kept.logps, good),
        "logps/rejected": _total(kept.logps, bad),
        "kl": Total(kl * weights.sum(), weights.sum()),
    }
    return _total(each, weights), {k: _still(x) for k, x in metrics.items()}


def kto_statistics(mismatched: Answers, weights: Rows) -> dict[str, Total]:
    """What `kto` needs of the whole global batch: log p / p_reference of other prompts' answers.

    Each prompt goes with the answer of another one; TRL turns a batch's answers by one row.
    """
    kept = _kept(mismatched, weights)
    return {"kl": _still(_total(kept.logps - kept.reference, weights))}


def check(family: str, name: str, known, smoothing: Number) -> None:
    """Raises ValueError for an unknown loss type, or smoothing that the type does not have."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise ValueError(f"{family} loss_type {name!r} is not supported; {hint}known: {[*known]}")
    if smoothing and name not in SMOOTHED:
        has = [n for n in known if n in SMOOTHED]
        raise ValueError(f"loss_type {name!r} has no label_smoothing, got {smoothing}; {has} have")
    least = 1e-30 if name == "exo_pair" else 0.0
    if not least <= smoothing < SMOOTHED.get(name, 1.0):
        raise ValueError(
            f"label_smoothing of {name!r} is from 0{' (not 0 itself)' if least else ''} up to "
            f"below {SMOOTHED.get(name, 1.0)}, got {smoothing}"
        )


def _kept(side: Answers, weights: Rows) -> Answers:
    """Padding's numbers replaced, so that its gradient is 0 whatever it holds."""
    keep = lambda x: None if x is None else jnp.where(weights == 0, 0.0, x)
    reference = side.reference
    still = None if reference is None else jax.lax.stop_gradient(reference)
    return Answers(keep(side.logps), jnp.where(weights == 0, 1.0, side.tokens), keep(still))


def _mean_logps(side: Answers, weights: Rows) -> Array:
    kept = _kept(side, weights)
    return kept.logps / jnp.maximum(kept.tokens, 1)


def _log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x < 0, in the form that keeps its digits there."""
    near = x > -math.log(2)
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, close, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


def _sides(logps: list[Array]) -> tuple[Answers, ...]:
    return tuple(Answers(x, jnp.ones_like(x)) for x in logps)


def _pair_metrics(rewards: list[Array], sides: tuple[Answers, ...], weights: Rows) -> Metrics:
    chosen, rejected = rewards
    each = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": sides[0].logps,
        "logps/rejected": sides[1].logps,
    }
    return {name: _still(_total(x, weights)) for name, x in each.items()}


def _total(each: Array, weights: Rows) -> Total:
    return Total((each * weights).sum(), weights.sum())


def _still(total: Total) -> Total:
    return jax.tree.map(jax.lax.stop_gradient, total)


def _positive(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
