"""Rows cast to e4m3: the kernel in interpret mode, bit by bit, and what scales do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _choice, e4m3

ROWS = 6
SIZES = jnp.asarray([0.0, 1e-38, 1e-20, 1e-3, 1.0, 1e20])
# Half of 2^-3 at most, and in the mean a twelfth of its square, of numbers in [1, 2).
TYPICAL = 2.0**-3 / math.sqrt(12)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def interpreted(xs, factors=None):
    with _choice.target("gpu", interpret=True):
        return e4m3.cast_rows(xs, factors, "pallas")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("widths", [(64,), (192, 256, 32)])
def test_the_kernel_equals_the_reference_bit_for_bit(widths, dtype):
    xs = [(draw(n, ROWS, w) * SIZES[:, None]).astype(dtype) for n, w in enumerate(widths)]
    factors = [jnp.exp(draw(9, w)) if n != 1 else None for n, w in enumerate(widths)]
    for given in (None, factors):
        got, wanted = interpreted(xs, given), e4m3.reference(xs, given)
        assert jax.tree.structure(got) == jax.tree.structure(wanted)
        for ours, theirs in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


def test_rows_of_zeros_and_of_any_size_are_cast_safely():
    x = draw(0, ROWS, 256) * SIZES[:, None]
    (x8,), scale, inverse = e4m3.cast_rows([x])
    back = x8.astype(jnp.float32) * scale
    np.testing.assert_array_equal(back[:2], np.zeros((2, 256)))
    error = jnp.linalg.norm(back - x, axis=-1)
    assert jnp.all(error[2:] <= TYPICAL * jnp.linalg.norm(x[2:], axis=-1))
    np.testing.assert_array_equal(scale * inverse, np.ones((ROWS, 1)))
    assert jnp.all(jnp.frexp(scale)[0] == 0.5)
    largest = jnp.abs(x8.astype(jnp.float32)).max(-1)[2:]
    assert jnp.all((largest >= 128) & (largest <= 256))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    x = draw(0, ROWS, 64).at[4, 3].set(bad)
    for (x8,), _, _ in (e4m3.cast_rows([x]), interpreted([x])):
        assert not jnp.isfinite(x8[4, 3].astype(jnp.float32))
        assert jnp.isfinite(x8[:4].astype(jnp.float32)).all()


def test_arrays_of_one_sum_share_a_scale():
    xs = [draw(0, ROWS, 64), draw(1, ROWS, 128) * 1000]
    _, both, _ = e4m3.cast_rows(xs)
    _, second, _ = e4m3.cast_rows(xs[1:])
    np.testing.assert_array_equal(both, second)


def test_the_kernel_lowers_for_a_gpu():
    xs = [jax.ShapeDtypeStruct((ROWS, w), jnp.bfloat16) for w in (14336, 576)]
    with _choice.target("gpu"):
        traced = jax.jit(lambda *xs: e4m3.cast_rows(xs)).trace(*xs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1 and "stablehlo.reduce" not in text


@pytest.mark.parametrize("widths", [(72,), (65536, 64)])
def test_widths_that_the_kernel_cannot_take_are_refused_by_name(widths):
    xs = [jnp.ones((2, width)) for width in widths]
    with _choice.target("gpu", interpret=True):
        with pytest.raises(ValueError, match="widths of 16 n, 65536 in all"):
            e4m3.cast_rows(xs, None, "pallas")
        assert e4m3.cast_rows(xs)[0][0].dtype == e4m3.E4M3


def test_without_a_fitting_gpu_naming_the_kernel_raises(monkeypatch):
    x = [jnp.ones((2, 64))]
    with pytest.raises(ValueError, match="needs a GPU"):
        e4m3.cast_rows(x, None, "pallas")
    monkeypatch.setattr(_choice, "capability", lambda: 8.6)
    with _choice.target("gpu"), pytest.raises(ValueError, match="8.9, this GPU has 8.6"):
        e4m3.cast_rows(x, None, "pallas")
