"""Loss functions: per-token log-probabilities in, undivided sums out."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pallas_kernels import cross_entropy
from unsloth_jax import leaves
from unsloth_jax.dims import PLAIN, Params, Scores, Total

CHUNK = cross_entropy.CHUNK


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Params,
    targets: Int[Array, "B T"],
    chunk: int = CHUNK,
    weights: Float[Array, "B T"] | None = None,
    smoothing: float | int = 0.0,
    scores: Scores = PLAIN,
) -> Float[Array, "B T"]:
    """log p(target) of each token, float32, never holding more than `chunk` rows of scores.

    Tokens of weight 0 may be left out; then they hold 0. The gradient reaches the hidden states
    and the head alike. `smoothing` is the share of the mean log-probability over the vocabulary,
    so that `sft` of what returns is transformers' `LabelSmoother`; `scores` is the family's.
    """
    return _found(hidden, head, targets, chunk, weights, smoothing, scores, False)[0]


def token_logprobs_and_entropies(
    hidden: Float[Array, "B T D"],
    head: Params,
    targets: Int[Array, "B T"],
    chunk: int = CHUNK,
    weights: Float[Array, "B T"] | None = None,
    scores: Scores = PLAIN,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs`, and each token's entropy in nats, which has no gradient."""
    return _found(hidden, head, targets, chunk, weights, 0.0, scores, True)


def _found(hidden, head, targets, chunk, weights, smoothing, scores, entropy):
    batch, length, width = hidden.shape
    x, y = hidden.reshape(-1, width), targets.reshape(-1)
    if isinstance(head["weight"], jax.Array) and "bias" not in head:
        wanted = None if weights is None else weights.reshape(-1) != 0
        rule = cross_entropy.Rule(chunk, *scores, entropy=entropy, smoothing=smoothing)
        found = tuple(cross_entropy.token_logprobs(x, head["weight"], y, wanted, rule))
    else:
        found = _recomputed(x, head, y, chunk, smoothing, scores, entropy)
    return tuple(one if one is None else one.reshape(batch, length) for one in found)


def _recomputed(
    x: Array, head: Params, y: Array, chunk: int, smoothing: float | int, how: Scores, entropy: bool
) -> tuple[Array, Array | None]:
    """`_found` [N] under a head of any kind, by computing each chunk again backward."""
    rows = x.shape[0]
    chunk = min(chunk, rows)
    pad = -rows % chunk

    @jax.checkpoint
    def one(head: Any, x: Array, y: Array) -> tuple[Array, Array]:
        scores = leaves.scores(head, x, how)
        picked = jnp.take_along_axis(scores, y[:, None], axis=-1)[:, 0]
        picked = (1 - smoothing) * picked + smoothing * scores.mean(-1)
        whole = jax.nn.logsumexp(scores, axis=-1)
        return picked - whole, (_entropies(scores, whole) if entropy else whole)

    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, chunk, x.shape[1])
    y = jnp.pad(y, (0, pad)).reshape(-1, chunk)
    numbers = jnp.arange(len(x)) if leaves.draws(head) else None
    part = lambda n, x, y: one(leaves.folded(head, n), x, y)
    logps, more = jax.lax.map(lambda xs: part(*xs), (numbers, x, y))
    return logps.reshape(-1)[:rows], more.reshape(-1)[:rows] if entropy else None


def _entropies(scores: Array, whole: Array) -> Array:
    """Entropies [N] of scores whose logsumexp is `whole`."""
    scores = jax.lax.stop_gradient(scores)
    return jax.lax.stop_gradient(whole) - (jax.nn.softmax(scores, axis=-1) * scores).sum(-1)


def sft(logps: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Total:
    """Cross entropy in nats, summed over the tokens with weight."""
    return Total(-(logps * weights).sum(), weights.sum())


def dft(logps: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Total:
    """Dynamic fine-tuning (arXiv:2508.05629): each token's cross entropy times its probability.

    The probability has no gradient. TRL's `loss_type="dft"`.
    """
    chance = jax.lax.stop_gradient(jnp.exp(logps))
    return Total(-(chance * logps * weights).sum(), weights.sum())


def neftune(
    key: Key[Array, ""],
    embedded: Float[Array, "B T D"],
    alpha: float | int,
    lengths: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Embeddings with noise from U(-1, 1) alpha / sqrt(length D) (arXiv:2310.05914).

    `lengths` are those of the tokens' documents, so that noise in a packed row is what it is in
    a row of one's own; without them T is every token's length, as in transformers.
    """
    *_, length, width = embedded.shape
    noise = jax.random.uniform(key, embedded.shape, jnp.float32, -1, 1)
    lengths = jnp.full((1, 1), length) if lengths is None else lengths
    size = alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1) * jnp.float32(width))
    return embedded + (noise * size[..., None]).astype(embedded.dtype)


def balance(chances: Float[Array, " E"], sent: Float[Array, " E"], rows: Float[Array, ""]) -> Total:
    """Switch's loss of uneven experts (arXiv:2101.03961 4-6), E sum_e sent_e mean(chances)_e.

    `chances` are sums over `rows`, which are tokens times layers; `sent` is how many of a whole
    step's went to each expert, a row. Where experts are used evenly its mean is the number of
    experts of a token.
    """
    return Total(chances.shape[0] * (jax.lax.stop_gradient(sent) * chances).sum(), rows)
