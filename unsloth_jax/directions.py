"""What optimizers make of a gradient before decay and learning rate, as optax transforms.

A leaf's path tells its stack axes: every `*` stands for one. Along them each slice is a parameter
of its own, as it is where layers are separate modules.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pallas_kernels import adam8_update
from pallas_kernels.adam8_update import BLOCK, SIGNED, Moment
from unsloth_jax.adam8 import SMALLEST

# Newton-Schulz: five rounds of a x + (b (x x') + c (x x')^2) x take singular values to about 1.
NEWTON_SCHULZ, ROUNDS = (3.4445, -4.7750, 2.0315), 5
TABLES = {"embed_tokens", "lm_head"}  # matrices that Muon leaves to AdamW


class SecondMoment(NamedTuple):
    """Adafactor's state: float32 means of squared gradients, or `Factors` of them, by leaf."""

    count: Any  # int32 []
    nu: Any


class Factors(NamedTuple):
    """Means of a matrix's squared gradients over its columns and over its rows."""

    rows: Any  # float32 [..., O]
    columns: Any  # float32 [..., I]


class Momentum(NamedTuple):
    """One moment by leaf: float32, or 8 bits."""

    mu: Any


def path_of(keys: tuple) -> str:
    """`model.layers.*.mlp.up_proj.a` of a leaf's key path; only the dicts' keys count."""
    return ".".join(str(k.key) for k in keys if isinstance(k, jax.tree_util.DictKey))


def axes_of(path: str, leaf: Any) -> int:
    """A leaf's axes without those it is stacked along."""
    return leaf.ndim - path.count("*")


def map_paths(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(path, leaf, *leaves)` in a tree of the same shape."""
    return jax.tree_util.tree_map_with_path(lambda keys, *x: fn(path_of(keys), *x), tree, *rest)


def _map_pairs(fn: Callable[..., tuple], grads: Any, *rest: Any) -> tuple:
    """Two trees from `fn(path, grad, *leaves)`, which returns a pair."""
    keyed, shape = jax.tree_util.tree_flatten_with_path(grads)
    leaves = (shape.flatten_up_to(r) for r in rest)
    done = [fn(path_of(k), g, *x) for (k, g), *x in zip(keyed, *leaves, strict=True)]
    return tuple(shape.unflatten([pair[i] for pair in done]) for i in range(2))


def sgd(
    b1: float, b2: float, eps: float, momentum: float | int = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """torch's SGD without damping; no state without momentum. The betas are not its own."""
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def lion(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675): the sign of a mean; `eps` is not its own."""
    return optax.scale_by_lion(b1, b2)


def lion_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Lion with its moment in 8 bits where a leaf has 4096 elements, as bitsandbytes keeps it."""

    def update(grads, state, params=None):
        def one(path, grad, mu):
            g = jnp.asarray(grad, jnp.float32)
            m = adam8_update.dequantize(mu, SIGNED) if isinstance(mu, Moment) else mu
            new = b2 * m + (1 - b2) * g
            kept = adam8_update.quantize(new, SIGNED) if isinstance(mu, Moment) else new
            return jnp.sign(b1 * m + (1 - b1) * g).astype(grad.dtype), kept

        updates, mu = _map_pairs(one, grads, state.mu)
        return updates, Momentum(mu)

    zeros = lambda params: Momentum(jax.tree.map(_no_moment, params))
    return optax.GradientTransformation(zeros, update)


def _no_moment(leaf: Any) -> Any:
    if leaf.size < SMALLEST:
        return jnp.zeros(leaf.shape, jnp.float32)
    return Moment(jnp.zeros(leaf.shape, jnp.uint8), jnp.zeros(-(-leaf.size // BLOCK), jnp.float32))


def adafactor(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) with a given rate: no relative step, no scale of the weights.

    What transformers' Trainer makes of "adafactor"; the betas and `eps` are not its own. Matrices
    keep their squared gradients' means by row and by column. Updates' RMS is at most 1.
    """

    def init(params):
        def one(path, p):
            if axes_of(path, p) < 2:
                return jnp.zeros(p.shape, jnp.float32)
            shapes = p.shape[:-1], (*p.shape[:-2], p.shape[-1])
            return Factors(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

        return SecondMoment(jnp.zeros((), jnp.int32), map_paths(one, params))

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        new = count.astype(jnp.float32) ** -0.8

        def one(path, grad, nu):
            g = jnp.asarray(grad, jnp.float32)
            out, nu = _by_second_moment(g, nu, new)
            own = tuple(range(path.count("*"), g.ndim))
            rms = jnp.sqrt(jnp.mean(out * out, axis=own, keepdims=True))
            return (out / jnp.maximum(rms, 1.0)).astype(grad.dtype), nu

        updates, nu = _map_pairs(one, grads, state.nu)
        return updates, SecondMoment(count, nu)

    return optax.GradientTransformation(init, update)


def _by_second_moment(g: Array, nu: Any, new: Array) -> tuple[Array, Any]:
    """(g over the root of its squares' running mean, that mean); `new` is the newest's share."""
    square = g * g + 1e-30
    running = lambda old, x: (1 - new) * old + new * x
    if not isinstance(nu, Factors):
        nu = running(nu, square)
        return g * jax.lax.rsqrt(nu), nu
    nu = Factors(running(nu.rows, square.mean(-1)), running(nu.columns, square.mean(-2)))
    by_row = jax.lax.rsqrt(nu.rows / nu.rows.mean(-1, keepdims=True))
    return g * by_row[..., None] * jax.lax.rsqrt(nu.columns)[..., None, :], nu


def muon(
    b1: float,
    b2: float,
    eps: float,
    momentum: float | int = 0.95,
    nesterov: bool = True,
    adjust_lr_fn: str = "original",
) -> optax.GradientTransformation:
    """torch's Muon (arXiv:2502.16982) for matrices; AdamW's direction for everything else.

    Embedding tables and heads count as everything else. `adjust_lr_fn` is torch's: "original" or
    "match_rms_adamw", with which a rate for AdamW serves. Raises ValueError for another one.
    """
    known = {
        "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    }
    if adjust_lr_fn not in known:
        raise ValueError(f"adjust_lr_fn {adjust_lr_fn!r} is not supported; supported: {[*known]}")

    def update(grads, state, params=None):
        def one(path, grad, mu):
            g = jnp.asarray(grad, jnp.float32)
            mu = momentum * mu + (1 - momentum) * g
            out = orthogonal((1 - momentum) * g + momentum * mu if nesterov else mu)
            return (out * known[adjust_lr_fn](*g.shape[-2:])).astype(grad.dtype), mu

        updates, mu = _map_pairs(one, grads, state.mu)
        return updates, Momentum(mu)

    zeros = lambda params: Momentum(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def kind(path, leaf):
        matrix = axes_of(path, leaf) == 2 and not TABLES & set(path.split("."))
        return "muon" if matrix else "adamw"

    kinds = {
        "muon": optax.GradientTransformation(zeros, update),
        "adamw": optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    }
    return optax.partition(kinds, lambda tree: map_paths(kind, tree))


def orthogonal(x: Float[Array, "*stack O I"]) -> Float[Array, "*stack O I"]:
    """About u v' of each matrix u s v', by Newton-Schulz, rounded to bfloat16 as torch's Muon."""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    turn = lambda x: x if wide else x.swapaxes(-1, -2)
    # A cast there and back is left out by XLA, a reduced precision is not.
    rounded = lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    narrow = lambda x: x.astype(jnp.bfloat16)  # exact, of what is rounded
    product = lambda x, y: jnp.matmul(narrow(x), narrow(y), preferred_element_type=jnp.float32)
    y = rounded(turn(x))
    norm = rounded(jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True)))
    y = rounded(y / jnp.maximum(norm, 1e-7))
    for _ in range(ROUNDS):
        gram = rounded(product(y, y.swapaxes(-1, -2)))
        step = rounded(b * gram + c * product(gram, gram))
        y = rounded(a * y + product(step, y))
    return turn(y)
