"""Causal attention within documents, several of which may share a row.

    y[t] = sum_s softmax_s(cap(scale q[t].k[s])) v[s]    over s <= t in t's document and window

Rows hold documents one after the other, numbered from 1; what follows the last is padding, number
0. cuDNN's flash attention (through JAX) takes either whole rows or, on Hopper, the documents'
lengths and offsets. It is compared with the reference once a process before it is used.
"""

import concurrent.futures
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _choice

Implementation = Literal["cudnn", "xla"]
# The result's name for `jax.checkpoint`. cuDNN's is kept with the softmax statistics that its
# backward needs, by the name of JAX's primitive.
KEPT, KEPT_BY_CUDNN = "attn", "dot_product_attention_fwd_wrapper"
TOLERANCE = 2e-2  # of the largest value: bfloat16 rounds what is summed


class Rule(NamedTuple):
    """What is static. `documents` is the most that a row holds; None where that isn't known."""

    scale: float
    window: int | None = None  # tokens seen, the own one included
    cap: float | None = None
    documents: int | None = None


def mask(
    rule: Rule, segments: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Bool[Array, "B 1 1 T T"]:
    """Which keys a query sees: same document, not later, in the window."""
    back = positions[:, :, None] - positions[:, None, :]
    seen = (back >= 0) & (segments[:, :, None] == segments[:, None, :])
    if rule.window is not None:
        seen = seen & (back < rule.window)
    return seen[:, None, None]


def reference(
    rule: Rule,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K u"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T H u"]:
    """Grouped-query attention (arXiv:2305.13245) through all scores, softmax in float32."""
    return masked(q, k, v, mask(rule, segments, positions), rule.scale, rule.cap)


def masked(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K u"],
    seen: Bool[Array, "B 1 1 T S"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T H u"]:
    """Attention under any mask."""
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    probs = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bsku->btkgu", probs, v).reshape(batch, length, heads, -1)


def supports(rule: Rule, q: Any, k: Any) -> str | None:
    """Why cuDNN's attention can't run on these, or None."""
    if _choice.platform() != "gpu":
        return "it needs an NVIDIA GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"it takes heads of 8 n up to 128, not {q.shape[-1]}"
    if rule.cap is not None:
        return "it has no soft-cap"
    if rule.documents is None:
        return "how many documents a row holds at most isn't known"
    if jax.default_backend() != "gpu":
        return "it is lowered by asking the GPU, and there is none here"
    oldest = 9.0 if rule.documents > 1 else 8.0
    if old := _choice.older(oldest):
        return old
    window = rule.window is not None and rule.window < q.shape[1]
    group = q.shape[2] // k.shape[2]
    return _disagreement(str(q.dtype), group, q.shape[-1], rule.documents > 1, window)


def attention(
    rule: Rule,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K u"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    implementation: Implementation | None = None,
) -> Float[Array, "B T H u"]:
    """Mixed values of every head; padding gets finite numbers that mean nothing.

    cuDNN takes one width: the narrower of keys and values get zeros, which change nothing. Raises
    ValueError with the reason where the implementation asked for can't run.
    """
    alike = one_width(q, k, v)
    reasons = {"cudnn": supports(rule, *alike[:2]), "xla": None}
    if _choice.pick("attention", implementation, reasons) == "xla":
        return checkpoint_name(reference(rule, q, k, v, segments, positions), KEPT)
    return _cudnn(rule, *alike, segments)[..., : v.shape[-1]]


def one_width(*heads: Array) -> list[Array]:
    """Queries, keys and values as wide as the widest, with zeros behind them."""
    widest = max(x.shape[-1] for x in heads)
    room = lambda x: ((0, 0),) * 3 + ((0, widest - x.shape[-1]),)
    return [x if x.shape[-1] == widest else jnp.pad(x, room(x)) for x in heads]


def _cudnn(rule, q, k, v, segments):
    # The public function takes no offsets.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    window = rule.window if rule.window is not None and rule.window < q.shape[1] else None
    call = functools.partial(
        dot_product_attention, q, k, v, scale=rule.scale, sliding_window_length=window
    )
    if rule.documents == 1:
        # Padding comes last, so no token of the document sees it.
        return call(mask_type=MaskType.CAUSAL)
    lengths, starts = spans(segments, rule.documents)
    return call(
        mask_type=MaskType.PADDING_CAUSAL,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
    )


def spans(
    segments: Int[Array, "B T"], documents: int
) -> tuple[Int[Array, "B _"], Int[Array, "B _"]]:
    """(lengths [B, documents + 1], first tokens [B, documents + 2]), -1 where there is none.

    Padding counts as one more document: what nobody computes would stay uninitialised memory.
    """
    numbers = jnp.concatenate([jnp.arange(1, documents + 1), jnp.zeros(1)]).astype(jnp.int32)
    lengths = (segments[:, None, :] == numbers[None, :, None]).sum(-1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    there = lengths > 0
    # cuDNN's list has no holes: the documents first, then the padding.
    order = jnp.argsort(~there, axis=1, stable=True)
    lengths, starts = (
        jnp.take_along_axis(jnp.where(there, x, -1), order, axis=1) for x in (lengths, starts)
    )
    return lengths, jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)


@functools.cache
def _disagreement(dtype: str, group: int, width: int, packed: bool, window: bool) -> str | None:
    """What sets cuDNN apart from the reference on a small example of this class, or None."""
    # Tracing belongs to a thread: in another one this runs while a caller's function is traced.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_compared, dtype, group, width, packed, window).result()


def _compared(dtype: str, group: int, width: int, packed: bool, window: bool) -> str | None:
    rng = np.random.default_rng(0)
    batch, length, kv_heads = 2, 256, 2
    heads = kv_heads * group
    q, k, v, g = (
        jnp.asarray(rng.normal(0, 1, (batch, length, n, width)), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    bounds = [[100, 107, 230], [64, 200, 256]] if packed else [[200], [256]]
    segments = np.zeros((batch, length), np.int32)
    positions = np.zeros((batch, length), np.int32)
    for row, ends in enumerate(bounds):
        for n, (start, end) in enumerate(zip([0, *ends], [*ends, length], strict=True)):
            segments[row, start:end] = (n + 1) % (len(ends) + 1)
            positions[row, start:end] = np.arange(end - start)
    rule = Rule(width**-0.5, window=50 if window else None, documents=3 if packed else 1)

    # Given as arguments: XLA would compute with constants while it compiles.
    def values(fn, q, k, v, g, segments, positions):
        real = (segments > 0)[..., None, None]

        def out(q, k, v):
            y = fn(rule, q, k, v, segments, positions)
            return jnp.where(real, y, 0).astype(jnp.float32)

        y, back = jax.vjp(out, q, k, v)
        return [y, *back(jnp.where(real, g, 0).astype(jnp.float32))]

    given = q, k, v, g, jnp.asarray(segments), jnp.asarray(positions)
    by_offsets = lambda rule, q, k, v, segments, positions: _cudnn(rule, q, k, v, segments)
    try:
        found = jax.jit(functools.partial(values, by_offsets))(*given)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        return f"cuDNN refuses it on this GPU: {str(error).splitlines()[0]}"
    expected = jax.jit(functools.partial(values, reference))(*given)
    names = ("y", "dq", "dk", "dv")
    for name, got, want in zip(names, found, expected, strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        error = np.abs(got - want).max() / np.abs(want).max()
        if not error <= TOLERANCE:
            return f"on this GPU its {name} is {error:.2g} of the largest value off the reference"
    return None
