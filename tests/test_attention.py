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
    monkeypatch.setattr(attention, "supports", lambda rule, q, k: None)
    y = attention.attention(rule, Q, KEYS, v, *alone, "cudnn")
    expected = attention.reference(rule, Q, KEYS, v, *alone) + D
    np.testing.assert_allclose(y, expected, atol=2e-6)


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
