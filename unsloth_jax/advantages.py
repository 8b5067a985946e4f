"""Rewards of groups of completions to advantages, on the host, in float64.

TRL 1.16's rules but for one: a group whose rewards are equal has advantages of exactly 0.
"""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
SMALL = 1e-4  # beside a deviation that divides
EQUAL = 1e-8  # rewards as far apart as this are equal


class Advantages(NamedTuple):
    """What a batch of completions is worth."""

    values: Float[np.ndarray, " N"]  # float32
    rewards: Float[np.ndarray, " N"]  # weighted sums; NaN where no function gave a reward
    flat: Bool[np.ndarray, " G"]  # groups whose rewards don't differ


def advantages(
    rewards: Float[np.ndarray, "N F"],
    weights: np.ndarray,
    num_generations: int,
    valid: np.ndarray | None = None,
    *,
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> Advantages:
    """Rewards less their group's mean, over its deviation (ddof 1) or the batch's, or undivided.

    A prompt's `num_generations` completions stand together; `weights` [F] are the functions' and
    `valid` [N] says which completions count. NaN is a reward that was not given: the others count;
    where none was given, or `valid` is false, a completion has advantage 0 and no part in means
    and deviations. "normalize_then_sum" (arXiv:2601.05242) divides each function's rewards first
    and their sum by the batch's deviation.
    Raises ValueError for unknown names, infinite rewards and sizes that don't fit.
    """
    _check(rewards, weights, num_generations, valid, scale_rewards, multi_objective_aggregation)
    given = rewards.astype(np.float64)
    if valid is not None:
        given = np.where(valid[:, None], given, np.nan)
    total = _sum(given, weights)
    groups = total.reshape(-1, num_generations)
    flat = _flat(groups)
    if multi_objective_aggregation == "normalize_then_sum":
        each = given.reshape(-1, num_generations, rewards.shape[1])
        deviation = np.where(_flat(each, 1)[:, None], np.inf, _std(each, 1) + SMALL)
        parts = (each - _mean(each, 1)) / deviation
        mixed = _sum(np.where(np.isnan(given), np.nan, parts.reshape(given.shape)), weights)
        # Several functions may differ where their sum does not.
        flat = _flat(mixed.reshape(-1, num_generations)) & flat
        values = (mixed - _mean(mixed, 0)) / (_std(mixed, 0) + SMALL)
    else:
        values = (groups - _mean(groups, 1)).reshape(-1)
        if scale_rewards == "batch":
            values = values / (_std(total, 0) + SMALL)
        elif scale_rewards == "group":
            values = values / (np.repeat(_std(groups, 1), num_generations) + SMALL)
        values = np.where(np.repeat(flat, num_generations), 0.0, values)
    return Advantages(np.nan_to_num(values, nan=0.0).astype(np.float32), total, flat)


def _check(rewards, weights, num_generations, valid, scale, aggregation):
    for name, given, known in (
        ("scale_rewards", scale, SCALES),
        ("multi_objective_aggregation", aggregation, AGGREGATIONS),
    ):
        if given not in known:
            raise ValueError(f"{name}={given!r}, expected one of {list(known)}")
    rows, functions = rewards.shape
    if num_generations < 1 or rows % num_generations:
        raise ValueError(f"{rows} completions are no whole groups of {num_generations}")
    if weights.shape != (functions,):
        raise ValueError(f"{weights.size} weights for {functions} reward functions")
    if valid is not None and valid.shape != (rows,):
        raise ValueError(f"valid has shape {valid.shape}, expected ({rows},)")
    if np.isinf(rewards).any():
        row, function = np.argwhere(np.isinf(rewards))[0]
        raise ValueError(f"reward {function} of completion {row} is {rewards[row, function]}")


def _sum(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[N]: the weighted sum of what was given, NaN where nothing was."""
    total = np.nansum(rewards * weights, axis=1)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, total)


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(x, axis=axis, keepdims=True)


def _std(x: np.ndarray, axis: int) -> np.ndarray:
    """Along an axis, of n - 1, which stays; 0 where fewer than two are given."""
    count = (~np.isnan(x)).sum(axis, keepdims=True)
    squares = np.nansum((x - _mean(x, axis)) ** 2, axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1))


def _flat(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Where all that was given along the axis is equal."""
    least = np.min(np.where(np.isnan(x), np.inf, x), axis=axis)
    most = np.max(np.where(np.isnan(x), -np.inf, x), axis=axis)
    return most - least <= EQUAL * np.maximum(1, np.abs(least))
