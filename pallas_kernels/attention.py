"""Causal attention within documents, several of which may share a row.

    y[t] = sum_s softmax_s(cap(scale q[t].k[s])) v[s]    over s <= t in t's document, window, chunk

With sinks, one more logit a head takes part in the softmax and has no value (arXiv:2508.10925).
Rows hold documents one after the other, numbered from 1; what follows the last is padding, number
0. A document's chunks (Llama 4) begin at its positions 0, `chunk`, 2 `chunk`, ...; kernels take
each for a document. cuDNN's flash attention (through JAX) takes either whole rows or, on Hopper,
the documents' lengths and offsets. It is compared with the reference once a process before it is
used.
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
    chunk: int | None = None  # tokens of one document that see none of the others


def mask(
    rule: Rule, segments: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Bool[Array, "B 1 1 T T"]:
    """Which keys a query sees: same document and chunk, not later, in the window."""
    back = positions[:, :, None] - positions[:, None, :]
    seen = (back >= 0) & (segments[:, :, None] == segments[:, None, :])
    if rule.window is not None:
        seen = seen & (back < rule.window)
    if rule.chunk is not None:
        number = positions // rule.chunk
        seen = seen & (number[:, :, None] == number[:, None, :])
    return seen[:, None, None]


def without_chunks(rule: Rule, length: int) -> Rule:
    """The rule for rows of `length` tokens whose documents are cut into their chunks."""
    if rule.chunk is None or rule.documents is None:
        return rule._replace(chunk=None)
    # One more for each full chunk, after the token that every document has at least.
    more = max(length - rule.documents, 0) // rule.chunk
    return rule._replace(chunk=None, documents=rule.documents + more)


def chunks(
    rule: Rule, segments: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """The segments with a number for each chunk; padding, which comes last, keeps its 0."""
    if rule.chunk is None or rule.chunk >= segments.shape[1]:
        return segments
    pair = jnp.stack([segments, positions // rule.chunk])
    begins = (pair[:, :, 1:] != pair[:, :, :-1]).any(0)
    number = 1 + jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=segments.dtype)
    return jnp.where(segments > 0, number, 0)


def reference(
    rule: Rule,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K u"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H u"]:
    """Grouped-query attention (arXiv:2305.13245) through all scores, softmax in float32."""
    return masked(q, k, v, mask(rule, segments, positions), rule.scale, rule.cap, sinks)


def masked(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K u"],
    seen: Bool[Array, "B 1 1 T S"],
    scale: float,
    cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H u"]:
    """Attention under any mask."""
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(seen, scores, -1e30)
    if sinks is None:
        probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    else:
        probs = chances(scores, sinks.reshape(1, k.shape[2], -1, 1)).astype(v.dtype)
    return jnp.einsum("bkgts,bsku->btkgu", probs, v).reshape(batch, length, heads, -1)


def chances(scores: Float[Array, "*B S"], sinks: Float[Array, "*#B"]) -> Float[Array, "*B S"]:
    """Softmax over the last axis and one more logit, whose own chance is left out; float32."""
    sinks = sinks.astype(jnp.float32)[..., None]
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
    grown = jnp.exp(scores - top)
    return grown / (grown.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def supports(rule: Rule, q: Any, k: Any, sinks: bool = False) -> str | None:
    """Why cuDNN's attention can't run on these, or None."""
    rule = without_chunks(rule, q.shape[1])
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
    return _disagreement(str(q.dtype), group, q.shape[-1], rule.documents > 1, window, sinks)


def attention(
    rule: Rule,
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K u"],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    implementation: Implementation | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H u"]:
    """Mixed values of every head; padding gets finite numbers that mean nothing.

    cuDNN takes one width: the narrower of keys and values get zeros, which change nothing. Raises
    ValueError with the reason where the implementation asked for can't run.
    """
    alike = one_width(q, k, v)
    reasons = {"cudnn": supports(rule, *alike[:2], sinks is not None), "xla": None}
    if _choice.pick("attention", implementation, reasons) == "xla":
        return checkpoint_name(reference(rule, q, k, v, segments, positions, sinks), KEPT)
    segments = chunks(rule, segments, positions)
    rule = without_chunks(rule, q.shape[1])
    if sinks is None:
        return _cudnn(rule, *alike, segments)[..., : v.shape[-1]]
    return _sunk(rule, *alike, segments, sinks)[..., : v.shape[-1]]


def one_width(*heads: Array) -> list[Array]:
    """Queries, keys and values as wide as the widest, with zeros behind them."""
    widest = max(x.shape[-1] for x in heads)
    room = lambda x: ((0, 0),) * 3 + ((0, widest - x.shape[-1]),)
    return [x if x.shape[-1] == widest else jnp.pad(x, room(x)) for x in heads]


def _cudnn(rule, q, k, v, segments, statistics=False):
    """Mixed values; with `statistics` also the logs of sums that `_over_sinks` reads."""
    # The public function takes no offsets.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    mask_type, window, (lengths, starts) = _masking(rule, q.shape[1], segments)
    return dot_product_attention(
        q, k, v, scale=rule.scale, sliding_window_length=window, mask_type=mask_type,
        q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        return_residual=statistics,
    )  # fmt: skip


def _masking(rule, length, segments):
    """(cuDNN's kind of mask, its window, documents' `spans` or two None)."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType

    window = rule.window if rule.window is not None and rule.window < length else None
    if rule.documents == 1:
        # Padding comes last, so no token of the document sees it.
        return MaskType.CAUSAL, window, (None, None)
    return MaskType.PADDING_CAUSAL, window, spans(segments, rule.documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sunk(rule, q, k, v, segments, sinks):
    """cuDNN's mixed values less the sinks' shares: times sigmoid(log of the sum - sink)."""
    return _sunk_forward(rule, q, k, v, segments, sinks)[0]


def _sunk_forward(rule, q, k, v, segments, sinks):
    y, sums = _cudnn(rule, q, k, v, segments, statistics=True)
    kept = jax.nn.sigmoid(_over_sinks(rule, sums, segments, sinks))
    y = (y.astype(jnp.float32) * kept[..., None]).astype(y.dtype)
    return y, (q, k, v, segments, sinks, y, sums)


def _sunk_backward(rule, saved, dy):
    """cuDNN's backward pass with the sinks in its sums: what it finds of q, k and v is then right.

    A sink's own gradient is minus its chance times y . dy.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    q, k, v, segments, sinks, y, sums = saved
    mask_type, window, found = _masking(rule, q.shape[1], segments)
    none = jnp.zeros(0, q.dtype)
    lengths, starts = (none if x is None else x for x in found)
    whole = jnp.logaddexp(sums, sinks.astype(jnp.float32)[None, :, None])
    residuals = q, k, v, none, lengths, lengths, starts, starts, none, none, whole, y
    dq, dk, dv, *_ = cudnn._dot_product_attention.bwd(
        rule.scale, 0, 0.0, (False, False), mask_type, cudnn.AttentionLayout.BTNH.value, window,
        0, False, residuals, dy,
    )  # fmt: skip
    chance = jax.nn.sigmoid(-_over_sinks(rule, sums, segments, sinks))
    mixed = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(-1)
    return dq, dk, dv, None, -(chance * mixed).sum((0, 1)).astype(sinks.dtype)


_sunk.defvjp(_sunk_forward, _sunk_backward)


def _over_sinks(rule, sums, segments, sinks):
    """The log of each token's sum of exponentials less its head's sink, float32 [B, T, H].

    cuDNN has these logs as [B, H, T], or where rows hold several documents with a row for each of
    all documents, from its first token on.
    """
    if rule.documents > 1:
        lengths, starts = spans(segments, rule.documents)
        count = (lengths > 0).sum(-1)
        token = jnp.arange(segments.shape[1])
        begun = (starts[:, :, None] >= 0) & (starts[:, :, None] <= token[None, None])
        nth = begun.sum(1) - 1
        row = (jnp.cumsum(count) - count)[:, None] + nth
        sums = sums[row, :, token[None] - jnp.take_along_axis(starts, nth, axis=1)]
    else:
        sums = sums.swapaxes(1, 2)
    return sums - sinks.astype(jnp.float32)[None, None]


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
def _disagreement(
    dtype: str, group: int, width: int, packed: bool, window: bool, sinks: bool = False
) -> str | None:
    """What sets cuDNN apart from the reference on a small example of this class, or None."""
    # Tracing belongs to a thread: in another one this runs while a caller's function is traced.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_compared, dtype, group, width, packed, window, sinks).result()


def _compared(
    dtype: str, group: int, width: int, packed: bool, window: bool, sinks: bool = False
) -> str | None:
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

    some = (jnp.asarray(rng.normal(1, 2, heads), jnp.float32),) if sinks else ()

    # Given as arguments: XLA would compute with constants while it compiles.
    def values(fn, g, segments, positions, *inputs):
        real = (segments > 0)[..., None, None]

        def out(q, k, v, *some):
            y = fn(rule, q, k, v, segments, positions, *some)
            return jnp.where(real, y, 0).astype(jnp.float32)

        y, back = jax.vjp(out, *inputs)
        return [y, *back(jnp.where(real, g, 0).astype(jnp.float32))]

    given = g, jnp.asarray(segments), jnp.asarray(positions), q, k, v, *some
    by_offsets = lambda rule, q, k, v, segments, _, *some: (_sunk if some else _cudnn)(
        rule, q, k, v, segments, *some
    )
    try:
        found = jax.jit(functools.partial(values, by_offsets))(*given)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        return f"cuDNN refuses it on this GPU: {str(error).splitlines()[0]}"
    expected = jax.jit(functools.partial(values, reference))(*given)
    names = ("y", "dq", "dk", "dv", "dsinks")
    for name, got, want in zip(names, found, expected, strict=False):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        error = np.abs(got - want).max() / np.abs(want).max()
        if not error <= TOLERANCE:
            return f"on this GPU its {name} is {error:.2g} of the largest value off the reference"
    return None
