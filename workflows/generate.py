"""Prompts in, answers out: the host's side of a generation."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import sample
from unsloth_jax.dims import Params
from unsloth_jax.sample import Sampling

STEP = 64  # prompts and caches are padded to a multiple of this, so few shapes are compiled
UNCHANGED = Sampling()
BURST = 16  # tokens a dispatch while somebody watches or a stop string may end it


class Answer(NamedTuple):
    """One completion: ids up to and including the stop token, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool  # False where the length limit ended it


@cache
def programs(family: ModuleType, c: Any) -> sample.Programs:
    """The jitted programs of one model, shared by every generation in the process."""
    return sample.programs(family, c)


def check(prompts: Sequence[Sequence[int]], s: Sampling, max_new_tokens: int, vocab: int) -> None:
    """Raises ValueError for prompts and settings that have no meaning."""
    empty = [i for i, p in enumerate(prompts) if len(p) == 0]
    if not prompts or empty:
        raise ValueError(
            f"every prompt needs at least one token; {len(prompts)} prompts, empty: {empty}"
        )
    outside = [i for i, p in enumerate(prompts) if min(p) < 0 or max(p) >= vocab]
    if outside:
        raise ValueError(f"prompts {outside} hold token ids outside 0 to {vocab - 1}")
    legal = {
        "temperature": (s.temperature >= 0, "at least 0 (0 is greedy)"),
        "top_k": (s.top_k >= 0 and s.top_k % 1 == 0, "a whole number, at least 0 (0 keeps all)"),
        "top_p": (0 < s.top_p <= 1, "in (0, 1]"),
        "min_p": (0 <= s.min_p <= 1, "in [0, 1]"),
        "repetition_penalty": (s.repetition_penalty > 0, "over 0 (1 changes nothing)"),
    }
    for name, (fine, rule) in legal.items():
        if not fine:
            raise ValueError(f"{name} must be {rule}, got {getattr(s, name)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def up(n: int) -> int:
    return -(-n // STEP) * STEP


def stream(
    family: ModuleType,
    c: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = UNCHANGED,
    seed: int = 0,
    burst: int | None = None,
    dtype: Any = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of all answers as they come: tokens [B, n] (-1 after an end) and log-probabilities.

    Prompts may differ in length. The whole answer is one piece unless `burst` cuts it.
    """
    check(prompts, sampling, max_new_tokens, c.vocab)
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), up(int(lengths.max()))), np.int32)
    for i, p in enumerate(prompts):
        tokens[i, : len(p)] = p
    knobs = Sampling(
        *(
            jnp.asarray(x, jnp.int32 if n == "top_k" else jnp.float32)
            for n, x in sampling._asdict().items()
        )
    )
    dtype = dtype or family.embed(c, params, jnp.zeros((1, 1), jnp.int32)).dtype
    slots = up(max(tokens.shape[1], int(lengths.max()) + max_new_tokens))
    run = programs(family, c)
    draft = run.prefill(
        params, tokens, lengths, knobs, jax.random.key(seed), slots=slots, dtype=dtype
    )
    stop = jnp.asarray(sorted(set(stop_ids)) or [-2], jnp.int32)
    left, piece = max_new_tokens, burst or up(max_new_tokens)
    while left > 0:
        limit = jnp.asarray(left, jnp.int32)
        draft, new, logprobs = run.decode(params, draft, stop, knobs, limit, steps=piece)
        yield np.asarray(new)[:, :left], np.asarray(logprobs)[:, :left]
        left -= piece
        if bool(draft.done.all()):
            return


def answers(
    family: ModuleType,
    c: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    watch: Callable[[np.ndarray], None] = lambda piece: None,
    watched: bool = False,
    **settings: Any,
) -> list[Answer]:
    """Every prompt's completion. A stop string ends a row with the token that completes it.

    `watch` is called with each piece of tokens [B, n], -1 after an end; `watched` makes the
    pieces short.
    """
    if stop_strings and decode is None:
        raise ValueError("stop_strings need a tokenizer to decode with")
    rows: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    burst = BURST if watched or stop_strings else None
    for tokens, logprobs in stream(
        family, c, params, prompts, stop_ids=stop_ids, burst=burst, **settings
    ):
        tokens = tokens.copy()
        for i in range(len(prompts)):
            pairs = zip(tokens[i].tolist(), logprobs[i].tolist(), strict=True)
            for n, (token, logp) in enumerate(pairs):
                if ended[i] or token < 0:
                    tokens[i, n:] = -1
                    break
                rows[i].append(token)
                logps[i].append(logp)
                ended[i] = token in stop_ids or (
                    bool(stop_strings) and any(s in decode(rows[i]) for s in stop_strings)
                )
        watch(tokens)
        if all(ended):
            break
    return [Answer(*row) for row in zip(rows, logps, ended, strict=True)]


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.start
