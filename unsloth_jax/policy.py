"""Policy-gradient losses: log-probabilities of sampled completions in, undivided sums out.

They are those of TRL 1.16's `GRPOTrainer`, each divided once, over the whole global batch, where
TRL divides by micro-batch. Tokens lie in rows of any layout; a token's owner is the number of its
completion, so padded and packed rows serve alike. What lies outside a mask may hold anything.
"""

import difflib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unsloth_jax.dims import Least, Measured, Most, Scores, Total
from unsloth_jax.preference import summed

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
MISMATCH = ("token_mask", "token_truncate", "sequence_mask", "sequence_truncate")
FAR = 20.0  # log-ratios end here: a ratio of 5e8 has long been clipped
RAREST = -1e4  # a log-probability of -inf stands as this, so that no product is infinite
RAREST_WEIGHT = math.log(1e-8)  # VESPO's least log importance weight


class Loss(NamedTuple):
    """Which loss, with TRL's names and defaults; `check` says whether they fit.

    "grpo" arXiv:2402.03300, "bnpo" TRL's, "dr_grpo" arXiv:2503.20783, "dapo" arXiv:2503.14476,
    "luspo" arXiv:2602.05261, "cispo" arXiv:2506.13585, "sapo" arXiv:2511.20347, "vespo"
    arXiv:2602.10693; GSPO (arXiv:2507.18071) is "grpo" with ratios of whole sequences.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float | int = 0.2
    epsilon_high: float | int | None = None  # None: epsilon
    delta: float | int | None = None  # upper bound of ratios, clipped or not (arXiv:2505.07291)
    beta: float | int = 0.0  # weight of the KL divergence from the reference
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: float | int | None = None  # nats a token (DeepSeek-V3.2)
    sapo_temperature_pos: float | int = 1.0
    sapo_temperature_neg: float | int = 1.05
    vespo_k_pos: float | int = 2.0
    vespo_lambda_pos: float | int = 3.0
    vespo_k_neg: float | int = 3.0
    vespo_lambda_neg: float | int = 2.0
    max_completion_length: int | None = None  # "dr_grpo" divides by it


class Tokens(NamedTuple):
    """What is known of each token, [B, T]; None where a loss has no use for it."""

    logps: Array  # float32, the policy's, which alone has a gradient
    weights: Array  # 1 where the policy drew the token and learns from it, else 0
    owners: Array  # int32, the number of its completion
    old: Array | None = None  # of the policy that the ratios refer to; None: the policy itself
    reference: Array | None = None  # of the frozen policy, for `beta`
    sampled: Array | None = None  # of the sampler, for `off_policy_mask_threshold`
    correction: Array | None = None  # `corrections` of the sampler's distribution
    entropies: Array | None = None  # nats, for their mean alone
    kept: Array | None = None  # 1 where the policy's term counts: high entropy


class Completions(NamedTuple):
    """What is known of each completion, [N]. A row of weight 0 is padding."""

    advantages: Array  # float32
    weights: Array  # 1 or 0
    pulled: Array | None = None  # 0 where the KL term is left out; None: nowhere


def check(how: Loss) -> None:
    """Raises ValueError for what no loss is called or for numbers that it can't take."""
    for name, known in (("loss_type", LOSSES), ("importance_sampling_level", LEVELS)):
        if (given := getattr(how, name)) not in known:
            near = difflib.get_close_matches(str(given), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name}={given!r}, expected one of {list(known)}{hint}")
    if how.loss_type == "dr_grpo" and not how.max_completion_length:
        raise ValueError("loss_type='dr_grpo' divides by max_completion_length, which is not given")
    least = {"epsilon": 0, "epsilon_high": 0, "delta": 1, "beta": 0}
    for name, bound in least.items():
        if (given := getattr(how, name)) is not None and not bound <= given < math.inf:
            raise ValueError(f"{name}={given!r}, expected a number of at least {bound}")
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        if not 0 < (given := getattr(how, name)) < math.inf:
            raise ValueError(f"{name}={given!r}, expected a number above 0")


def tempered(scores: Scores, temperature: float | int) -> Scores:
    """The family's scores divided by the sampler's temperature, as ratios need them."""
    cap = None if scores.cap is None else scores.cap / temperature
    return Scores(scores.scale / temperature, cap)


def loss(
    tokens: Tokens, completions: Completions, how: Loss, tokens_a_completion: Any = None
) -> Measured:
    """The loss and its metrics, whose gradient is by `tokens.logps` alone.

    `tokens_a_completion` is the mean over all completions that were sampled together, by which
    "dapo", "cispo" and "vespo" divide; None takes the batch at hand. Log-ratios end at +-20.
    """
    check(how)
    part = _gathered(tokens, completions)
    term, metrics = TERMS[how.loss_type](part, how)
    kept = part.kept
    if how.off_policy_mask_threshold is not None:
        kept = kept * _on_policy(part, how.off_policy_mask_threshold)
    if tokens.correction is not None and how.loss_type != "vespo":
        kept = kept * _inside(part.mask, tokens.correction)
    term = term * kept
    if how.beta:
        drift = _drift(part, how)
        metrics["kl"] = _mean(part, drift)
        term = term + how.beta * drift * part.of(part.pulled)
    if tokens.entropies is not None:
        metrics["entropy"] = _mean(part, tokens.entropies)
    metrics["ratio"] = _mean(part, part.ratio(how))
    still = {name: type(of)(*map(jax.lax.stop_gradient, of)) for name, of in metrics.items()}
    return Measured(_total(part, term, how, tokens_a_completion), still)


def corrections(
    old: Float[Array, "B T"],
    sampled: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    owners: Int[Array, "B T"],
    count: int,
    *,
    mode: str = "sequence_mask",
    clip_min: float | int | None = None,
    clip_max: float | int | None = 3.0,
) -> Float[Array, "B T"]:
    """Importance weights p_old / p_sampler of tokens or of whole completions, without gradient.

    "truncate" clamps them to [clip_min, clip_max], "mask" sets those outside to 0. A token whose
    `sampled` is NaN has difference 0. TRL's `vllm_importance_sampling_mode`.
    """
    if mode not in MISMATCH:
        raise ValueError(f"mode={mode!r}, expected one of {list(MISMATCH)}")
    gap = jnp.nan_to_num(_inside(weights != 0, old - sampled), nan=0.0)
    if mode.startswith("sequence"):
        whole, _ = summed(gap, weights, owners, count)
        gap = jnp.append(whole, 0.0)[_slots(owners, count)]
    least = 0.0 if clip_min is None else clip_min
    most = jnp.inf if clip_max is None else clip_max
    ratio = jnp.exp(jnp.clip(gap, -FAR, FAR))
    if mode.endswith("truncate"):
        ratio = jnp.clip(ratio, least, most)
    else:
        ratio = jnp.where((ratio < least) | (ratio > most), 0.0, ratio)
    return jax.lax.stop_gradient(ratio)


class _Part(NamedTuple):
    """Tokens with what their completions say, everything finite."""

    tokens: Tokens
    completions: Completions
    mask: Array  # bool [B, T]
    logps: Array
    log_ratio: Array  # by token; 0 outside the mask
    advantages: Array  # [B, T]
    kept: Array
    pulled: Array  # [N]
    owners: Array  # N where a token has none

    def of(self, values: Float[Array, " N"]) -> Float[Array, "B T"]:
        """Each completion's value at its tokens, 0 at others."""
        return jnp.append(values, 0.0)[self.owners]

    def sums(self, values: Float[Array, "B T"]) -> tuple[Array, Array]:
        """[N]: of values over a completion's tokens, and how many there are."""
        count = self.completions.advantages.shape[0]
        return summed(values, self.mask.astype(jnp.float32), self.owners, count)

    def ratio(self, how: Loss) -> Float[Array, "B T"]:
        """p / p_old of tokens, or its geometric mean over their completion's."""
        log = self.log_ratio
        if how.importance_sampling_level == "sequence":
            value, count = self.sums(log)
            log = self.of(value / jnp.maximum(count, 1))
        return jnp.exp(log)


def _gathered(tokens: Tokens, completions: Completions) -> _Part:
    count = completions.advantages.shape[0]
    owners = _slots(tokens.owners, count)
    alive = jnp.append(completions.weights != 0, False)[owners]
    mask = (tokens.weights != 0) & alive
    logps = jnp.maximum(_inside(mask, tokens.logps), RAREST)
    old = jax.lax.stop_gradient(logps)
    if tokens.old is not None:
        old = jnp.maximum(_inside(mask, tokens.old), RAREST)
    pulled = completions.pulled
    return _Part(
        tokens, completions, mask, logps, jnp.clip(logps - old, -FAR, FAR),
        advantages=jnp.append(jnp.where(completions.weights != 0, completions.advantages, 0), 0)[
            owners
        ],
        kept=jnp.ones_like(logps) if tokens.kept is None else _inside(mask, tokens.kept),
        pulled=jnp.ones((count,)) if pulled is None else pulled.astype(jnp.float32),
        owners=owners,
    )  # fmt: skip


def _slots(owners: Array, count: int) -> Array:
    """Owners, those of no completion as number `count`."""
    return jnp.where((owners < 0) | (owners >= count), count, owners)


def _inside(mask: Array, values: Array) -> Array:
    """Values where the mask is, 0 elsewhere; in double `where`s, so that gradients stay finite."""
    return jnp.where(mask, values, 0).astype(jnp.float32)


def _clipped(part: _Part, how: Loss) -> tuple[Array, dict[str, Total | Least | Most]]:
    """The smaller of the surrogate with the ratio and with the ratio clipped (arXiv:1707.06347)."""
    ratio, a = part.ratio(how), part.advantages
    low, high = 1 - how.epsilon, 1 + (how.epsilon if how.epsilon_high is None else how.epsilon_high)
    bounded = ratio if how.delta is None else jnp.minimum(ratio, how.delta)
    term = -jnp.minimum(bounded * a, jnp.clip(ratio, low, high) * a)
    below, above = (bounded < low) & (a < 0), (bounded > high) & (a > 0)
    names = ("low", "high", "region")
    shares = zip(names, (below, above, below | above), strict=True)
    told = {f"clip_ratio/{n}_mean": _mean(part, x.astype(jnp.float32)) for n, x in shares}
    low, there = _each(part, below)
    told["clip_ratio/low_min"] = Least(jnp.where(there, low, jnp.inf).min())
    high, there = _each(part, above)
    return term, told | {"clip_ratio/high_max": Most(jnp.where(there, high, -jnp.inf).max())}


def _each(part: _Part, chosen: Array) -> tuple[Array, Array]:
    """[N]: the share of a completion's tokens that are chosen, and whether it has any token."""
    value, count = part.sums(chosen.astype(jnp.float32))
    return value / jnp.maximum(count, 1), count > 0


def _cispo(part: _Part, how: Loss) -> tuple[Array, dict[str, Total]]:
    """REINFORCE weighted by the ratio, which ends at `epsilon_high`."""
    ratio, a = jax.lax.stop_gradient(part.ratio(how)), part.advantages
    most = how.epsilon if how.epsilon_high is None else how.epsilon_high
    cut = ((ratio > most) & (a > 0)).astype(jnp.float32)
    return -jnp.minimum(ratio, most) * a * part.logps, {"cispo_clip_ratio": _mean(part, cut)}


def _sapo(part: _Part, how: Loss) -> tuple[Array, dict[str, Total]]:
    """A sigmoid gate around ratio 1 in the clip's place."""
    a = part.advantages
    t = jnp.where(a > 0, how.sapo_temperature_pos, how.sapo_temperature_neg)
    return -jax.nn.sigmoid(t * (part.ratio(how) - 1)) * 4 / t * a, {}


def _vespo(part: _Part, how: Loss) -> tuple[Array, dict[str, Total]]:
    """REINFORCE weighted by phi(w) = w^k exp(lambda (1 - w)) of a completion's ratio w."""
    log_w, _ = part.sums(part.log_ratio)
    if part.tokens.correction is not None:
        log = jnp.log(jnp.where(part.mask, part.tokens.correction, 1.0))
        log_w = log_w + part.sums(jnp.clip(log, RAREST_WEIGHT, FAR))[0]
    log_w = jnp.clip(log_w, RAREST_WEIGHT, FAR)
    good = part.completions.advantages >= 0
    k = jnp.where(good, how.vespo_k_pos, how.vespo_k_neg)
    rate = jnp.maximum(jnp.where(good, how.vespo_lambda_pos, how.vespo_lambda_neg), 1e-4)
    phi = jnp.exp(rate + k * log_w - rate * jnp.exp(log_w))
    weights = jax.lax.stop_gradient(phi)
    alive = (part.completions.weights != 0).astype(jnp.float32)
    metrics = {"vespo/phi_seq_mean": Total((weights * alive).sum(), alive.sum())}
    return -part.of(weights) * part.advantages * part.logps, metrics


TERMS = dict.fromkeys(CLIPPED, _clipped) | {"cispo": _cispo, "sapo": _sapo, "vespo": _vespo}


def _on_policy(part: _Part, threshold: Any) -> Bool[Array, "B T"]:
    """Where a completion is good or its sampler's mean divergence from the policy is small."""
    sampled = part.tokens.old if part.tokens.sampled is None else part.tokens.sampled
    if sampled is None:
        return jnp.ones_like(part.mask)
    gap = jnp.nan_to_num(_inside(part.mask, sampled - jax.lax.stop_gradient(part.logps)))
    value, count = part.sums(gap)
    near = value / jnp.maximum(count, 1) <= threshold
    good = part.completions.advantages >= 0
    return part.of((near | good).astype(jnp.float32)) > 0


def _drift(part: _Part, how: Loss) -> Float[Array, "B T"]:
    """Schulman's estimate of KL(policy | reference), exp(d) - d - 1, d = log p_reference / p."""
    reference = jnp.maximum(_inside(part.mask, part.tokens.reference), RAREST)
    d = reference - part.logps
    drift = jnp.exp(jnp.minimum(d, FAR)) - d - 1
    return drift * part.ratio(how) if how.use_bias_correction_kl else drift


def _mean(part: _Part, values: Float[Array, "B T"]) -> Total:
    return Total(_inside(part.mask, values).sum(), part.mask.sum().astype(jnp.float32))


def _total(part: _Part, term: Array, how: Loss, tokens_a_completion: Any) -> Total:
    """The sum and what it is divided by: completions, their tokens or their longest length."""
    rows = (part.completions.weights != 0).astype(jnp.float32).sum()
    value, count = part.sums(term)
    if how.loss_type in ("grpo", "sapo"):
        return Total((value / jnp.maximum(count, 1)).sum(), rows)
    if how.loss_type == "luspo":
        return Total(value.sum(), rows)
    if how.loss_type == "dr_grpo":
        return Total(value.sum(), rows * how.max_completion_length)
    if how.loss_type == "bnpo" or tokens_a_completion is None:
        return Total(value.sum(), count.sum())
    return Total(value.sum(), rows * tokens_a_completion)
