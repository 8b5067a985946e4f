"""Attention of one token a row over its cache: the kernel against the reference and by itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _choice
from pallas_kernels import decode_attention as op

# batch, kv heads, queries a head, slots, head width
SHAPES = {
    "one row": (1, 2, 4, 256, 64),
    "ragged": (5, 2, 3, 128, 32),
    "no groups": (2, 3, 1, 64, 16),
    "full matrix unit": (2, 1, 16, 128, 64),
}
CASES = [
    ("one row", None), ("one row", 100), ("ragged", None), ("ragged", 1), ("ragged", 40),
    ("no groups", 20), ("full matrix unit", 100),
]  # fmt: skip


def example(name: str, dtype=jnp.bfloat16) -> tuple:
    """(q, k, v, keys, values, used) with rows that hold 0 tokens, all slots but one, and some."""
    batch, heads, group, slots, width = SHAPES[name]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)
    used = np.resize([slots - 1, 0, 63, 64, 17], batch)
    rows = draw(batch, heads * group, width), draw(batch, heads, width), draw(batch, heads, width)
    caches = (draw(batch, heads, slots, width) for _ in range(2))
    return *rows, *caches, jnp.asarray(used, jnp.int32)


def by_hand(q, k, v, keys, values, used, scale, window, chunk=None, sinks=None) -> np.ndarray:
    """float64 [B, H, h], a query at a time."""
    q, k, v, keys, values = (np.asarray(x, np.float64) for x in (q, k, v, keys, values))
    out, group = np.zeros((*q.shape[:2], v.shape[2])), q.shape[1] // k.shape[1]
    for b, n in enumerate(np.asarray(used)):
        first = 0 if window is None else max(0, n + 1 - window)
        first = first if chunk is None else max(first, n - n % chunk)
        for i in range(q.shape[1]):
            j = i // group
            seen = np.concatenate([keys[b, j, first:n], k[b, j][None]])
            weights = np.exp(seen @ q[b, i] * scale)
            mixed = np.concatenate([values[b, j, first:n], v[b, j][None]])
            sink = 0.0 if sinks is None else np.exp(float(sinks[i]))
            out[b, i] = weights @ mixed / (weights.sum() + sink)
    return out


def close(got, want, limit: float) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("name, window", CASES)
def test_the_reference_equals_a_sum_by_hand(name, window):
    args = example(name, jnp.float32)
    scale = SHAPES[name][-1] ** -0.5
    y, keys, values = op.attend(*args, scale=scale, window=window, implementation="xla")
    close(y, by_hand(*args, scale, window), 1e-5)
    rows = np.arange(len(args[-1]))
    for cache, old, new in zip((keys, values), args[3:5], args[1:3], strict=True):
        want = np.asarray(old).copy()
        want[rows, :, np.asarray(args[-1])] = new
        np.testing.assert_array_equal(cache, want)


def test_values_may_have_another_width_than_keys():
    q, k, v, keys, values, used = example("ragged", jnp.float32)
    args = q, k, v[..., :24], keys, values[..., :24], used
    y, _, new = op.attend(*args, scale=0.2, window=None)
    close(y, by_hand(*args, 0.2, None), 1e-5)
    assert new.shape == args[4].shape
    half = [x.astype(jnp.bfloat16) for x in args[:-1]]
    with _choice.target("gpu"), pytest.raises(ValueError, match="one width, got 32 and 24"):
        op.attend(*half, used, scale=0.2, implementation="pallas")


@pytest.mark.parametrize(
    "name, window, cut", [(*case, 1) for case in CASES] + [("one row", 100, 4), ("ragged", 40, 2)]
)
def test_the_kernel_equals_the_reference(name, window, cut):
    args = example(name)
    scale = SHAPES[name][-1] ** -0.5
    want = op.reference(*args, scale, window)
    got = op._pallas(*args, scale, window, cut=cut, interpret=True)
    close(got[0], want[0], 1e-2)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name, cut", [("one row", 1), ("one row", 4), ("ragged", 2)])
def test_sinks_take_their_share_in_reference_and_kernel(name, cut):
    args, scale = example(name), SHAPES[name][-1] ** -0.5
    sinks = jnp.asarray(np.random.default_rng(1).normal(1, 2, args[0].shape[1]), jnp.bfloat16)
    exact = by_hand(*args, scale, 40, sinks=sinks)
    wide = [x.astype(jnp.float32) for x in args[:-1]] + [args[-1]]
    close(op.attend(*wide, scale=scale, window=40, sinks=sinks)[0], exact, 1e-5)
    got = op._pallas(*args, scale, 40, sinks=sinks, cut=cut, interpret=True)
    close(got[0], exact, 1e-2)
    assert np.abs(by_hand(*args, scale, 40) - exact).max() > 0.1 * np.abs(exact).max()
    with _choice.target("gpu"):
        run = lambda sinks, *args: op._pallas(*args, scale, 40, sinks=sinks, cut=cut)
        text = jax.jit(run).trace(sinks, *args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("output_operand_alias<") == 2


@pytest.mark.parametrize("window, chunk, cut", [(None, 63, 1), (None, 32, 2), (20, 64, 1)])
def test_a_token_sees_no_chunk_but_its_own(window, chunk, cut):
    args, scale = example("ragged", jnp.float32), SHAPES["ragged"][-1] ** -0.5
    limits = dict(window=window, chunk=chunk)
    y, *_ = op.attend(*args, scale=scale, **limits, implementation="xla")
    close(y, by_hand(*args, scale, **limits), 1e-5)
    args = example("ragged")
    got = op._pallas(*args, scale, **limits, cut=cut, interpret=True)
    close(got[0], op.reference(*args, scale, **limits)[0], 1e-2)


def with_prefixes(args: list, seed: int = 3) -> tuple[op.Shared, list]:
    """(prefixes of three lengths that rows share, the arguments with them copied into the rows)."""
    q, k, v, keys, values, used = args
    rng, rows = np.random.default_rng(seed), len(used)
    made = lambda x: jnp.asarray(rng.normal(0, 1, (3, x.shape[1], 128, x.shape[3])), x.dtype)
    pools, source = (made(keys), made(values)), rng.integers(0, 3, rows).astype(np.int32)
    length = np.asarray([128, 70, 1], np.int32)[source]
    whole = []
    for pool, own in zip(pools, (keys, values), strict=True):
        lines = [jnp.concatenate([pool[s, :, :n], x, jnp.zeros_like(x[:, : 128 - n])], axis=1)
                 for s, n, x in zip(source, length, own, strict=True)]  # fmt: skip
        whole.append(jnp.stack(lines))
    shared = op.Shared(*pools, jnp.asarray(source), jnp.asarray(length))
    return shared, [q, k, v, *whole, used + length]


@pytest.mark.parametrize(
    "limits, cut", [({}, 1), ({}, 2), ({"window": 40}, 1), ({"window": 150}, 2), ({"chunk": 64}, 1)]
)
def test_rows_may_share_what_stands_before_their_own_caches(limits, cut):
    scale = SHAPES["ragged"][-1] ** -0.5
    args = example("ragged", jnp.float32)
    shared, whole = with_prefixes(args)
    y, *caches = op.attend(*args, scale=scale, **({"window": None} | limits), shared=shared)
    close(y, by_hand(*whole, scale, **({"window": None} | limits)), 1e-5)
    for cache, want in zip(caches, op.reference(*args, scale)[1:], strict=True):
        np.testing.assert_array_equal(cache, want)
    args = example("ragged")
    shared, whole = with_prefixes(args)
    got = op._pallas(*args, scale, **({"window": None} | limits), shared=shared, cut=cut,
                     interpret=True)  # fmt: skip
    close(got[0], op.reference(*whole, scale, **limits)[0], 1e-2)


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("name", ["one row", "ragged"])
def test_the_kernel_lowers_for_a_gpu_and_writes_the_caches_in_place(name, cut):
    args = example(name)
    with _choice.target("gpu"):
        assert op.supports(args[0], *args[3:5]) is None
        run = lambda *args: op._pallas(*args, 0.125, 40, cut=cut)
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        shared, _ = with_prefixes(args)
        assert op.supports(args[0], *args[3:5], shared) is None
        run = lambda shared, *args: op._pallas(*args, 0.125, 40, shared=shared, cut=cut)
        other = jax.jit(run).trace(shared, *args).lower(lowering_platforms=("cuda",)).as_text()
    for lowered in (text, other):
        assert lowered.count("custom_call @__gpu$xla.gpu.triton") == (1 if cut == 1 else 2)
        assert lowered.count("output_operand_alias<") == 2


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, "needs a GPU"),
        (dict(dtype=jnp.float32), "one 16-bit dtype"),
        (dict(width=48), "a power of two"),
        (dict(slots=100), "blocks of 64"),
        (dict(heads=34), "up to 16 queries"),
        (dict(batch=2**17, slots=256), "passes 2\\^31"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_reason(change, reason):
    size = dict(batch=1, heads=4, slots=64, width=64, dtype=jnp.bfloat16) | change
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, size["dtype"])
    q = shape(size["batch"], size["heads"], size["width"])
    cache = shape(size["batch"], 2, size["slots"], size["width"])
    new = shape(size["batch"], 2, size["width"])
    used = jax.ShapeDtypeStruct((size["batch"],), jnp.int32)
    ask = lambda *args: op.attend(*args, scale=1.0, implementation="pallas")
    with _choice.target("gpu" if change else "cpu"), pytest.raises(ValueError, match=reason):
        jax.eval_shape(ask, q, new, new, cache, cache, used)


def test_short_batches_are_cut_so_that_every_multiprocessor_has_work():
    for batch, heads, slots in ((1, 8, 512), (1, 8, 65536), (8, 8, 512), (128, 8, 512)):
        cut = op.parts(batch, heads, slots)
        assert cut & (cut - 1) == 0 and cut <= slots // op.BLOCK
        assert cut == 1 or batch * heads * cut <= op.PROGRAMS
        assert batch * heads * cut >= min(op.PROGRAMS / 2, batch * heads * slots / op.BLOCK)
    assert math.isclose(op.parts(128, 8, 512), 1)
