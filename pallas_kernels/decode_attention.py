"""Attention of one new token a row over its cache, which takes the token's key and value in.

    keys[b, :, used[b]] = k[b],  values[b, :, used[b]] = v[b]
    y[b, i] = softmax_s(cap(q[b, i] . keys[b, i // G, s] * scale)) @ values[b, i // G]
    for used[b] - window < s <= used[b], in used[b]'s chunk of slots;  cap(s) = c tanh(s / c), or s

With sinks, one more logit a head takes part in the softmax and has no value (arXiv:2508.10925).
Rows that begin alike may share what stands before their own caches (`Shared`): read from memory
once, it lies in the GPU's cache for the other rows.
Grouped queries (arXiv:2305.13245), running softmax (arXiv:2205.14135), long rows cut into parts
that are joined by their maxima. The kernel (Pallas, Triton) reads what is filled of the cache and
nothing beyond, once; XLA makes several launches of it and reads the cache's whole length. It has
no gradient: nothing is trained through a cache.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _choice
from pallas_kernels.attention import chances

Implementation = Literal["pallas", "xla"]
Attended = tuple[Float[Array, "B H u"], Float[Array, "B K S h"], Float[Array, "B K S u"]]

BLOCK = 64  # keys that a program reads at a time
ROWS = 16  # queries of a group, padded to a matrix unit's smallest side
PROGRAMS = 264  # at least so many keep 132 multiprocessors busy
HIDDEN = -1e30  # the score of a key that is not seen


class Shared(NamedTuple):
    """What rows have before their own caches: slot s of a prefix holds the token at position s."""

    keys: Any  # [P, K, T, h]
    values: Any  # [P, K, T, u]
    source: Any  # int32 [B]: the prefix of each row
    length: Any  # int32 [B]: tokens of it that count


def reference(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K h"],
    v: Float[Array, "B K u"],
    keys: Float[Array, "B K S h"],
    values: Float[Array, "B K S u"],
    used: Int[Array, " B"],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    chunk: int | None = None,
    sinks: Float[Array, " H"] | None = None,
    shared: Shared | None = None,
) -> Attended:
    """(mixed values, keys and values with the new token), softmax in float32."""
    batch, heads, width = q.shape
    rows = jnp.arange(batch)
    keys = keys.at[rows, :, used].set(k.astype(keys.dtype), mode="drop")
    values = values.at[rows, :, used].set(v.astype(values.dtype), mode="drop")
    every, mixed, position = _joined_rows(keys, values, shared)
    at = used if shared is None else used + shared.length
    grouped = q.reshape(batch, keys.shape[1], -1, width)
    scores = jnp.einsum(
        "bkgh,bksh->bkgs", grouped, every.astype(q.dtype), preferred_element_type=jnp.float32
    )
    back = at[:, None] - position
    seen = (back >= 0) & (position >= 0)
    seen = seen if window is None else seen & (back < window)
    seen = seen if chunk is None else seen & (back <= (at % chunk)[:, None])
    scores = jnp.where(seen[:, None, None], _capped(scores * scale, cap), HIDDEN)
    if sinks is None:
        chance = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    else:
        chance = chances(scores, sinks.reshape(1, keys.shape[1], -1)).astype(q.dtype)
    y = jnp.einsum("bkgs,bksu->bkgu", chance, mixed.astype(q.dtype))
    return y.reshape(batch, heads, -1), keys, values


def _joined_rows(keys, values, shared):
    """(keys, values, each slot's position, -1 where it holds nothing), prefixes before the rows."""
    own = jnp.arange(keys.shape[2], dtype=jnp.int32)[None]
    if shared is None:
        return keys, values, own
    first = jnp.arange(shared.keys.shape[2], dtype=jnp.int32)[None]
    first = jnp.where(first < shared.length[:, None], first, -1)
    position = jnp.concatenate([first, shared.length[:, None] + own], axis=1)
    both = lambda prefix, x: jnp.concatenate([prefix[shared.source].astype(x.dtype), x], axis=2)
    return both(shared.keys, keys), both(shared.values, values), position


def _capped(scores, cap):
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def supports(q: Array, keys: Array, values: Array, shared: Shared | None = None) -> str | None:
    """Why the kernel can't run on queries [B, H, h] and caches [B, K, S, h], or None."""
    _, heads, slots, width = keys.shape
    if _choice.platform() != "gpu":
        return "it needs a GPU"
    if old := _choice.older(8.0):
        return old
    if q.dtype != keys.dtype or keys.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes one 16-bit dtype, got queries {q.dtype} and a cache {keys.dtype}"
    if width not in (16, 32, 64, 128, 256) or slots % BLOCK or q.shape[1] > heads * ROWS:
        return (
            f"it takes heads 16 to 256 wide (a power of two), slots in blocks of {BLOCK} and up "
            f"to {ROWS} queries a group, got queries {q.shape} and a cache {keys.shape}"
        )
    if values.shape[3] != width:
        return f"it takes keys and values of one width, got {width} and {values.shape[3]}"
    if shared is not None and shared.keys.shape[2] % BLOCK:
        return f"it takes slots in blocks of {BLOCK}, got prefixes {shared.keys.shape}"
    largest = max([keys, *([] if shared is None else [shared.keys])], key=lambda x: x.size)
    if largest.size >= 2**31:
        return f"the cache {largest.shape} passes 2^31 elements and is indexed in 32 bits"
    return None


def attend(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K h"],
    v: Float[Array, "B K u"],
    keys: Float[Array, "B K S h"],
    values: Float[Array, "B K S u"],
    used: Int[Array, " B"],
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    chunk: int | None = None,
    sinks: Float[Array, " H"] | None = None,
    shared: Shared | None = None,
    implementation: Implementation | None = None,
) -> Attended:
    """`reference`, in place where the caches are donated.

    Rows have `used` tokens in their own caches, below S. Raises ValueError with the reason where
    the implementation asked for can't run.
    """
    reasons = {"pallas": supports(q, keys, values, shared), "xla": None}
    if _choice.pick("decode attention", implementation, reasons) == "xla":
        return reference(q, k, v, keys, values, used, scale, window, cap, chunk, sinks, shared)
    return _pallas(q, k, v, keys, values, used, scale, window, cap, chunk, sinks, shared)


def parts(batch: int, heads: int, slots: int) -> int:
    """Into how many parts a row's keys are cut, a power of two: 1 where rows fill the GPU."""
    wanted = min(PROGRAMS // (batch * heads), slots // BLOCK)
    return 1 << max(wanted, 1).bit_length() - 1


def _pallas(
    q,
    k,
    v,
    keys,
    values,
    used,
    scale,
    window,
    cap=None,
    chunk=None,
    sinks=None,
    shared=None,
    cut=None,
    interpret=False,
):
    batch, heads, slots, width = keys.shape
    group = q.shape[1] // heads
    cut = cut or parts(batch, heads, slots)
    own = [] if sinks is None else [sinks.astype(jnp.float32).reshape(heads, group)]
    # Where rows come in parts, what joins them takes the sinks in.
    first = own if cut == 1 else []
    shape = jax.ShapeDtypeStruct
    mixed = [shape((batch, heads, group, width), q.dtype)]
    if cut > 1:
        mixed = [shape((batch, heads, cut, group, width), jnp.float32)]
        mixed += [shape((batch, heads, cut, group), jnp.float32)] * 2
    *mixed, keys, values = pl.pallas_call(
        partial(_kernel, group, cut, scale, (window, chunk), cap, bool(first), shared is not None),
        out_shape=[*mixed, shape(keys.shape, keys.dtype), shape(values.shape, values.dtype)],
        grid=(batch, heads, cut),
        input_output_aliases={4: len(mixed), 5: len(mixed) + 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(
        used.astype(jnp.int32),
        q.reshape(batch, heads, group, width),
        k.astype(keys.dtype),
        v.astype(values.dtype),
        keys,
        values,
        *first,
        *(shared or ()),
    )
    y = _joined([*mixed, *own], q.dtype, interpret) if cut > 1 else mixed[0]
    return y.reshape(q.shape), keys, values


def _kernel(group, cut, scale, limits, cap, sinking, sharing, *refs):
    used_ref, q_ref, k_ref, v_ref, _, _, *refs = refs
    sinks_ref, refs = (refs[0], refs[1:]) if sinking else (None, refs)
    shared, refs = (Shared(*refs[:4]), refs[4:]) if sharing else (None, refs)
    *out_refs, keys_ref, values_ref = refs
    row, head, part = (pl.program_id(axis) for axis in range(3))
    # Rows beyond the group repeat its last one: they compute and store the same numbers.
    lines = jnp.minimum(jnp.arange(ROWS), group - 1)
    used = used_ref[row]
    q, k, v = q_ref[row, head, lines, :], k_ref[row, head, :], v_ref[row, head, :]
    wide = lambda x: x.astype(jnp.float32)
    own = part == 0  # the part that holds the new token, which it takes from registers
    top = _capped(jnp.sum(wide(q) * wide(k)[None], axis=1) * scale, cap)
    state = (
        jnp.where(own, top, HIDDEN),
        jnp.where(own, jnp.ones(ROWS, jnp.float32), 0.0),
        jnp.where(own, jnp.broadcast_to(wide(v)[None], q.shape), 0.0),
    )
    over = partial(_over, q, head, part, cut, scale, cap)
    before = shared.length[row] if sharing else 0
    first = _first(before + used, *limits)
    if sharing:
        places = shared.keys, shared.values, shared.source[row]
        state = over(*places, jnp.minimum(first, before), before, state)
    state = over(keys_ref, values_ref, row, jnp.maximum(first - before, 0), used, state)
    top, total, mixed = state

    @pl.when(own)
    def _():
        keys_ref[row, head, used, :] = k
        values_ref[row, head, used, :] = v

    if sinking:
        total = total + jnp.exp(sinks_ref[head, lines] - top)
    if cut == 1:
        out_refs[0][row, head, lines, :] = (mixed / total[:, None]).astype(q.dtype)
    else:
        mixed_ref, top_ref, total_ref = out_refs
        mixed_ref[row, head, part, lines, :] = mixed
        top_ref[row, head, part, lines] = top
        total_ref[row, head, part, lines] = total


def _over(q, head, part, cut, scale, cap, keys_ref, values_ref, line, low, high, state):
    """The running softmax with this part's share of the slots `low` to `high` of a line."""
    begin, end = low // BLOCK, pl.cdiv(high, BLOCK)
    share = pl.cdiv(end - begin, cut)

    def read(block, state):
        top, total, mixed = state
        here = pl.ds(block * BLOCK, BLOCK)
        scores = _capped(_product(q, keys_ref[line, head, here, :], 1) * scale, cap)
        slot = block * BLOCK + jnp.arange(BLOCK)
        seen = (slot >= low) & (slot < high)
        scores = jnp.where(seen[None], scores, HIDDEN)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        less, chance = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
        new = _product(chance.astype(q.dtype), values_ref[line, head, here, :], 0)
        total = total * less + jnp.sum(chance, axis=1)
        return higher, total, mixed * less[:, None] + new

    start = begin + part * share
    return jax.lax.fori_loop(start, jnp.minimum(start + share, end), read, state)


def _first(used, window, chunk):
    """The first slot that a token in slot `used` sees."""
    first = 0 if window is None else jnp.maximum(used + 1 - window, 0)
    return first if chunk is None else jnp.maximum(used - used % chunk, first)


def _product(a, b, axis):
    """float32 sums over a's second axis and `axis` of b."""
    over = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, over, preferred_element_type=jnp.float32)


def _joined(parts_, dtype, interpret):
    """The whole rows' mixed values [B, K, G, h] from those of their parts, in one launch."""
    batch, heads, _, group, width = parts_[0].shape

    def kernel(mixed_ref, top_ref, total_ref, *refs):
        *sinks_ref, y_ref = refs
        row, head, line = (pl.program_id(axis) for axis in range(3))
        top = top_ref[row, head, :, line]
        highest = jnp.max(top, axis=0)
        weight = jnp.exp(top - highest)
        mixed = jnp.sum(mixed_ref[row, head, :, line, :] * weight[:, None], axis=0)
        total = jnp.sum(total_ref[row, head, :, line] * weight, axis=0)
        if sinks_ref:
            total = total + jnp.exp(sinks_ref[0][head, line] - highest)
        y_ref[row, head, line, :] = (mixed / total).astype(dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, heads, group, width), dtype),
        grid=(batch, heads, group),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_attention_join",
    )(*parts_)
