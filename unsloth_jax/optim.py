"""Optimizers and schedules by Hugging Face names, as optax transforms."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unsloth_jax import adam8, directions, following
from unsloth_jax.following import FOLLOWING, Plateau

Schedule = Callable[[jax.Array], jax.Array]  # step number, from 0 -> learning rate
Number = float | int


def linear(peak: Number, warmup: int, steps: int) -> Schedule:
    """Down to 0 at the end."""
    return _after_warmup(
        peak, warmup, lambda step: jnp.maximum(steps - step, 0) / max(1, steps - warmup)
    )


def cosine(peak: Number, warmup: int, steps: int, num_cycles: Number = 0.5) -> Schedule:
    """`num_cycles` waves of a cosine between peak and 0; past the end it goes on."""
    return _cosine(peak, warmup, steps, num_cycles, 0.0)


def cosine_with_restarts(peak: Number, warmup: int, steps: int, num_cycles: Number = 1) -> Schedule:
    """`num_cycles` half waves, each from peak down to 0; 0 past the end."""
    times, parts = Fraction(num_cycles).limit_denominator(1000).as_integer_ratio()
    whole = max(1, steps - warmup)

    def shape(step):
        done = step - warmup
        # In integers, so that a restart is not missed by a rounding.
        part = (times * done) % (parts * whole) / (parts * whole)
        return jnp.where(done >= whole, 0.0, jnp.cos(jnp.pi / 2 * part) ** 2)

    return _after_warmup(peak, warmup, shape)


def polynomial(
    peak: Number, warmup: int, steps: int, lr_end: Number = 1e-7, power: Number = 1.0
) -> Schedule:
    """(peak - lr_end) (1 - done)^power + lr_end. Raises ValueError for a peak not above lr_end."""
    if peak <= lr_end:
        raise ValueError(f"lr_end={lr_end} must be below the learning rate, which is {peak}")

    def shape(step):
        left = 1 - (step - warmup) / max(1, steps - warmup)
        left = jnp.where(step > steps, 0.0, left)
        return ((peak - lr_end) * left**power + lr_end) / peak

    return _after_warmup(peak, warmup, shape)


def constant(peak: Number, warmup: int, steps: int) -> Schedule:
    """The peak from the first step on, without a warm-up."""
    return lambda step: jnp.full(jnp.shape(step), peak, jnp.float32)


def constant_with_warmup(peak: Number, warmup: int, steps: int) -> Schedule:
    """The peak once it is reached."""
    return _after_warmup(peak, warmup, lambda step: jnp.ones(jnp.shape(step), jnp.float32))


def inverse_sqrt(
    peak: Number, warmup: int, steps: int, timescale: Number | None = None
) -> Schedule:
    """One over the root of steps past the warm-up in `timescale`s (the warm-up, else 10000)."""
    scale = warmup or 10_000 if timescale is None else timescale
    return _after_warmup(
        peak, warmup, lambda step: jax.lax.rsqrt(jnp.maximum(step - warmup, 0) / scale + 1)
    )


def cosine_with_min_lr(
    peak: Number,
    warmup: int,
    steps: int,
    num_cycles: Number = 0.5,
    min_lr: Number | None = None,
    min_lr_rate: Number | None = None,
) -> Schedule:
    """`cosine` between peak and min_lr, or min_lr_rate of the peak. ValueError if not just one."""
    return _cosine(peak, warmup, steps, num_cycles, _floor(peak, min_lr, min_lr_rate))


def cosine_warmup_with_min_lr(
    peak: Number,
    warmup: int,
    steps: int,
    num_cycles: Number = 0.5,
    min_lr: Number | None = None,
    min_lr_rate: Number | None = None,
    warmup_lr_rate: Number | None = None,
) -> Schedule:
    """`cosine_with_min_lr` a step ahead, whose warm-up starts at warmup_lr_rate of the peak."""
    floor, start = _floor(peak, min_lr, min_lr_rate), warmup_lr_rate

    def shape(step):
        rise = (step + 1) / max(1, warmup)
        if start is not None:
            rise = start + (1 - start) * step / max(1, warmup - 1)
        fall = _wave(num_cycles, (step - warmup + 1) / max(1, steps - warmup), floor)
        return jnp.where(step < warmup, rise, fall)

    return lambda step: peak * shape(step).astype(jnp.float32)


def warmup_stable_decay(
    peak: Number,
    warmup: int,
    steps: int,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: Number = 0.0,
    num_cycles: Number = 0.5,
) -> Schedule:
    """Up from min_lr_ratio of the peak, level, down to it again; stable steps fill what is left.

    Raises ValueError for an unknown type.
    """
    shapes = {  # of what is left of a ramp: 1 to 0
        "linear": lambda left: left,
        "1-sqrt": lambda left: left / (1 + jnp.sqrt(1 - left)),
    }
    rises = shapes | {"cosine": lambda left: jnp.sin(jnp.pi / 2 * left) ** 2}
    falls = shapes | {"cosine": lambda left: _wave(num_cycles, 1 - left, 0.0)}
    for key, value in {"warmup_type": warmup_type, "decay_type": decay_type}.items():
        if value not in rises:
            raise _unknown(key, value, rises)
    stable = steps - warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    above = lambda shape: jnp.maximum(shape * (1 - min_lr_ratio) + min_lr_ratio, 0.0)

    def rate(step):
        past = step - warmup - stable
        up = above(rises[warmup_type](jnp.clip(step / max(1, warmup), 0, 1)))
        down = above(falls[decay_type](jnp.clip(1 - past / max(1, num_decay_steps), 0, 1)))
        shape = jnp.where(past < num_decay_steps, down, min_lr_ratio)
        shape = jnp.where(past < 0, 1.0, shape)
        return peak * jnp.where(step < warmup, up, shape).astype(jnp.float32)

    return rate


def _after_warmup(peak: Number, warmup: int, shape: Callable[[jax.Array], jax.Array]) -> Schedule:
    def rate(step: jax.Array) -> jax.Array:
        return peak * jnp.where(step < warmup, step / max(1, warmup), shape(step))

    return rate


def _cosine(peak: Number, warmup: int, steps: int, cycles: Number, floor: Number) -> Schedule:
    done = lambda step: (step - warmup) / max(1, steps - warmup)
    return _after_warmup(peak, warmup, lambda step: _wave(cycles, done(step), floor))


def _wave(cycles: Number, done: jax.Array, floor: Number) -> jax.Array:
    """From 1 down to `floor` in half a cycle."""
    wave = jnp.cos(jnp.pi * cycles * done) ** 2
    return jnp.maximum(wave * (1 - floor) + floor, 0.0)


def _floor(peak: Number, lowest: Number | None, ratio: Number | None) -> Number:
    if (lowest is None) == (ratio is None):
        raise ValueError(
            f"give one of min_lr and min_lr_rate, got min_lr={lowest} and min_lr_rate={ratio}"
        )
    return lowest / peak if ratio is None else ratio


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f
    for f in (
        linear,
        cosine,
        cosine_with_restarts,
        polynomial,
        constant,
        constant_with_warmup,
        inverse_sqrt,
        cosine_with_min_lr,
        cosine_warmup_with_min_lr,
        warmup_stable_decay,
    )
}


def schedule(name: str, peak: Number, warmup: int, steps: int, /, **kwargs: Any) -> Schedule:
    """Learning rate of step n as transformers' `get_scheduler` gives it, float32.

    `warmup` and `steps` count optimizer steps; `kwargs` are `lr_scheduler_kwargs`. One that
    follows a metric is a `following.Plateau`, without warm-up. Raises ValueError for an unknown
    name or keyword, or one that is missing.
    """
    every = SCHEDULES | FOLLOWING
    if name not in every:
        raise _unknown("lr_scheduler_type", name, every)
    given = {"peak": peak}
    if name in SCHEDULES:
        given |= {"warmup": warmup, "steps": steps}
    _check(f"lr_scheduler_type {name!r}", every[name], (*given,), kwargs)
    return every[name](**given, **kwargs)


# name -> the direction that its steps take; paged and fused ones differ in where they compute.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw_torch": optax.scale_by_adam,
    "adamw_torch_fused": optax.scale_by_adam,
    "paged_adamw_32bit": optax.scale_by_adam,
    "adamw_8bit": adam8.scale_by_adam,
    "adamw_bnb_8bit": adam8.scale_by_adam,
    "paged_adamw_8bit": adam8.scale_by_adam,
    "adafactor": directions.adafactor,
    "sgd": directions.sgd,
    "lion": directions.lion,
    "lion_32bit": directions.lion,
    "paged_lion_32bit": directions.lion,
    "lion_8bit": directions.lion_8bit,
    "paged_lion_8bit": directions.lion_8bit,
    "muon": directions.muon,
}
# What may be set beside betas and eps: transformers' `optim_args`.
OPTIONS = {
    "sgd": ("momentum", "nesterov"),
    "muon": ("momentum", "nesterov", "adjust_lr_fn"),
}
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class Group(NamedTuple):
    """How the steps of one leaf differ: factors of the learning rate and of the weight decay."""

    rate: Number = 1.0
    decay: Number = 1.0


Groups = Callable[[str, int], Group]  # (a leaf's path, its axes without the stack's)


def by_path(
    *, loraplus: Number = 1.0, embedding: Number = 1.0, adapted_embedding: Number = 1.0
) -> Groups:
    """Parameter groups of transformers' Trainer: norms and biases do not decay.

    `loraplus` is the rate of `b` and of vectors over that of `a` (arXiv:2402.12354), as in
    PEFT's `create_loraplus_optimizer`. `embedding` is the factor of tables trained whole,
    `adapted_embedding` that of embed_tokens' adapters.
    """

    def group(path: str, axes: int) -> Group:
        *_, module, last = "", *path.split(".")
        decay = 0.0 if UNDECAYED.search(path.lower()) else 1.0
        if module in directions.TABLES and last == "weight":
            return Group(embedding, decay)
        if module == "embed_tokens" and last in ("a", "b"):
            return Group(adapted_embedding, decay)
        return Group(loraplus if last == "b" or axes == 1 else 1.0, decay)

    return group


def clip_by_norm(limit: float | int) -> optax.GradientTransformation:
    """Scales gradients whose global norm exceeds `limit`, as torch's `clip_grad_norm_` does."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decayed(weight_decay: Number, groups: Groups) -> optax.GradientTransformation:
    def one(path, update, param):
        return update + weight_decay * groups(path, directions.axes_of(path, param)).decay * param

    return optax.stateless(lambda updates, params: directions.map_paths(one, updates, params))


def _scaled(groups: Groups) -> optax.GradientTransformation:
    def one(path, update):
        return update * groups(path, directions.axes_of(path, update)).rate

    return optax.stateless(lambda updates, params: directions.map_paths(one, updates))


def make(
    name: str,
    rate: Schedule,
    *,
    weight_decay: Number = 0.0,
    max_grad_norm: Number = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    options: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
) -> optax.GradientTransformation:
    """Clipping (0 for none), then steps against direction + weight_decay * weights.

    So AdamW (arXiv:1711.05101) and all others decay; sgd's decay enters its momentum, as torch's
    does. Betas and eps go to AdamW, and the betas to Lion. `groups` is `by_path()` unless given.
    Raises ValueError for an unknown name or option.
    """
    if name not in OPTIMIZERS:
        raise _unknown("optim", name, OPTIMIZERS)
    options = dict(options or {})
    for key in options:
        if key not in OPTIONS.get(name, ()):
            raise _unknown(f"optim {name!r}: option", key, OPTIONS.get(name, ()))
    groups = groups or by_path()
    direction = OPTIMIZERS[name](b1=b1, b2=b2, eps=eps, **options)
    decay = _decayed(weight_decay, groups)
    first = (decay, direction) if name == "sgd" else (direction, decay)
    follows = isinstance(rate, Plateau)
    scaled = following.scale(rate.peak) if follows else optax.scale_by_learning_rate(rate)
    steps = optax.chain(*first, scaled, _scaled(groups))
    return optax.chain(clip_by_norm(max_grad_norm), steps) if max_grad_norm else steps


def _unknown(what: str, got: str, known: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(str(got), known, 3)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    return ValueError(f"{what} {got!r} is not supported; {hint}supported: {sorted(known)}")


def _check(what: str, make: Callable, given: tuple[str, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError unless `kwargs` are what `make` takes beside `given`."""
    own = {n: p for n, p in inspect.signature(make).parameters.items() if n not in given}
    for key in kwargs:
        if key not in own:
            raise _unknown(f"{what}: option", key, own)
    missing = [n for n, p in own.items() if p.default is p.empty and n not in kwargs]
    if missing:
        raise ValueError(f"{what} needs {missing}; it takes {sorted(own)}")
