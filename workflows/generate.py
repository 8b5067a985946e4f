"""Prompts in, answers out: the host's side of a generation."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import sample, unstack
from unsloth_jax.dims import Params
from unsloth_jax.sample import Sampling
from workflows import machine
from workflows.keywords import say

STEP = 64  # prompts are padded to a multiple of this, caches to a power of two times this
ROOM = 1024  # new tokens that a cache is made for at first; it is doubled where more follow
WEIGHTS = ("auto", "materialized", "stored")
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


def check(
    prompts: Sequence[Sequence[int]], s: Sampling, max_new_tokens: int, vocab: int, weights: str
) -> None:
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
        "repetition_penalty": (
            0 < s.repetition_penalty < np.inf,
            "over 0 and finite (1 changes nothing)",
        ),
    }
    for name, (fine, rule) in legal.items():
        if not fine:
            raise ValueError(f"{name} must be {rule}, got {getattr(s, name)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")


def up(n: int) -> int:
    """The next multiple of STEP."""
    return -(-n // STEP) * STEP


def bucket(n: int) -> int:
    """The next power of two times STEP."""
    return STEP << (-(-n // STEP) - 1).bit_length()


def readable(
    family: ModuleType, c: Any, params: Params, weights: str, growth: int, merged: bool = True
) -> Params | unstack.Unstacked:
    """The parameters as decoding reads them: plain arrays for every layer, or as they are stored.

    "auto" makes plain ones where they fit beside the `growth` of the cache in bytes, and says so
    where they don't. `merged` is of `unstack.materialized`.
    """
    if weights == "stored":
        return params
    if weights == "auto":
        needed, free = unstack.plain_bytes(family, params) + growth, free_bytes()
        if needed > free:
            say(
                f"decoding reads the weights as they are stored, which is slower: plain ones and a "
                f"full cache need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
            return params
    return unstack.materialized(family, c, params, merged)


def free_bytes(most: int | None = None) -> int:
    """What the device has left of `most`, or of all it has; on a CPU half of what the system has.

    On a CPU, whose memory JAX does not count, `most` is what is left.
    """
    limit = machine.device_limit()
    if limit is None:
        return min(machine.host_free() // 2, most or 2**63)
    # A twentieth is left for scores and what the allocator can't place.
    return int(0.95 * min(limit, most or limit)) - machine.device_in_use()


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
    weights: str = "auto",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of all answers as they come: tokens [B, n] (-1 after an end) and log-probabilities.

    Prompts may differ in length. Pieces have ROOM tokens, or `burst`; `weights` is one of WEIGHTS.
    """
    check(prompts, sampling, max_new_tokens, c.vocab, weights)
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    longest = int(lengths.max())
    tokens = np.zeros((len(prompts), up(longest)), np.int32)
    for i, p in enumerate(prompts):
        tokens[i, : len(p)] = p
    knobs = on_device(sampling)
    dtype = dtype or family.embed(c, params, jnp.zeros((1, 1), jnp.int32)).dtype
    steps = burst or bucket(min(max_new_tokens, ROOM))
    slots = bucket(max(tokens.shape[1], longest + min(max_new_tokens, ROOM)))
    run = programs(family, c)
    draft = run.prefill(
        params, tokens, lengths, knobs, jax.random.key(seed), slots=slots, dtype=dtype
    )
    full = bucket(longest + max_new_tokens)
    growth = sum(x.nbytes for x in jax.tree.leaves(draft.cache)) * (full - slots) // slots
    layers = readable(family, c, params, weights, growth)
    stop = jnp.asarray(sorted(set(stop_ids)) or [-2], jnp.int32)
    made = 0
    while made < max_new_tokens:
        if longest + made == draft.cache.slots:
            draft = sample.roomier(draft, bucket(longest + made + 1))
        count = min(max_new_tokens - made, steps, draft.cache.slots - longest - made)
        draft, new, logprobs = run.decode(
            layers, draft, stop, knobs, jnp.asarray(count, jnp.int32), steps=steps
        )
        yield np.asarray(new)[:, :count], np.asarray(logprobs)[:, :count]
        made += count
        if bool(draft.done.all()):
            return


def on_device(s: Sampling) -> Sampling:
    """The settings as arrays, so that another value compiles nothing."""
    kind = lambda name: jnp.int32 if name == "top_k" else jnp.float32
    return Sampling(*(jnp.asarray(x, kind(name)) for name, x in s._asdict().items()))


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
    """Seconds since it was made, pauses aside."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves out seconds that went to something else."""
        self.start += seconds

    def __call__(self) -> float:
        return time.perf_counter() - self.start
