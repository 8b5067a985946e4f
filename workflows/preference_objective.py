"""What preference trainers lower: losses of whole answers, chosen rows before rejected ones."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from unsloth_jax import losses, preference, remat
from unsloth_jax.dims import Batch, Measured, Params, Total
from unsloth_jax.preference import Answers
from workflows.objective import Objective
from workflows.pair_batches import between
from workflows.reference import Reference, token_logps, whole_answers

SFT = "sft"  # DPO's loss type that is the chosen answers' cross entropy, as in TRL


def dpo(
    reference: Reference | None,
    weighted: Sequence[tuple[str, float]],
    beta: float | int,
    smoothing: float | int,
) -> Objective:
    """The sum of DPO's losses, each (type, weight); without a reference every answer is as likely.

    "sft" is the chosen answers' mean cross entropy a token.
    """

    def one(name: str, sides: Sequence[Answers], weights: Array, nll: Total, b: Batch) -> tuple:
        if name == SFT:
            mean = nll.value / b.beside["tokens_a_pair"]
            return Total(mean, weights.sum()), {"nll_loss": _still(nll)}
        how = dict(beta=beta, label_smoothing=smoothing if name in preference.SMOOTHED else 0.0)
        return preference.dpo(*sides, weights, loss_type=name, **how)

    def value(logps: Array, b: Batch) -> Measured:
        sides, weights = _sides(logps, b), _pairs(b)
        count = weights.shape[0]
        nll = losses.sft(logps[:count], b.weights[:count])
        parts = [(w, *one(name, sides, weights, nll, b)) for name, w in weighted]
        total = Total(sum(w * total.value for w, total, _ in parts), weights.sum())
        # What answers are worth is the same under every type.
        metrics = preference.dpo(*sides, weights, beta=beta)[1]
        return Measured(total, metrics | {k: x for _, _, m in parts for k, x in m.items()})

    settings = dict(weighted=weighted, beta=beta, smoothing=smoothing, free=reference is None)
    return _of_pairs("dpo", settings, value, reference=reference, referred=True)


def orpo(beta: float | int) -> Objective:
    """ORPO's loss, whose cross entropy counts the chosen rows' prompts too, as in TRL."""

    def value(logps: Array, b: Batch) -> Measured:
        sides, weights = _sides(logps, b), _pairs(b)
        count = weights.shape[0]
        nll = losses.sft(logps[:count], _there(b)[:count])
        return Measured(
            *preference.orpo(*sides, weights, nll, b.beside["tokens_a_pair"], beta=beta)
        )

    return _of_pairs("orpo", dict(beta=beta), value, prompts=True)


def cpo(settings: Mapping[str, Any]) -> Objective:
    """CPO's losses, SimPO's among them; `settings` are the keywords of `preference.cpo`."""

    def value(logps: Array, b: Batch) -> Measured:
        sides, weights = _sides(logps, b), _pairs(b)
        count = weights.shape[0]
        nll = losses.sft(logps[:count], b.weights[:count])
        tokens = b.beside["tokens_a_pair"]
        return Measured(*preference.cpo(*sides, weights, nll, tokens, **settings))

    return _of_pairs("cpo", settings, value)


def kto(reference: Reference, settings: Mapping[str, Any]) -> Objective:
    """KTO's losses; `settings` are the keywords of `preference.kto`.

    The second half of a batch's rows, which "kto" has, are prompts with answers of others.
    """
    turned = settings["loss_type"] == "kto"

    def statistics(family, c, scale, memory=remat.PLAIN, documents=1):
        tokens = token_logps(family, c, scale, memory, documents)

        def fn(adapters: Params, frozen: Params, b: Batch) -> dict[str, Total]:
            rows = b.tokens.shape[0]
            other = between(b, rows // 2, rows)
            found = _answers(tokens(adapters, frozen, other, other.weights), other)
            found = found._replace(reference=b.beside["reference"][rows // 2 :])
            return preference.kto_statistics(found, _real(other))

        return fn

    def loss(family, c, scale, memory=remat.PLAIN, documents=1):
        tokens = token_logps(family, c, scale, memory, documents)

        def fn(adapters: Params, frozen: Params, b: Batch) -> Measured:
            rows = b.tokens.shape[0] // (2 if turned else 1)
            own = between(b, 0, rows)
            found = _answers(tokens(adapters, frozen, own, own.weights), own)
            found = found._replace(reference=b.beside["reference"][:rows])
            kl = b.beside["kl"] if turned else jnp.zeros(())
            desirable = b.beside["desirable"]
            return Measured(*preference.kto(found, desirable, _real(own), kl, **settings))

        return fn

    def beside(accumulation: int, rows: int) -> dict[str, Any]:
        items = rows // 2 if turned else rows
        return {
            "reference": jax.ShapeDtypeStruct((accumulation, rows), jnp.float32),
            "desirable": jax.ShapeDtypeStruct((accumulation, items), jnp.bool_),
        }

    compared = lambda batch: _with(batch, reference=reference(batch))
    return Objective(
        f"kto/1 {json.dumps(dict(settings))}", loss, lambda step, batch: compared(batch),
        perplexity=False, compared=compared, statistics=statistics if turned else None,
        beside=beside, counts="answers",
    )  # fmt: skip


def _of_pairs(
    name: str,
    settings: Mapping[str, Any],
    value: Callable[[Array, Batch], Measured],
    *,
    reference: Reference | None = None,
    referred: bool = False,
    prompts: bool = False,
) -> Objective:
    """The objective of `value(log-probabilities of targets [B, T], batch)`; prompts' tokens of
    chosen rows have theirs where `prompts` says so.
    """

    def loss(family, c, scale, memory=remat.PLAIN, documents=1):
        tokens = token_logps(family, c, scale, memory, documents)

        def fn(adapters: Params, frozen: Params, b: Batch) -> Measured:
            return value(tokens(adapters, frozen, b, _there(b) if prompts else b.weights), b)

        return fn

    def compared(batch: Batch) -> Batch:
        found = {"tokens_a_pair": tokens_a_pair(batch, prompts)}
        if referred and "reference" not in (batch.beside or {}):
            none = np.zeros(batch.tokens.shape[:2], np.float32)
            found["reference"] = none if reference is None else reference(batch)
        return _with(batch, **found)

    def beside(accumulation: int, rows: int) -> dict[str, Any]:
        shapes = {"tokens_a_pair": (accumulation,)}
        if referred:
            shapes["reference"] = (accumulation, rows)
        return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}

    return Objective(
        f"{name}/1 {json.dumps(dict(settings))}", loss, lambda step, batch: compared(batch),
        perplexity=False, compared=compared, beside=beside, counts="pairs",
    )  # fmt: skip


def tokens_a_pair(batch: Batch, prompts: bool) -> np.ndarray:
    """The chosen rows' tokens a pair over all micro-batches, the same number [M] for each."""
    count = batch.tokens.shape[1] // 2
    weights = np.asarray(batch.weights)[:, :count]
    pairs = (weights.sum(-1) > 0).sum()
    counted = np.asarray(batch.segments)[:, :count, 1:] > 0 if prompts else weights
    return np.full(len(weights), counted.sum() / pairs, np.float32)


def _with(batch: Batch, **found: Any) -> Batch:
    return batch._replace(beside=(batch.beside or {}) | found)


def _answers(logps: Array, b: Batch) -> Answers:
    return Answers(*whole_answers(logps, b.weights))


def _sides(logps: Array, b: Batch) -> tuple[Answers, Answers]:
    """Chosen and rejected answers, with the reference's log-probabilities where there are any."""
    every, count = _answers(logps, b), logps.shape[0] // 2
    if "reference" in b.beside:
        every = every._replace(reference=b.beside["reference"])
    cut = lambda rows: jax.tree.map(lambda x: x[rows], every)
    return cut(slice(0, count)), cut(slice(count, None))


def _real(b: Batch) -> Array:
    """1 for rows with an answer."""
    return (b.weights.sum(-1) > 0).astype(jnp.float32)


def _pairs(b: Batch) -> Array:
    """1 for pairs, 0 for the empty ones that fill a step."""
    return _real(b)[: b.tokens.shape[0] // 2]


def _there(b: Batch) -> Array:
    """1 where a token of the row follows."""
    return jnp.pad((b.segments[:, 1:] > 0).astype(jnp.float32), ((0, 0), (0, 1)))


def _still(total: Total) -> Total:
    return jax.tree.map(jax.lax.stop_gradient, total)
