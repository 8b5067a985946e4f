"""The loop over layers, shared by every family: training forward, prefill and decoding.

Layers are scanned in groups: runs of a repeating pattern of layers alike in kind, leaves and
adapters; layers alike that follow each other within a pattern are scanned too, so that each kind
is compiled once. Quantized stacks stay whole and are read by layer number, so they are never cut
or copied; arrays and adapters travel through the scan, so their gradients don't accumulate.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from unsloth_jax import remat, shared_prompts, tree
from unsloth_jax.dims import Params, Shared
from unsloth_jax.experts import Spread
from unsloth_jax.layers import feed_forward, row_mixers
from unsloth_jax.leaves import Lora, Quantized, View, layer, scores, stacks
from unsloth_jax.remat import Memory

LONGEST_PATTERN = 8


class Group(NamedTuple):
    """Layers `start`, ... in `repeats` rounds of `period` layers each."""

    start: int
    period: int
    repeats: int


def groups(kinds: tuple, flat: dict[str, Any]) -> list[Group]:
    """Cuts the layers, from the first on, each time into the longest run of a repeated pattern."""
    count, signs = len(kinds), _signs(kinds, flat)
    out, at = [], 0
    while at < count:
        best = Group(at, 1, 1)
        for period in range(1, min(LONGEST_PATTERN, count - at) + 1):
            repeats = 1
            while signs[at + repeats * period :][:period] == signs[at : at + period]:
                repeats += 1
            if (repeats > 1 or period == 1) and repeats * period > best.period * best.repeats:
                best = Group(at, period, repeats)
        out.append(best)
        at += best.period * best.repeats
    return out


def _signs(kinds: tuple, flat: dict[str, Any]) -> list[tuple]:
    """What layers must have in common to be alike: their kinds and the parts that hold them."""
    count = len(kinds)
    parts = {path: stacks(leaf, count).layers for path, leaf in flat.items()}
    owner = {p: {i: n for n, ids in enumerate(layers) for i in ids} for p, layers in parts.items()}
    return [(kinds[i], *(owner[p].get(i) for p in flat)) for i in range(count)]


def _runs(pattern: list[tuple]) -> list[tuple[int, int]]:
    """(start, length) of layers alike that follow each other in a pattern."""
    starts = [n for n, sign in enumerate(pattern) if n == 0 or sign != pattern[n - 1]]
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], len(pattern)], strict=True)]


def take(x: Array, at: list[int]) -> Array:
    """Layers `at` of a stack, without a copy where they are the whole of it."""
    if at == list(range(x.shape[0])):
        return x
    step = at[1] - at[0] if len(at) > 1 else 1
    if step > 0 and at == list(range(at[0], at[-1] + 1, step)):
        return x[at[0] : at[-1] + 1 : step]
    ends = [n for n, (a, b) in enumerate(zip(at, at[1:], strict=False), 1) if b != a + 1]
    length = ends[0] if ends else len(at)
    apart, rounds = (at[length] - at[0] if ends else length), len(at) // length
    blocks = [at[0] + r * apart + k for r in range(rounds) for k in range(length)]
    if apart >= length and at == blocks:
        # Blocks of as many layers each: slices of rounds, whose gradient scatters nothing.
        for start, inside in ((at[0], 0), (at[0] + length - apart, apart - length)):
            if start >= 0 and start + rounds * apart <= x.shape[0]:
                whole = x[start : start + rounds * apart].reshape(rounds, apart, *x.shape[1:])
                return whole[:, inside : inside + length].reshape(-1, *x.shape[1:])
    return x[np.asarray(at)]


def split(leaf: Any, at: list[int]) -> tuple[Any, Callable[[Any], Any]]:
    """(what the scan carries along for layers `at`, how a slice of it becomes the layer's leaf)."""
    if isinstance(leaf, Lora):
        base, rebuild = split(leaf.base, at)
        own = tuple(take(x, at) for x in (leaf.a, leaf.b, leaf.scale))
        return (base, own), lambda xs: Lora(rebuild(xs[0]), *xs[1])
    if isinstance(leaf, View):
        return split(leaf.stack, [leaf.at[i] for i in at])
    if isinstance(leaf, Quantized):
        return jnp.asarray(at, jnp.int32), lambda i: layer(leaf, i)
    return take(leaf, at), lambda x: x


def scan_layers(
    family: ModuleType,
    c: Any,
    params: Params,
    carry: Any,
    body: Callable,
    wrap: Callable = lambda layer: layer,
    unroll: bool = False,
) -> Any:
    """Folds `body(carry, kind, weights, layer number) -> carry` over all layers.

    `wrap` goes around a layer and the reading of its weights. `unroll` writes the layers one
    after the other instead of a loop.
    """
    node = params
    for key in family.LAYERS.split("."):
        node = node[key]
    flat, kinds = tree.flatten(node["*"]), family.kinds(c)
    signs = _signs(kinds, flat)
    for g in groups(kinds, flat):
        runs = _runs(signs[g.start : g.start + g.period])
        xs, rebuilds = [], []
        for first, length in runs:
            ids = [g.start + r * g.period + first + k
                   for r in range(g.repeats) for k in range(length)]  # fmt: skip
            here = {}
            for path, leaf in flat.items():
                s = stacks(leaf, len(kinds))
                n = next((n for n, layers in enumerate(s.layers) if ids[0] in layers), None)
                if n is not None:
                    here[path] = split(s.parts[n], [s.layers[n].index(i) for i in ids])
            carried = {p: x for p, (x, _) in here.items()}, jnp.asarray(ids, jnp.int32)
            xs.append(carried if length == 1 else _in_rounds(carried, g.repeats))
            rebuilds.append({p: build for p, (_, build) in here.items()})

        def one(carry, flat_xs, i, n, g=g, runs=runs, rebuilds=rebuilds):
            w = {p: rebuilds[n][p](x) for p, x in flat_xs.items()}
            carry, w = _tied(carry, w) if unroll else (carry, w)
            return body(carry, kinds[g.start + runs[n][0]], tree.unflatten(w), i)

        layers = [wrap(partial(one, n=n)) for n in range(len(runs))]
        # One function for all rounds, so that writing them out traces each layer once.
        layers = [jax.jit(layer) for layer in layers] if unroll else layers

        def step(carry, xs, layers=layers, runs=runs):
            for layer_of, (_, length), mine in zip(layers, runs, xs, strict=True):
                alike = lambda carry, one, layer_of=layer_of: (layer_of(carry, *one), None)
                if length == 1:
                    carry = layer_of(carry, *mine)
                else:
                    carry = _folded(alike, carry, mine, length, unroll)
            return carry, None

        carry = _folded(step, carry, xs, g.repeats, unroll)
    return carry


def _in_rounds(xs: Any, count: int) -> Any:
    """Slices one after the other as `count` equal parts."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), xs)


def _folded(step: Callable, carry: Any, xs: Any, count: int, unroll: bool) -> Any:
    """The last carry of a scan, or of its steps written out."""
    if not unroll:
        return jax.lax.scan(step, carry, xs)[0]
    for one in _apart(xs, count):
        carry, _ = step(carry, one)
    return carry


def _apart(xs: Any, count: int) -> list[Any]:
    """The slices that a scan would make; their gradients are put together once, not summed."""
    split = lambda x: [part[0] for part in jax.lax.split(x, [1] * count)]
    leaves, kind = jax.tree.flatten(xs)
    return [kind.unflatten(parts) for parts in zip(*map(split, leaves), strict=True)]


def _tied(carry: Any, weights: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A layer's inputs as they are; in the backward pass adapters' gradients come before dx.

    Else nothing waits for them, and what they are made of is kept for the end.
    """
    adapted = {p: (w.a, w.b, w.scale) for p, w in weights.items() if isinstance(w, Lora)}
    carry, adapted = _together(carry, adapted)
    pairs = {p: Lora(weights[p].base, *own) for p, own in adapted.items()}
    return carry, weights | pairs


@jax.custom_vjp
def _together(*inputs: Any) -> Any:
    """Its inputs, whose cotangents wait for each other."""
    return inputs


_together.defvjp(lambda *inputs: (inputs, None), lambda _, ct: jax.lax.optimization_barrier(ct))


def document_lengths(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its row share each token's segment."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.sum(-1, dtype=jnp.int32)


def forward(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    memory: Memory = remat.PLAIN,
    documents: int | None = None,
    embedded: Float[Array, "B T D"] | None = None,
    shared: Shared | None = None,
) -> Float[Array, "B T D"]:
    """Tokens to final hidden states; `logits` turns those into scores.

    `documents` is the most that a row holds, where that is known (`pallas_kernels.attention`);
    `embedded` the rows of a `leaves.Hosted` embedding table; `shared` says where completions lie
    that follow one prompt, in the place of segments.
    """
    body = _layer(family, c, positions, segments, memory, documents, shared)
    x = family.embed(c, params, tokens, embedded)
    x = scan_layers(family, c, params, x, body, _computed_again(memory), memory.unroll)
    return family.norm(c, params, x)


def spread(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    memory: Memory = remat.PLAIN,
    documents: int | None = None,
    embedded: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], Spread]:
    """`forward`, and how all layers sent the tokens, padding aside, to their experts."""
    step = _layer(family, c, positions, segments, memory, documents)
    real = (segments > 0).astype(jnp.float32)

    def body(carry, kind, w, i):
        x, sums = carry
        heard: list[Spread] = []
        x = step(x, kind, w, i, lambda node, y: heard.append(family.routed(c, node, y, real)))
        for one in heard:
            sums = jax.tree.map(jnp.add, sums, one)
        return x, sums

    x = family.embed(c, params, tokens, embedded)
    none = Spread(jnp.zeros(c.experts), jnp.zeros(c.experts), jnp.zeros(()))
    wrap = _computed_again(memory)
    x, found = scan_layers(family, c, params, (x, none), body, wrap, memory.unroll)
    return family.norm(c, params, x), found


def _computed_again(memory: Memory) -> Callable:
    """What goes around a layer: only what `memory` keeps of it lasts until the backward pass."""
    # Quantized bytes read outside would be saved layer by layer: a second copy of the base.
    policy = remat.policy(memory.keep)
    return partial(jax.checkpoint, prevent_cse=memory.unroll, policy=policy)


def _layer(family, c, positions, segments, memory, documents, shared=None):
    """fn(x, kind, weights, layer number) -> x for tokens that see each other.

    A fifth argument is told the weights and the input of each MLP that is a family's own.
    """
    if shared is None:
        by = family.angles(c, positions, document_lengths(segments))
        mixers = row_mixers(segments, positions, documents)
    else:
        by = family.angles(c, positions, shared_prompts.lengths(shared, positions))
        mixers = shared_prompts.mixers(shared, positions, segments)

    def layer(x, kind, w, i, tell=None):
        def mlp(node, y, how):
            if tell is not None and callable(how):
                tell(node, y)
            return feed_forward(node, y, how, memory.tiles)

        x = checkpoint_name(x, remat.INPUT)
        return family.block(c, kind, w, x, by, mixers, mlp)[0]

    return layer


def finite_layers(
    family: ModuleType,
    c: Any,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    embedded: Float[Array, "B T D"] | None = None,
    documents: int | None = None,
    shared: Shared | None = None,
) -> Bool[Array, " L"]:
    """Whether every value that a layer puts out is finite, padding aside."""
    step = _layer(family, c, positions, segments, remat.PLAIN, documents, shared)
    real = (segments > 0)[..., None]

    def body(carry, kind, w, i):
        x, ok = carry
        x = step(x, kind, w, i)
        return x, ok.at[i].set(jnp.where(real, jnp.isfinite(x), True).all())

    x = family.embed(c, params, tokens, embedded)
    return scan_layers(family, c, params, (x, jnp.ones(c.layers, bool)), body)[1]


def logits(
    family: ModuleType, c: Any, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Scores of every token of the vocabulary, float32."""
    return scores(family.head(c, params), hidden, family.scores(c))
