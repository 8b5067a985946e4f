"""Rollouts of the user's own: `rollout_fn(params, prompts, key)`, for several turns and tools.

`params` are the parameters with the live adapters attached, `prompts` one `Prompt` (`ids`, and
the data's columns as `example`) for each completion that is wanted, so that a prompt stands
num_generations times in a row, `key` a JAX key of this generation. It returns ids, logprobs,
loss_mask and reward, a list each, as a tuple, a mapping, or a list of `Episode`. Token ids are
never decoded and encoded again.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unsloth_jax.dims import Params
from workflows import rollout
from workflows.engines import SLOTS, live, memory
from workflows.grpo_prompts import Prompt
from workflows.keywords import shown
from workflows.model import Model
from workflows.rollout import Completion, Counts, Rollout
from workflows.sampling_params import SamplingParams

ROLLOUT_FN = "rollout_fn"
ABOVE = 1e-4  # a log-probability may be this much over 0, by rounding


class Columns(NamedTuple):
    """What a rollout function returns, a list of one entry a completion each.

    `ids` are a completion's tokens after its prompt; `logprobs` the policy's at the run's
    temperature, before filters; `loss_mask` 1 where the policy drew the token and 0 where an
    environment spoke, whose `logprobs` are not read. `reward` may be None, or hold None, where
    reward functions score. `sampled_logprobs` are after filters, by default `logprobs`;
    `truncated` says whom a limit cut off, by default those that end without a stop token.
    """

    ids: Any
    logprobs: Any
    loss_mask: Any
    reward: Any = None
    sampled_logprobs: Any = None
    truncated: Any = None


@dataclass
class Episode:
    """One completion of several turns as it grows: what the policy said and what it heard."""

    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    truncated: bool = False
    reward: float | None = None

    @property
    def context(self) -> list[int]:
        """All tokens so far, the prompt's included: what the next turn continues."""
        return [*self.prompt, *self.ids]

    def said(self, turn: Completion) -> None:
        """Adds tokens of the policy, as `continuations` gives them."""
        self._add(turn.tokens, turn.logprobs, 1, turn.sampled_logprobs)
        self.truncated = turn.finish_reason == "length"

    def heard(self, ids: Sequence[int]) -> None:
        """Adds tokens of the environment, from which nothing is learnt."""
        self._add(ids, [0.0] * len(ids), 0, [0.0] * len(ids))

    def _add(self, ids: Sequence, logprobs: Sequence, mask: int, sampled: Sequence) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.loss_mask += [mask] * len(ids)
        self.sampled_logprobs += sampled


def continuations(
    model: Model,
    params: Params,
    ids: Sequence[Sequence[int]],
    sampling_params: SamplingParams | Sequence[SamplingParams],
    key: jax.Array,
) -> list[Completion]:
    """What the policy says after these token ids, each one's `n` completions together.

    Neighbours that are alike are read once, and each draws for itself. Another turn needs another
    key (`jax.random.split`). Raises ValueError as `rollout.run`.
    """
    one = isinstance(sampling_params, SamplingParams)
    each = [sampling_params] * len(ids) if one else list(sampling_params)
    if len(each) != len(ids):
        raise ValueError(f"{len(each)} sampling parameters for {len(ids)} lists of token ids")
    alike = lambda i: (list(ids[i]), each[i])
    groups = [list(g) for _, g in itertools.groupby(range(len(ids)), key=alike)]
    merged = [_times(each[g[0]], len(g)) for g in groups]
    found = rollout.run(
        model.family, model.config, params, [list(ids[g[0]]) for g in groups], merged,
        stop_ids=model.stop_ids(), seed=int(jax.random.bits(key, dtype=jnp.uint32)),
        slots=min(SLOTS, sum(s.n for s in merged)), decode=model.tokenizer.decode,
        memory=memory(model),
    )  # fmt: skip
    return list(itertools.chain.from_iterable(found.completions))


def _times(s: SamplingParams, count: int) -> SamplingParams:
    return SamplingParams(**(vars(s) | {"n": s.n * count}))


@dataclass
class Custom:
    """The engine that asks a rollout function; raises ValueError for what it may not return."""

    function: Callable
    model: Model
    length: int  # tokens of prompt and completion

    def draw(
        self, adapters: Params, prompts: Sequence[Prompt], settings: SamplingParams, seed: int
    ) -> Rollout:
        m = self.model
        m.adapters = adapters  # for `fast_generate`; the step before donated what it had
        repeated = [one for one in prompts for _ in range(settings.n)]
        given = self.function(live(m, adapters), repeated, jax.random.key(seed))
        rows = _rows(columns(given), len(repeated))
        stops = set(m.stop_ids())
        made = [
            _completion(n, row, prompt, self.length, m.config.vocab, stops)
            for n, (row, prompt) in enumerate(zip(rows, repeated, strict=True))
        ]
        groups = [made[at : at + settings.n] for at in range(0, len(made), settings.n)]
        read = sum(len(one.ids) for one in repeated)
        counts = Counts(read, sum(sum(one.drawn) for one in made), 0)
        return Rollout(groups, counts, [_reward(n, row.reward) for n, row in enumerate(rows)])

    def close(self) -> None:
        pass


def columns(given: Any) -> Columns:
    """What a rollout function returned, by name. Raises TypeError, ValueError for anything else."""
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(Columns._fields), key=str)
        missing = sorted({"ids", "logprobs", "loss_mask"} - set(given))
        if unknown or missing:
            raise ValueError(
                f"rollout_fn returned unknown {unknown}, without {missing}; known are "
                f"{list(Columns._fields)}"
            )
        return Columns(**given)
    if isinstance(given, list) and given and all(isinstance(one, Episode) for one in given):
        return Columns(*([getattr(one, name) for one in given] for name in Columns._fields))
    if isinstance(given, tuple) and len(given) == 4:
        return Columns(*given)
    raise TypeError(
        "rollout_fn must return (ids, logprobs, loss_mask, reward), a mapping of these or a list "
        f"of Episode, got {shown(given)}{f' of {len(given)}' if isinstance(given, tuple) else ''}"
    )


def _rows(c: Columns, count: int) -> list[Columns]:
    """One Columns a completion; raises ValueError where a column has another number of entries."""
    whole = []
    for name, values in zip(Columns._fields, c, strict=True):
        if values is None and name not in ("ids", "logprobs", "loss_mask"):
            values = [None] * count
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
            raise TypeError(f"rollout_fn: {name} must be a list, got {shown(values)}")
        if len(values) != count:
            raise ValueError(
                f"rollout_fn returned {len(values)} {name} for {count} prompts; each prompt stands "
                "there once for each completion that is wanted"
            )
        whole.append(values)
    return [Columns(*row) for row in zip(*whole, strict=True)]


def _completion(
    n: int, row: Columns, prompt: Prompt, length: int, vocab: int, stops: set[int]
) -> Completion:
    where = f"rollout_fn, completion {n}"
    ids = list(row.ids)
    wrong = [i for i in ids if not isinstance(i, Integral) or not 0 <= i < vocab]
    if not ids or wrong:
        raise ValueError(
            f"{where}: ids must be at least one token of 0 to {vocab - 1}, got {wrong[:5] or ids}"
        )
    if len(prompt.ids) + len(ids) > length:
        raise ValueError(
            f"{where}: {len(ids)} tokens, its environment's included, after a prompt of "
            f"{len(prompt.ids)} are more than max_seq_length={length}"
        )
    ids, mask = [int(i) for i in ids], _mask(where, row.loss_mask, len(ids))
    logprobs = _logprobs(where, "logprobs", row.logprobs, mask)
    sampled = logprobs
    if row.sampled_logprobs is not None:
        sampled = _logprobs(where, "sampled_logprobs", row.sampled_logprobs, mask)
    cut = ids[-1] not in stops if row.truncated is None else bool(row.truncated)
    return Completion(ids, logprobs, sampled, "length" if cut else "stop", mask=mask)


def _mask(where: str, given: Any, count: int) -> list[int]:
    mask = list(given)
    wrong = sorted({str(x) for x in mask if x not in (0, 1)})
    if len(mask) != count or wrong:
        raise ValueError(
            f"{where}: loss_mask must be {count} entries of 0 or 1, as ids are, got {len(mask)}"
            + (f" with {wrong[:5]}" if wrong else "")
        )
    return [int(x) for x in mask]


def _logprobs(where: str, name: str, given: Any, mask: list[int]) -> list[float]:
    """Numbers where the mask is 1, 0 elsewhere, whatever stands there."""
    values = list(given)
    if len(values) != len(mask):
        raise ValueError(f"{where}: {len(values)} {name} for {len(mask)} ids")
    wrong = [i for i, on in enumerate(mask) if on and not _is_logprob(values[i])]
    if wrong:
        raise ValueError(
            f"{where}: {name} of tokens {wrong[:5]} are {[values[i] for i in wrong[:5]]}, where "
            "loss_mask is 1; expected finite numbers of at most 0"
        )
    return [float(x) if on else 0.0 for x, on in zip(values, mask, strict=True)]


def _is_logprob(x: Any) -> bool:
    number = not isinstance(x, bool) and (isinstance(x, Real) or getattr(x, "shape", None) == ())
    return number and math.isfinite(x) and float(x) <= ABOVE


def _reward(n: int, given: Any) -> float:
    """A reward as a number; NaN for None."""
    if given is None:
        return math.nan
    scalar = isinstance(given, Real) or getattr(given, "shape", None) == ()
    if not scalar or not math.isfinite(given):
        raise ValueError(
            f"rollout_fn, completion {n}: reward must be a finite number or None, got "
            f"{shown(given)}"
        )
    return float(given)
