"""Learning rates that follow a metric: an evaluation changes them, not the number of the step.

As torch 2.13's `ReduceLROnPlateau` and transformers 5's `GreedyLR` (arXiv:2512.14527), of one rate:
groups keep their ratios to it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

Number = float | int
MODES, THRESHOLDS = ("min", "max"), ("rel", "abs")


@dataclass
class Plateau:
    """From `peak` down by `factor` once more than `patience` metrics in a row are no better.

    `rate` is what the next step takes. Raises ValueError for settings that mean nothing.
    """

    peak: Number
    mode: str = "min"
    factor: Number = 0.1
    patience: Number = 10
    threshold: Number = 1e-4
    threshold_mode: str = "rel"
    cooldown: Number = 0
    min_lr: Any = 0.0  # torch and transformers also take a list, refused here
    eps: Number = 1e-8

    rate: float = field(init=False)
    best: float = field(init=False)
    bad: int = field(init=False, default=0)  # metrics in a row that were no better
    resting: int = field(init=False, default=0)  # metrics to come that count nothing

    def __post_init__(self) -> None:
        _check(self)
        self.rate, self.best = float(self.peak), self._worst

    def __call__(self, step: jax.Array | int) -> np.ndarray:
        """The rate, whatever the step."""
        return np.asarray(self.rate, np.float32)

    def see(self, metric: float) -> None:
        """Counts a metric; the rate may be another one after it."""
        better = self._better(metric)
        self.best, self.bad = (metric, 0) if better else (self.best, self.bad + 1)
        if self.resting:
            self.resting, self.bad = self.resting - 1, 0
        if self.bad > self.patience:
            self._move(max(self.rate * self.factor, self.min_lr), down=True)
            self.resting, self.bad = self.cooldown, 0

    def state(self) -> dict[str, Any]:
        """What `see` changes, as JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if not f.init}
        return own | {"best": self.best if math.isfinite(self.best) else None}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave."""
        for name, value in state.items():
            setattr(self, name, self._worst if name == "best" and value is None else value)

    @property
    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def _better(self, metric: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        by = sign * self.threshold
        limit = self.best * (1 + by) if self.threshold_mode == "rel" else self.best + by
        return sign * metric > sign * limit

    def _move(self, rate: float, *, down: bool) -> None:
        if (self.rate - rate if down else rate - self.rate) > self.eps:
            self.rate = rate


@dataclass
class Greedy(Plateau):
    """Also up, by 1 / `factor`, once more than `patience` metrics in a row are better.

    After `reset_start` turns down that leave the rate at `min_lr` it begins again. `smooth` takes
    the mean of the last `window_size` metrics.
    """

    factor: Number = 0.95
    threshold: Number = 1e-6
    threshold_mode: str = "abs"
    min_lr: Any = 1e-3
    warmup: Number = 0
    max_lr: Any = 1.0
    smooth: bool = False
    window_size: Number = 50
    reset_start: Number = 500

    good: int = field(init=False, default=0)  # metrics in a row that were better
    left: Number = field(init=False)  # turns at min_lr before it begins again
    window: list[float] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.left, self.window = self.reset_start, []

    def see(self, metric: float) -> None:
        """Counts a metric; the rate may be another one after it."""
        if self.smooth:
            self.window = [*self.window, metric][-int(self.window_size) :]
            metric = sum(self.window) / len(self.window)
        if self.resting:
            self.resting, self.bad, self.good = self.resting - 1, 0, 0
            return
        better = self._better(metric)
        self.best = metric if better else self.best
        self.good, self.bad = (self.good + 1, 0) if better else (0, self.bad + 1)
        if self.good > self.patience:
            self._move(min(self.rate / self.factor, self.max_lr), down=False)
            self.resting, self.good, self.left = self.warmup, 0, self.reset_start
        elif self.bad > self.patience:
            self._move(max(self.rate * self.factor, self.min_lr), down=True)
            self._count_lowest()
            self.resting, self.bad = self.cooldown, 0

    def _count_lowest(self) -> None:
        if self.rate > self.min_lr:
            return
        self.left -= 1
        if self.left <= 0:
            self.__post_init__()
            self.good = 0


FOLLOWING: dict[str, type[Plateau]] = {"reduce_lr_on_plateau": Plateau, "greedy": Greedy}


class Held(NamedTuple):
    """The rate of the steps to come, in an optimizer's state: a step compiled once takes any."""

    rate: Float[Array, ""]


def scale(peak: Number) -> optax.GradientTransformation:
    """As `optax.scale_by_learning_rate`, by the rate that the state holds; `peak` at first."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: -state.rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformation(lambda params: Held(jnp.float32(peak)), update)


def held(opt: Any, rate: float) -> Any:
    """An optimizer's state with another rate in it."""
    ours = lambda node: isinstance(node, Held)
    new = Held(jnp.asarray(rate, jnp.float32))
    return jax.tree.map(lambda node: new if ours(node) else node, opt, is_leaf=ours)


def _check(s: Plateau) -> None:
    where = next(name for name, kind in FOLLOWING.items() if type(s) is kind)
    for name, known in {"mode": MODES, "threshold_mode": THRESHOLDS}.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{where}: {name}={getattr(s, name)!r}; expected one of {known}")
    for f in fields(s):
        value = getattr(s, f.name) if f.init else 0
        numeric = f.type in (Number, Any)
        if numeric and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{where}: {f.name}={value!r}; expected one number")
    if not 0 < s.factor < 1:
        raise ValueError(f"{where}: factor={s.factor}; expected a number above 0 and below 1")
