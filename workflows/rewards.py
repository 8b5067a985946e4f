"""Reward functions: plain Python functions that score completions, with TRL 1.16's contract.

A function is called with keywords: `prompts`, `completions`, `completion_ids`, `trainer_state`,
`log_extra(column, values)`, `log_metric(name, value)` and each column of the data, all repeated to
one entry a completion, and returns one number a completion, or None where it has none to give.
`async def` works too. Beyond TRL: a function without `**kwargs` gets only the keywords that it
names; functions run at the same time, each in a thread of its own (async ones in one event loop),
under a time limit. Stricter than TRL: a NaN or infinite number is an error, not a missing reward.
"""

import asyncio
import inspect
import itertools
import math
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from workflows.keywords import say
from workflows.reward_calls import (
    NOT_PASSED,
    OWN,
    Batch,
    Call,
    Logs,
    asked,
    batch_of,
    cut,
    forever,
    is_async,
)


class RewardError(RuntimeError):
    """A reward function raised; says which, at which row, for which completion."""


class Scores(NamedTuple):
    """What the functions gave for a batch of completions."""

    rewards: np.ndarray  # float64 [N, F]; NaN where a function gave None
    metrics: dict[str, float]  # rewards/<name>/mean and /std (ddof 1), of what was given
    logged: dict[str, list[float]]  # by log_metric
    extra: dict[str, list]  # columns of N values by log_extra
    unscored: int  # completions that no function gave a reward


class Rewards:
    """The reward functions of a run; `score` calls them, `close` ends their event loop.

    `timeout` is in seconds for one batch of completions, None for no limit. With `brought`, the
    name of what rollouts may bring, there is one more column of that name, and functions may lack.
    Raises at once: TypeError for what is no function or has no name, ValueError for none at all,
    for two of one name, and for weights that are not finite or not as many.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: Sequence[float | int] | None = None,
        timeout: float | int | None = None,
        brought: str | None = None,
    ) -> None:
        given = () if reward_funcs is None else reward_funcs
        several = isinstance(given, Sequence) and not isinstance(given, str)
        self.functions = list(given) if several else [given]
        self.called = [_name(i, function) for i, function in enumerate(self.functions)]
        self.brought = brought
        self.names = self.called + ([] if brought is None else [brought])
        if brought is not None and reward_weights is not None:
            reward_weights = [*reward_weights, *[1.0] * (len(reward_weights) == len(self.called))]
        self.weights = _weights(self.names, reward_weights)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout!r} of rewards must be positive seconds or None")
        self.timeout = timeout
        self._asked = [asked(function) for function in self.functions]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = False

    def check(self, columns: Iterable[str]) -> None:
        """Raises ValueError for columns with a keyword's name, and for columns that are missing."""
        columns = set(columns)
        taken = sorted(columns & set(OWN) - set(NOT_PASSED))
        if taken:
            raise ValueError(f"columns {taken} have names of reward keywords: rename them")
        given = (columns - set(NOT_PASSED)) | set(OWN)
        for name, (_, needed) in zip(self.called, self._asked, strict=True):
            if needed - given:
                missing, known = sorted(needed - given), sorted(columns - set(NOT_PASSED))
                raise ValueError(
                    f"reward function {name!r} needs {missing}, the data has columns {known}"
                )

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        trainer_state: Any = None,
        brought: Sequence[float] | None = None,
    ) -> Scores:
        """Scores of N completions, N / len(rows) of each row's prompt, which stand together.

        `brought` are rewards that came with the completions, NaN for none.

        Raises RewardError for a function's own error, TimeoutError naming the late ones, ValueError
        for a wrong number of rewards and for NaN and infinite ones, TypeError for no numbers.
        """
        batch = batch_of(rows, completions, completion_ids, trainer_state)
        self.check(batch.columns)
        logs = [Logs() for _ in self.functions]
        calls = [self._start(i, batch.keywords(log)) for i, log in enumerate(logs)]
        late = self._late(calls, self._end())
        for i, call in enumerate(calls):
            # One that was late may have been cancelled by now.
            if i not in late and call.error is not None:
                raise RewardError(self._told_of(i, call.error, batch)) from call.error
        if late:
            raise TimeoutError(
                f"reward functions {[self.names[i] for i in late]} took more than "
                f"{self.timeout} s for {len(completions)} completions"
            )
        rewards = self._columns(calls, batch.completions, brought)
        logged: dict[str, list[float]] = {}
        for log in logs:
            for name, values in log.metrics.items():
                logged.setdefault(name, []).extend(values)
        extra = _columns(self.called, logs, len(completions))
        return Scores(
            rewards, self._metrics(rewards), logged, extra, self._unscored(rewards, batch)
        )

    @property
    def means(self) -> list[str]:
        """Names of the functions' means."""
        return [f"rewards/{name}/mean" for name in self.names]

    def joined(self, parts: Sequence[Scores]) -> Scores:
        """The scores of several batches as those of one."""
        rewards = np.concatenate([one.rewards for one in parts])
        logged: dict[str, list[float]] = {}
        for name, values in itertools.chain.from_iterable(x.logged.items() for x in parts):
            logged.setdefault(name, []).extend(values)
        columns = dict.fromkeys(name for one in parts for name in one.extra)
        of = lambda one, name: one.extra.get(name, [None] * len(one.rewards))
        extra = {n: [x for one in parts for x in of(one, n)] for n in columns}
        unscored = sum(one.unscored for one in parts)
        return Scores(rewards, self._metrics(rewards), logged, extra, unscored)

    def _columns(self, calls: list[Call], completions: list, brought: Any) -> np.ndarray:
        """[N, F]: each function's rewards, then those that came with the completions."""
        each = zip(self.called, calls, strict=True)
        given = [_numbers(name, call.value, completions) for name, call in each]
        if self.brought is not None:
            if not given and (brought is None or np.isnan(brought).all()):
                raise ValueError(
                    f"{self.brought} gave no reward, and there is no reward function to score"
                )
            given.append([math.nan] * len(completions) if brought is None else list(brought))
        return np.array(given, np.float64).T

    def close(self) -> None:
        """Ends the event loop of async functions; the next `score` starts another."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _start(self, i: int, keywords: dict[str, Any]) -> Call:
        names, _ = self._asked[i]
        if names is not None:
            keywords = {name: value for name, value in keywords.items() if name in names}
        call = Call(self.functions[i], keywords)
        if is_async(self.functions[i]):
            call.cancel = asyncio.run_coroutine_threadsafe(call.awaited(), self._running()).cancel
        else:
            # A daemon, so that a function that hangs does not keep Python from ending.
            threading.Thread(target=call.here, name=self.names[i], daemon=True).start()
        return call

    def _running(self) -> asyncio.AbstractEventLoop:
        """One loop for a run: connections that functions keep belong to it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=forever, args=(self._loop,), daemon=True).start()
        return self._loop

    def _end(self) -> float | None:
        return None if self.timeout is None else time.monotonic() + self.timeout

    def _late(self, calls: list[Call], end: float | None) -> list[int]:
        """Waits for all; numbers of those that are not done at `end`, which are cancelled."""
        for call in calls:
            call.done.wait(None if end is None else max(0.0, end - time.monotonic()))
        late = [i for i, call in enumerate(calls) if not call.done.is_set()]
        for i in late:
            calls[i].cancel()
        return late

    def _told_of(self, i: int, error: BaseException, batch: Batch) -> str:
        """The message of a failed batch; rows are tried one by one to find the one that fails."""
        what = f"reward function {self.names[i]!r} raised {type(error).__name__}: {error}"
        end, count = self._end(), len(batch.completions)
        for row in range(count):
            call = self._start(i, batch.keywords(Logs(), slice(row, row + 1)))
            if self._late([call], end):
                return f"{what}; tried one by one, {row} of {count} rows ended in time without it"
            if type(call.error) is type(error):
                return f"{what}; at row {row} of {count}, completion {cut(batch.completions[row])}"
        return f"{what}; none of the {count} rows raises it alone"

    def _metrics(self, rewards: np.ndarray) -> dict[str, float]:
        out = {}
        for name, column in zip(self.names, rewards.T, strict=True):
            given = column[~np.isnan(column)]
            if given.size:
                out[f"rewards/{name}/mean"] = float(given.mean())
                out[f"rewards/{name}/std"] = float(given.std(ddof=1)) if given.size > 1 else 0.0
        return out

    def _unscored(self, rewards: np.ndarray, batch: Batch) -> int:
        none = np.flatnonzero(np.isnan(rewards).all(axis=1))
        if none.size and not self._told:
            self._told = True
            say(
                f"no reward function gave row {none[0]} a reward, so it has advantage 0; such rows "
                f"are counted. Its completion: {cut(batch.completions[none[0]])}"
            )
        return int(none.size)


def _name(i: int, function: Any) -> str:
    if not callable(function):
        raise TypeError(
            f"reward function {i} is {function!r:.80}; functions are taken, reward models are not"
        )
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"reward function {i}, a {type(function).__name__}, needs a __name__")
    return name


def _weights(names: list[str], given: Sequence[float | int] | None) -> np.ndarray:
    if not names:
        raise ValueError("no reward function was given")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"reward functions share the names {twice}: set another __name__")
    weights = np.ones(len(names)) if given is None else np.asarray(given, np.float64)
    if weights.shape != (len(names),):
        raise ValueError(f"{weights.size} reward_weights for {len(names)} functions {names}")
    if not np.isfinite(weights).all():
        raise ValueError(f"reward_weights={weights.tolist()} must be finite")
    return weights


def _numbers(name: str, value: Any, completions: list) -> list[float]:
    """A function's rewards, checked; NaN for None."""
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError(f"reward function {name!r} gave a coroutine: define it with `async def`")
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"reward function {name!r} must return a list, got {value!r:.80}")
    value = list(value)
    if len(value) != len(completions):
        raise ValueError(
            f"reward function {name!r} returned {len(value)} rewards for {len(completions)} "
            "completions"
        )
    return [_number(name, i, x, completions[i]) for i, x in enumerate(value)]


def _number(name: str, row: int, value: Any, completion: Any) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()  # a scalar of NumPy, torch or JAX
    where = f"reward function {name!r} gave {value!r:.80} for row {row}, {cut(completion)}"
    if not isinstance(value, bool | int | float):
        raise TypeError(f"{where}: expected a number or None")
    if not abs(value) <= sys.float_info.max:  # nor NaN, nor an int past all floats
        raise ValueError(f"{where}: None is the way to give no reward")
    return float(value)


def _columns(names: list[str], logs: list[Logs], count: int) -> dict[str, list]:
    """Columns that functions logged, each whole and of one function."""
    out: dict[str, list] = {}
    for name, log in zip(names, logs, strict=True):
        for column, values in log.extra.items():
            if column in out or len(values) != count:
                raise ValueError(
                    f"reward function {name!r} logged {len(values)} values of column {column!r}, "
                    f"expected {count}, from one function"
                )
            out[column] = values
    return out
