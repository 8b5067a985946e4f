"""How far written weights are from the model that was trained: KL(trained || written).

The files themselves are run: one layer, or some rows of the embeddings, are in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bridge import hf
from bridge import tokenizer as text
from bridge.places import Place, places
from bridge.source import Source
from unsloth_jax import decoder, tree
from unsloth_jax.dims import Params
from unsloth_jax.layers import row_mixers

if TYPE_CHECKING:
    from workflows.model import Model

TEXTS = (
    "The lighthouse keeper wrote the name of every ship in her book, and in the evening she asked "
    "the harbour master which of them had not come back. He counted them twice and shook his head.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values) if values else None\n\nprint(mean([1.5, 2.5, 3.5]))\n",
    "Question: which is larger, three quarters or 0.7? Answer: three quarters, because it is 0.75, "
    "and 0.75 is larger than 0.7. Question: which of 12, 21 and 102 is even? Answer: 12 and 102.",
    "To cook rice, wash it until the water is clear, add one and a half times as much water as "
    "rice, bring it to the boil, cover it, and leave it on a low heat for twelve minutes.",
)
LENGTH, PROMPT = 32, 16
ROWS = 8192  # of the head at a time
# Nats a token. SmolLM2-135M, trained in 4 bits, is 0.4 from itself merged into its 16-bit weights
# and 1.6 from itself without its adapter; larger models lose less to 4 bits.
FAR = 1.0


class Trained(NamedTuple):
    """Fixed tokens [B, T] and the trained model's float32 logits [B, T, V] for them."""

    tokens: np.ndarray
    logits: np.ndarray


class Divergence(NamedTuple):
    """Mean KL(trained || written) in nats a token, and where the likeliest token is the same."""

    kl: float
    same_token: float

    def facts(self) -> dict[str, float]:
        return {"kl_trained_to_written": self.kl, "likeliest_token_equal": self.same_token}


def trained(model: "Model") -> Trained:
    """Runs the model as it was trained: its base as it is in memory, adapters beside it.

    Tokens that the model has no embedding of are left out of the texts.
    """
    tokens = _tokens(model, TEXTS, LENGTH)
    return Trained(tokens, model(tokens))


def prompts(model: "Model") -> np.ndarray:
    """Fixed openings to continue, int32 [8, PROMPT]: both halves of each text."""
    halves = [(t[: len(t) // 2], t[len(t) // 2 :]) for t in TEXTS]
    return _tokens(model, [half for pair in halves for half in pair], PROMPT)


def _tokens(model: "Model", texts: Sequence[str], length: int) -> np.ndarray:
    known = lambda t: [i for i in text.ids(model.tokenizer, t) if i < model.config.vocab]
    return np.asarray([np.resize(known(t) or [0], length) for t in texts], np.int32)


def measured(reference: Trained, source: Source, dtype: Any) -> Divergence:
    """Compares the checkpoint `source`, computed in `dtype`. Raises ValueError if not finite."""
    found = logits(source, dtype, reference.tokens)
    kl, same = [], []
    for row, other in zip(reference.logits, found, strict=True):
        p, q = _log_softmax(row), _log_softmax(other)
        kl.append(np.sum(np.exp(p) * (p - q), axis=-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    mean = float(np.mean(kl))
    if not np.isfinite(mean):
        raise ValueError(
            f"KL(trained || written) is {mean}, not finite: the trained model or what was written "
            "gives scores that are no numbers"
        )
    return Divergence(mean, float(np.mean(same)))


def logits(source: Source, dtype: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of a checkpoint of which one tensor or layer at a time is read."""
    return np.concatenate(list(parts(source, dtype, tokens)), axis=-1)


def parts(
    source: Source, dtype: Any, tokens: np.ndarray, start: int = 0, noise: float = 0.0
) -> Iterator[np.ndarray]:
    """The same from token `start` on, some tokens of the vocabulary at a time.

    `noise` is drawn onto what each layer is given, as a share of its root mean square.
    """
    family, c = hf.described(source)
    paths = family.weights(c)
    read = lambda name: jnp.asarray(source.read(name), dtype)
    # The rows that occur, by new numbers: a whole table in `dtype` may be the largest array of all.
    some, numbers = np.unique(tokens, return_inverse=True)
    table = jnp.asarray(source.read(hf.EMBEDDING)[some], dtype)
    ids = jnp.asarray(numbers.reshape(tokens.shape))
    x = family.embed(c, tree.unflatten({hf.EMBEDDING: table}), ids)
    layers: dict[int, dict[str, Any]] = {}
    for name, place in places(family, c).items():
        if place.layer is not None:
            here = layers.setdefault(place.layer, {})
            here.setdefault(place.path.partition(".*.")[2], []).append((name, place))
    for i, kind in enumerate(family.kinds(c)):
        w = tree.unflatten({path: _read(read, found) for path, found in layers[i].items()})
        x = _shaken(x, noise, i) if noise else x
        # Waited for, else weights that are read ahead would pile up on the device.
        x = jax.block_until_ready(_layer(family, c, kind, w, x))
    head = hf.EMBEDDING if c.tied else hf.HEAD
    rest = {p: read(p) for p in paths if ".*." not in p and p not in (hf.EMBEDDING, hf.HEAD)}
    x, whole = family.norm(c, tree.unflatten(rest), x[:, start:]), source.read(head)
    for at in range(0, len(whole), ROWS):
        part = {head: jnp.asarray(whole[at : at + ROWS], dtype)}
        yield np.asarray(_scores(family, c, tree.unflatten(rest | part), x))


def _read(read: Callable[[str], Array], found: list[tuple[str, Place]]) -> Array:
    """One layer's part of a leaf, its experts stacked."""
    turned = [read(name).swapaxes(-1, -2) if p.swapped else read(name) for name, p in found]
    return turned[0] if found[0][1].expert is None else jnp.stack(turned)


def _shaken(x: Array, noise: float, seed: int) -> Array:
    size = noise * jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True))
    return x + size * jax.random.normal(jax.random.key(seed), x.shape, x.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(family: ModuleType, c: Any, kind: Any, w: Params, x: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    segments = jnp.ones_like(positions)
    by = family.angles(c, positions, decoder.document_lengths(segments))
    return family.block(c, kind, w, x, by, row_mixers(segments, positions))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _scores(family: ModuleType, c: Any, params: Params, x: Array) -> Array:
    return decoder.logits(family, c, params, x)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    """float64 log-probabilities along the last axis."""
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
