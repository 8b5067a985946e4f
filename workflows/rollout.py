"""Prompts in, completions out, however many: the host's side of `unsloth_jax.rollout`.

Requests wait until slots are free for all of a prompt's completions, so that the prompt is read
once. When none waits any more, slots that are empty are given up, half of them at a time.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _choice
from unsloth_jax import decoding, rollout, unstack
from unsloth_jax.dims import Params
from unsloth_jax.rollout import Requests
from unsloth_jax.sample import Sampling
from workflows import generate, rollout_memory
from workflows.keywords import say
from workflows.sampling_params import SamplingParams

SLOTS = 64
STEPS = 32  # tokens a dispatch
READ = 16_384  # prompt tokens that are read at once, padding counted


class Completion(NamedTuple):
    """One completion, its stop token included."""

    tokens: list[int]
    logprobs: list[float]  # tempered, before penalty and filters: what a learner computes too
    sampled_logprobs: list[float]  # of what the tokens were drawn from
    finish_reason: str  # "stop" or "length"
    stop_reason: int | str | None = None  # the token or string that ended it
    mask: list[int] | None = None  # 0 where an environment spoke; None: the policy drew each token

    @property
    def drawn(self) -> list[int]:
        """1 for each token that the policy drew, else 0."""
        return [1] * len(self.tokens) if self.mask is None else self.mask


class Counts(NamedTuple):
    """What a rollout took."""

    prompt_tokens: int  # read, each prompt once for all its completions
    tokens: int  # drawn
    dispatches: int


class Rollout(NamedTuple):
    """`completions[i]` are those of prompt i; what draws otherwise may tell more."""

    completions: list[list[Completion]]
    counts: Counts
    rewards: list[float] | None = None  # one a completion, NaN for none; None: not scored here
    metrics: Mapping[str, float] = MappingProxyType({})
    aside: float = 0.0  # seconds that went to something else than drawing


class _Asked(NamedTuple):
    """One completion that is asked for, and where its tokens go."""

    prompt: int
    copy: int
    params: SamplingParams
    tokens: list[int]
    logprobs: list[float]
    sampled: list[float]


@cache
def programs(family: ModuleType, c: Any) -> rollout.Programs:
    """The jitted programs of one model, shared by every rollout in the process."""
    return rollout.programs(family, c)


def run(
    family: ModuleType,
    c: Any,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: SamplingParams | Sequence[SamplingParams],
    *,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    slots: int = SLOTS,
    steps: int = STEPS,
    decode: Callable[[list[int]], str] | None = None,
    weights: str = "auto",
    memory: int | None = None,
    share: bool | None = None,
    dtype: Any = None,
) -> Rollout:
    """Every prompt's completions; `settings` are one for all prompts or one a prompt.

    `stop_ids` end a completion unless its `ignore_eos`; `decode` is the tokenizer's, for stop
    strings; `memory` is what the process may take of the device, in bytes. `share` holds the keys
    and values of a prompt once for all its completions, by default on a GPU, where a token's
    attention reads prefixes in place. Raises ValueError for prompts and settings that mean nothing.
    """
    each = [settings] * len(prompts) if isinstance(settings, SamplingParams) else list(settings)
    if len(each) != len(prompts):
        raise ValueError(f"{len(each)} sampling parameters for {len(prompts)} prompts")
    if slots < 1 or steps < 1:
        raise ValueError(f"slots and steps must be at least 1, got {slots} and {steps}")
    if decode is None and any(one.stops for one in each):
        raise ValueError("stop strings need a tokenizer to decode with")
    generate.check(prompts, generate.UNCHANGED, 1, c.vocab, weights)
    dtype = dtype or family.embed(c, params, jnp.zeros((1, 1), jnp.int32)).dtype
    share = _choice.platform() == "gpu" if share is None else share
    found = _Run(family, c, params, prompts, each, tuple(stop_ids), seed, decode, dtype, share)
    return found.whole(min(slots, sum(one.n for one in each)), steps, weights, memory)


class _Run:
    """The state of one rollout: which slot belongs to whom, and who waits."""

    def __init__(self, family, c, params, prompts, settings, stop_ids, seed, decode, dtype, share):
        self.family, self.c, self.params, self.dtype, self.share = family, c, params, dtype, share
        self.prompts, self.settings, self.decode = prompts, settings, decode
        self.stop_ids, self.seed = stop_ids, seed
        self.programs = programs(family, c)
        ids = (() if s.ignore_eos else stop_ids for s in settings)
        self.stops = [sorted({*own, *(s.stop_token_ids or ())})
                      for own, s in zip(ids, settings, strict=True)]  # fmt: skip
        self.width = max(1, *map(len, self.stops))
        self.waiting = deque(
            [_Asked(i, n, s, [], [], []) for n in range(s.n)] for i, s in enumerate(settings)
        )
        self.done: dict[tuple[int, int], Completion] = {}
        self.read_tokens = self.dispatches = 0

    def whole(self, count: int, steps: int, weights: str, memory: int | None) -> Rollout:
        before = [0 if self.share else len(p) for p in self.prompts]
        sizes = [n + s.max_tokens for n, s in zip(before, self.settings, strict=True)]
        self.full = generate.up(max(sizes))
        width = generate.up(max(map(len, self.prompts))) if self.share else 0
        group = min(s.n for s in self.settings)
        fits = rollout_memory.fits(
            self.family, self.c, self.params, self.full, width * min(1, 2 / group), weights, memory,
            self.dtype,
        )  # fmt: skip
        if fits.slots < count:
            count = max(1, fits.slots)
            say(f"{count} completions are sampled at once: no more fit into the device's memory")
        layers = self.params
        if fits.plain:
            # Not merged: a sum in 16 bits would be another policy than the learner's.
            layers = unstack.materialized(self.family, self.c, self.params, merged=False)
        room = self._room(max(before) + steps)
        # Twice what full slots need, so that a group that lingers keeps no other from beginning.
        held = min(len(self.prompts), count, 2 * -(-count // group))
        self.slots = rollout.empty(
            self.family, self.c, count, room, self.width, self.dtype,
            (held, width) if self.share else None,
        )  # fmt: skip
        self.owners: list[_Asked | None] = [None] * count
        self.places: dict[int, int] = {}  # where prompts are held
        self.held = held
        while self.waiting or any(self.owners):
            self._fill()
            self._dispatch(layers, steps)
            if not self.waiting:
                self._shrink()
        wanted = [[self.done[i, n] for n in range(s.n)] for i, s in enumerate(self.settings)]
        drawn = sum(len(x.tokens) for x in self.done.values())
        return Rollout(wanted, Counts(self.read_tokens, drawn, self.dispatches))

    def _room(self, tokens: int) -> int:
        """Slots of a cache that holds so many tokens: all that are ever needed where prompts are
        shared, whose attention reads what is filled alone; else it grows by doubling.
        """
        return self.full if self.share else min(generate.bucket(tokens), self.full)

    def _fill(self) -> None:
        """Puts as many groups as fit whole into free slots; a larger one takes all there are."""
        free = deque(i for i, owner in enumerate(self.owners) if owner is None)
        begun: list[tuple[_Asked, int]] = []
        self.begun: set[int] = set()
        while self.waiting and free:
            group = self.waiting[0]
            if len(group) > len(free) < len(self.owners) or not self._placed(group[0].prompt):
                break
            taken, rest = group[: len(free)], group[len(free) :]
            begun += [(asked, free.popleft()) for asked in taken]
            self.waiting.popleft()
            if rest:
                self.waiting.appendleft(rest)
        for part in _parts(begun, self.prompts):
            self._place(part)

    def _placed(self, prompt: int) -> bool:
        """Whether there is a place to hold a prompt, which is its own from then on."""
        if prompt not in self.places:
            busy = {asked.prompt for asked in self.owners if asked is not None}
            # Of prompts that have none under way, but for those that `_fill` has just begun.
            self.places = {p: at for p, at in self.places.items() if p in busy | self.begun}
            free = set(range(self.held)) - set(self.places.values())
            if not free:
                return False
            self.places[prompt] = min(free)
        self.begun.add(prompt)
        return True

    def _place(self, begun: list[tuple[_Asked, int]]) -> None:
        """Reads the prompts of some requests and draws each one's first token."""
        numbers = list(dict.fromkeys(asked.prompt for asked, _ in begun))
        lengths = [len(self.prompts[i]) for i in numbers]
        width = generate.up(max(lengths))
        self._widen(0 if self.share else width)
        tokens = np.zeros((_power(len(numbers)), width), np.int32)
        for row, i in zip(tokens, numbers, strict=False):
            row[: len(self.prompts[i])] = self.prompts[i]
        lengths += [1] * (len(tokens) - len(lengths))
        read = self.programs.read(self.params, tokens, np.asarray(lengths, np.int32), self.dtype)
        self.read_tokens += sum(lengths[: len(numbers)])
        pad = [begun[0]] * (_power(len(begun)) - len(begun))
        source = np.asarray([numbers.index(asked.prompt) for asked, _ in begun + pad], np.int32)
        beyond = [len(self.owners)] * len(pad)
        into = np.asarray([slot for _, slot in begun] + beyond, np.int32)
        requests = self._requests([asked for asked, _ in begun + pad])
        places = np.full(len(tokens), self.held, np.int32)  # beyond the last: dropped
        places[: len(numbers)] = [self.places[i] for i in numbers]
        self.slots = self.programs.place(self.slots, read, requests, source, into, places)
        for asked, slot in begun:
            self.owners[slot] = asked

    def _requests(self, asked: list[_Asked]) -> Requests:
        settings = zip(*(one.params.sampling for one in asked), strict=True)
        seeds = [_seeds(one, self.seed) for one in asked]
        stop = np.full((len(asked), self.width), -1, np.int32)
        for row, one in zip(stop, asked, strict=True):
            row[: len(self.stops[one.prompt])] = self.stops[one.prompt]
        limit = np.asarray([one.params.max_tokens for one in asked], np.int32)
        sampling = Sampling(*(np.asarray(x, np.float32) for x in settings))
        return Requests(sampling, _keys(np.asarray(seeds, np.uint32)), limit, stop)

    def _widen(self, room: int) -> None:
        if min(room, self.full) > self.slots.cache.slots:
            cache = decoding.roomier(self.slots.cache, self._room(room))
            self.slots = self.slots.replace(cache=cache)

    def _dispatch(self, layers: Any, steps: int) -> None:
        """Some tokens of every slot; what ends is taken out."""
        used = int(np.asarray(self.slots.cache.used).max())
        self._widen(used + steps)
        # In a cache of full length every completion ends before the last slot.
        whole = self.slots.cache.slots == self.full
        limit = steps if whole else min(steps, self.slots.cache.slots - used)
        busy = sum(owner is not None for owner in self.owners)
        enough = busy - busy // 2
        if self.waiting:
            wanted = min(len(self.waiting[0]), len(self.owners))
            enough = max(1, wanted - (len(self.owners) - busy))
        self.slots, burst = self.programs.decode(
            layers, self.slots, np.int32(limit), np.int32(enough), steps=steps
        )
        self.dispatches += 1
        self._collect(jax.device_get(burst), np.asarray(self.slots.live))

    def _collect(self, burst: rollout.Burst, live: np.ndarray) -> None:
        cut = []
        for slot, asked in enumerate(self.owners):
            if asked is None:
                continue
            drawn = burst.tokens[slot] >= 0
            before = len(asked.tokens)
            new = (asked.tokens, asked.logprobs, asked.sampled)
            for held, values in zip(new, burst, strict=True):
                held.extend(values[slot][drawn].tolist())
            reason = self._stop_string(asked, before)
            if reason is not None and live[slot]:
                cut.append(slot)
            if reason is not None or not live[slot]:
                self._finish(asked, reason)
                self.owners[slot] = None
        if cut:
            self.slots = self.slots.replace(live=self.slots.live.at[np.asarray(cut)].set(False))

    def _stop_string(self, asked: _Asked, before: int) -> str | None:
        """The stop string that the newest tokens completed; what was drawn after it is dropped."""
        if not any(stop in self.decode(asked.tokens) for stop in asked.params.stops):
            return None
        for end in range(before + 1, len(asked.tokens) + 1):
            text = self.decode(asked.tokens[:end])
            for stop in (stop for stop in asked.params.stops if stop in text):
                for held in (asked.tokens, asked.logprobs, asked.sampled):
                    del held[end:]
                return stop
        return None

    def _finish(self, asked: _Asked, reason: str | None) -> None:
        last = asked.tokens[-1]
        if reason is None and last in self.stops[asked.prompt]:
            reason = last
        how = "length" if reason is None else "stop"
        lists = (asked.tokens, asked.logprobs, asked.sampled)
        self.done[asked.prompt, asked.copy] = Completion(*lists, how, reason)

    def _shrink(self) -> None:
        """Leaves out empty slots where half of them or more are empty.

        Not where prompts are shared: on a GPU reading the weights takes the time, and each shape
        compiles for long.
        """
        if self.share:
            return
        busy = [i for i, owner in enumerate(self.owners) if owner is not None]
        count = _power(len(busy))
        if not busy or count > len(self.owners) // 2:
            return
        idle = [i for i, owner in enumerate(self.owners) if owner is None]
        rows = busy + idle[: count - len(busy)]
        self.slots = rollout.kept(self.slots, jnp.asarray(rows, jnp.int32))
        self.owners = [self.owners[i] for i in rows]


def _parts(begun, prompts):
    """Requests in parts of no more than READ prompt tokens, padding counted."""
    part, widest, numbers = [], 0, set()
    for asked, slot in begun:
        wide = max(widest, generate.up(len(prompts[asked.prompt])))
        more = numbers | {asked.prompt}
        if part and _power(len(more)) * wide > READ:
            yield part
            part, wide, more = [], generate.up(len(prompts[asked.prompt])), {asked.prompt}
        part.append((asked, slot))
        widest, numbers = wide, more
    if part:
        yield part


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def _seeds(asked: _Asked, seed: int) -> tuple[int, int, int]:
    """What a completion's key is folded from: a prompt's own seed leaves out where it stands."""
    own = asked.params.seed
    base = (seed, asked.prompt + 1) if own is None else (own, 0)
    return base[0] % 2**32, base[1], asked.copy


@jax.jit
def _keys(seeds):
    def one(s):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(s[0]), s[1]), s[2])
        return jax.random.key_data(key)

    return jax.vmap(one)(seeds)
