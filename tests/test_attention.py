"""Attention of packed rows: against torch's, against each document alone, and who may run it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import _choice, attention
from pallas_kernels.attention import Rule

B, T, H, K, D = 2, 24, 4, 2, 16
DOCUMENTS = [[5, 9, 4], [16, 8]]  # the first row ends with 6 tokens of padding
rng = np.random.default_rng(0)
Q, KEYS, V, G = (jnp.asarray(rng.normal(0, 1, (B, T, n, D)), jnp.float32) for n in (H, K, K, H))


def numbered(documents=DOCUMENTS, length=T):
    segments, positions = (np.zeros((len(documents), length), np.int32) for _ in range(2))
    for row, sizes in enumerate(documents):
        at = 0
        for n, size in enumerate(sizes, start=1):
            segments[row, at : at + size], positions[row, at : at + size] = n, np.arange(size)
            at += size
    return jnp.asarray(segments), jnp.asarray(positions)


def in_torch(q, k, v, window):
    """Causal attention of one document [T, n, D], within the window."""
    q, k, v = (torch.tensor(np.asarray(x)).transpose(0, 1)[None] for x in (q, k, v))
    t = q.shape[2]
    back = torch.arange(t)[:, None] - torch.arange(t)[None]
    seen = (back >= 0) & (back < (window or t))
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=True, scale=0.3
    )
    return y[0].transpose(0, 1).numpy()


@pytest.mark.parametrize("window", [None, 3, 100])
def test_packed_documents_are_attended_as_torch_attends_each_alone(window):
    rule = Rule(0.3, window, documents=3)
    y = attention.attention(rule, Q, KEYS, V, *numbered())
    for row, sizes in enumerate(DOCUMENTS):
        ends = np.cumsum(sizes)
        for start, end in zip(ends - sizes, ends, strict=True):
            here = (row, slice(start, end))
            expected = in_torch(Q[here], KEYS[here], V[here], window)
            np.testing.assert_allclose(y[here], expected, atol=2e-6)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("width", [8, 40])
def test_values_of_another_width_are_mixed_as_torch_does(width):
    v = jnp.asarray(rng.normal(0, 1, (B, T, K, width)), jnp.float32)
    rule = Rule(0.3, documents=1)
    alone = numbered([[T], [T]])
    y = attention.attention(rule, Q, KEYS, v, *alone)
    for row in range(B):
        np.testing.assert_allclose(y[row], in_torch(Q[row], KEYS[row], v[row], None), atol=2e-6)
    wide = attention.one_width(Q, KEYS, v)
    assert {x.shape[-1] for x in wide} == {max(D, width)}
    np.testing.assert_allclose(attention.reference(rule, *wide, *alone)[..., :width], y, atol=2e-6)


def test_values_of_another_width_reach_the_kernel_as_wide_as_keys(monkeypatch):
    v, rule, alone = V[..., :8], Rule(0.3, documents=1), numbered([[T], [T]])
    called = lambda rule, q, k, v, segments: (
        attention.reference(rule, q, k, v, *alone) + v.shape[-1]
    )
    monkeypatch.setattr(attention, "_cudnn", called)
    monkeypatch.setattr(attention, "supports", lambda *_: None)
    y = attention.attention(rule, Q, KEYS, v, *alone, "cudnn")
    expected = attention.reference(rule, Q, KEYS, v, *alone) + D
    np.testing.assert_allclose(y, expected, atol=2e-6)


SINKS = jnp.asarray([-0.5, 3.0, 0.2, -40.0])


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_takes_its_share_of_each_heads_softmax_and_no_value(window):
    """In torch: one more key whose score is the sink, and whose value is 0."""
    (y, back), rule = jax.vjp(
        lambda *args: attention.attention(
            Rule(0.3, window, documents=3), *args[:3], *numbered(), sinks=args[3]
        ),
        Q, KEYS, V, SINKS,
    ), 0.3  # fmt: skip
    q, k, v, sinks = (torch.tensor(np.asarray(x), requires_grad=True) for x in (Q, KEYS, V, SINKS))
    k2, v2 = (x.repeat_interleave(H // K, dim=2) for x in (k, v))
    segments, positions = map(np.asarray, numbered())
    back_by = positions[:, :, None] - positions[:, None]
    seen = (back_by >= 0) & (back_by < (window or T)) & (segments[:, :, None] == segments[:, None])
    scores = torch.einsum("bthd,bshd->bhts", q, k2) * rule
    scores = scores.masked_fill(~torch.tensor(seen)[:, None], -torch.inf)
    more = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    chances = torch.cat([scores, more], -1).softmax(-1)[..., :-1]
    want = torch.einsum("bhts,bshd->bthd", chances, v2)
    np.testing.assert_allclose(y, want.detach().numpy(), atol=2e-6)
    want.backward(torch.tensor(np.asarray(G)))
    for ours, theirs in zip(back(G), (q, k, v, sinks), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("window", [None, 3])
def test_chunks_of_a_document_are_attended_as_torch_attends_each_alone(chunk, window):
    rule = Rule(0.3, window, documents=3, chunk=chunk)
    y = attention.attention(rule, Q, KEYS, V, *numbered())
    for row, sizes in enumerate(DOCUMENTS):
        ends = np.cumsum(sizes)
        for start, end in zip(ends - sizes, ends, strict=True):
            for at in range(start, end, chunk):
                here = (row, slice(at, min(at + chunk, end)))
                expected = in_torch(Q[here], KEYS[here], V[here], window)
                np.testing.assert_allclose(y[here], expected, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 3, 8, 23, 24, 100])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[T], [T - 1]], [[1, 1, 22], [8, 8, 8]]], ids=str)
def test_what_kernels_take_for_documents_are_chunks_and_no_more_than_is_said(documents, chunk):
    segments, positions = numbered(documents)
    rule = Rule(0.3, documents=max(map(len, documents)), chunk=chunk)
    pieces, plain = (
        attention.chunks(rule, segments, positions), attention.without_chunks(rule, T),
    )  # fmt: skip
    assert plain.chunk is None and pieces.max() <= plain.documents
    np.testing.assert_array_equal(pieces == 0, segments == 0)
    # All numbers from 1 on are there, as `spans` takes them.
    assert all(set(range(1, row.max() + 1)) <= set(row.tolist()) for row in np.asarray(pieces))
    want = attention.reference(rule, Q, KEYS, V, segments, positions)
    got = attention.reference(plain, Q, KEYS, V, pieces, positions)
    real = np.asarray(segments) > 0
    np.testing.assert_array_equal(np.asarray(got)[real], np.asarray(want)[real])


def test_a_kernel_is_given_chunks_in_the_place_of_documents(monkeypatch):
    told = {}
    monkeypatch.setattr(attention, "supports", lambda *_: None)
    monkeypatch.setattr(
        attention,
        "_cudnn",
        lambda rule, q, k, v, segments: told.update(rule=rule, ids=segments) or q,
    )
    monkeypatch.setattr(_choice, "pick", lambda *_: "cudnn")
    rule = Rule(0.3, documents=3, chunk=4)
    attention.attention(rule, Q, KEYS, V, *numbered())
    assert told["rule"] == Rule(0.3, documents=8)
    assert told["ids"][0, :10].tolist() == [1, 1, 1, 1, 2, 3, 3, 3, 3, 4]


def without_windows(rule, q, k, v, segments):
    """What a kernel that forgot the window would answer."""
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return attention.reference(rule._replace(window=None), q, k, v, segments, positions)


def one_document(rule, q, k, v, segments):
    """What a kernel that forgot where documents end would answer."""
    return without_windows(rule, q, k, v, jnp.ones_like(segments))


@pytest.mark.parametrize(
    "kernel, packed, window, said",
    [
        (without_windows, True, False, None),
        (without_windows, False, True, "y is .* off the reference"),
        (one_document, True, False, "y is .* off the reference"),
    ],
)
def test_a_kernel_is_compared_before_its_first_use(monkeypatch, kernel, packed, window, said):
    monkeypatch.setattr(attention, "_cudnn", kernel)
    found = attention._compared("float32", 2, 16, packed, window)
    assert found is None if said is None else re.search(said, found)


def test_a_soft_cap_bounds_what_softmax_sees():
    alone = numbered([[T], [T]])
    capped = attention.reference(Rule(50.0, cap=1e-3), Q, KEYS, V, *alone)
    # Scores of nearly 0 weigh all earlier tokens alike.
    mean = (
        jnp.cumsum(jnp.repeat(V, H // K, axis=2), axis=1)
        / jnp.arange(1, T + 1)[None, :, None, None]
    )
    np.testing.assert_allclose(capped, mean, atol=1e-2)


def test_spans_list_documents_then_padding_without_holes():
    lengths, starts = attention.spans(numbered()[0], documents=4)
    assert lengths.tolist() == [[5, 9, 4, 6, -1], [16, 8, -1, -1, -1]]
    assert starts.tolist() == [[0, 5, 14, 18, -1, -1], [0, 16, -1, -1, -1, -1]]


@pytest.mark.parametrize("documents", [1, 3])
def test_each_token_finds_its_own_sum_among_those_of_cudnn(documents):
    """Documents of all rows, padding too, follow each other; each has a row of its own."""
    rule = Rule(0.3, documents=documents)
    segments, positions = numbered() if documents > 1 else numbered([[20], [T]])
    want = rng.normal(0, 1, (B, T, H)).astype(np.float32)
    sums = np.full((B * (documents + 1), H, T), np.nan, np.float32)
    lengths, starts = (np.asarray(x) for x in attention.spans(segments, documents))
    spans = [(b, starts[b, i], n) for (b, i), n in np.ndenumerate(lengths) if n > 0]
    for row, (b, at, n) in zip(sums, spans, strict=False):
        row[:, :n] = want[b, at : at + n].T
    given = jnp.asarray(sums if documents > 1 else want.swapaxes(1, 2))
    found = attention._over_sinks(rule, given, segments, SINKS)
    np.testing.assert_allclose(found, want - np.asarray(SINKS), atol=1e-6)


def shape(heads, width, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, 64, heads, width), dtype)


def test_without_a_gpu_cudnn_is_refused_by_name_and_not_taken():
    with pytest.raises(ValueError, match="'cudnn' can't run: it needs an NVIDIA GPU"):
        attention.attention(Rule(1.0, documents=1), Q, KEYS, V, *numbered(), "cudnn")
    with _choice.target("gpu"):
        assert "GPU" in attention.supports(Rule(1.0, documents=1), shape(4, 64), shape(2, 64))


@pytest.mark.parametrize(
    "why, rule, q",
    [
        ("float32", Rule(1.0, documents=1), shape(4, 64, jnp.float32)),
        ("not 20", Rule(1.0, documents=1), shape(4, 20)),
        ("not 256", Rule(1.0, documents=1), shape(4, 256)),
        ("soft-cap", Rule(1.0, cap=30.0, documents=1), shape(4, 64)),
        ("isn't known", Rule(1.0), shape(4, 64)),
    ],
)
def test_what_cudnn_cannot_do_has_a_reason(why, rule, q):
    with _choice.target("gpu"):
        assert why in attention.supports(rule, q, shape(2, 64))
