"""The 8-bit Adam kernel in interpret mode, code by code, and its lowering for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from pallas_kernels import _choice
from pallas_kernels import adam8_update as kernel
from unsloth_jax import adam8

MAPS = {"signed": kernel.SIGNED, "unsigned": kernel.UNSIGNED}
# Products of these with gradients of 8 bits are exact: a fused multiply-add rounds as two steps.
RATES = kernel.Rates(0.5, 0.25, 1e-8)
# Whole programs; blocks that fill no program; a short last block.
SHAPES = {"whole": (2, 16, 128), "blocks": (3, 11, 256), "short": (70, 100)}


def gradients(shape, steps):
    """Blocks of many scales over ten decades, of both signs, with zeros; the first is all zeros.

    The second step takes the first moment back to nearly zero.
    """
    rng = np.random.default_rng(steps)
    size = int(np.prod(shape))
    rows = -(-size // 256)
    x = 10.0 ** rng.uniform(-7, 0, (steps, rows, 256)) * 10.0 ** rng.uniform(-9, 1, (rows, 1))
    x *= rng.choice([-1, 0, 1], x.shape, p=[0.45, 0.1, 0.45])
    x[:, 0] = 0
    x[1:2] = -RATES.b1 * x[:1]
    x = x.reshape(steps, -1)[:, :size].reshape(steps, *shape)
    return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)


def empty(shape):
    blocks = -(-int(np.prod(shape)) // 256)
    codes = jnp.zeros(shape, jnp.uint8)
    return [kernel.Moment(codes + t.zero, jnp.zeros(blocks)) for t in MAPS.values()]


NAMED = jax.jit(partial(kernel.update, RATES, implementation="pallas"))


def interpreted(*args):
    """The kernel; nothing else calls `NAMED`, so that what it has traced is this."""
    with _choice.target("gpu", interpret=True):
        return NAMED(*args)


@jax.jit
def plain(g, mu, nu, unbias):
    """What the reference makes, and the moments before they are rounded."""
    old = map(kernel.dequantize, (mu, nu), MAPS.values())
    return kernel.reference(RATES, g, mu, nu, unbias), kernel.adam(RATES, g, *old, *unbias)[1:]


def assert_same(ours, theirs, x, table):
    """Equal maxima and codes; one code may be the other neighbour of a tie."""
    assert ours.codes.shape == theirs.codes.shape and ours.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(ours.absmax, theirs.absmax)
    scaled = np.asarray(x / kernel._spread(ours.absmax, x.shape))
    ours, theirs = np.asarray(ours.codes), np.asarray(theirs.codes)
    at, values = ours != theirs, kernel._values(table)
    middles = (values[ours[at]] + values[theirs[at]]) / 2
    assert (abs(ours[at].astype(int) - theirs[at]) == 1).all() and at.sum() <= 1
    np.testing.assert_allclose(scaled[at], middles, rtol=3e-6)


@pytest.mark.parametrize("case", SHAPES)
def test_four_steps_equal_the_reference_code_for_code(case):
    shape, moments = SHAPES[case], empty(SHAPES[case])
    for step, g in enumerate(gradients(shape, 4), 1):
        unbias = jnp.asarray([1 / (1 - 0.5**step), (1 - 0.25**step) ** -0.5], jnp.float32)
        (expected, exact), got = plain(g, *moments, unbias), interpreted(g, *moments, unbias)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        for args in zip(got[1:], expected[1:], exact, MAPS.values(), strict=True):
            assert_same(*args)
        moments = got[1:]
    assert (moments[0].absmax[1:] > 0).all() and moments[0].absmax[0] == 0
    assert len(np.unique(moments[0].codes)) > 200


@pytest.mark.parametrize("name", MAPS)
def test_the_curve_finds_the_level_on_either_side_of_every_boundary(name):
    table = MAPS[name]
    values = kernel._values(table).astype(np.float64)
    np.testing.assert_array_equal(kernel._codes(jnp.float32(values), table), np.arange(256))
    middles = (values[1:] + values[:-1]) / 2
    if table.zero:
        # A negative number has a negative code however small it is.
        middles[table.zero - 1] = 0
    off = 1e-5 * np.abs(middles) + 1e-12
    for sign, codes in ((-1, np.arange(255)), (1, np.arange(1, 256))):
        found = jax.jit(partial(kernel._codes, table=table))(jnp.float32(middles + sign * off))
        np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("name", MAPS)
def test_what_is_looked_up_is_what_the_reference_computes(name):
    codes = jnp.arange(256, dtype=jnp.uint8)
    plain = jax.jit(partial(kernel.dequantize, table=MAPS[name]))
    expected = plain(kernel.Moment(codes, jnp.ones(1)))
    np.testing.assert_array_equal(kernel._values(MAPS[name]), expected)


def test_a_block_of_numbers_too_small_to_divide_by_keeps_finite_codes():
    g = jnp.full(SHAPES["whole"], 1e-21)
    (expected, _), got = (f(g, *empty(g.shape), jnp.ones(2)) for f in (plain, interpreted))
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(ours.codes, theirs.codes)
    assert (got[1].codes == 255).all() and (got[2].codes == 0).all()
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)


def test_nothing_is_read_or_written_past_a_short_block():
    g = jnp.zeros(SHAPES["short"])
    with _choice.target("gpu"):
        traced = jax.jit(lambda *args: kernel.update(RATES, *args)).trace(
            g, *empty(g.shape), g[0, :2]
        )
    masks = [
        any(v.aval.dtype == bool for v in eqn.invars)
        for eqn in programs.equations(traced.jaxpr.jaxpr)
        if eqn.primitive.name in ("masked_load", "masked_swap")
    ]
    assert masks == [True] * 10


def lowered(fn, *args):
    with _choice.target("gpu"):
        traced = jax.jit(fn).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", SHAPES)
def test_the_kernel_lowers_for_a_gpu_as_one_launch(case):
    g = jnp.zeros(SHAPES[case])
    text = lowered(partial(kernel.update, RATES), g, *empty(g.shape), jnp.ones(2))
    assert text.count("xla.gpu.triton") == 1 and "stablehlo.pad" not in text


def test_the_optimizer_launches_once_for_each_leaf_but_small_ones():
    weights = {"a": np.ones((32, 128), np.float32), "b": np.ones((63, 65), np.float32)}
    grads = {name: gradients(w.shape, 1)[0] for name, w in weights.items()}
    rule = adam8.scale_by_adam()
    state = rule.init(weights)
    assert isinstance(state.mu["a"], kernel.Moment) and state.mu["b"].dtype == jnp.float32
    assert lowered(lambda g, s: rule.update(g, s), grads, state).count("xla.gpu.triton") == 1
    with _choice.target("gpu", interpret=True):
        got = jax.jit(lambda g, s: rule.update(g, s))(grads, state)
    expected = jax.jit(rule.update)(grads, state)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def named(g, mu):
    return kernel.update(RATES, g, mu, mu, jnp.ones(2), implementation="pallas")


@pytest.mark.parametrize(
    "why, g",
    [
        ("float32 gradient, not bfloat16", jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)),
        ("2\\^31", jax.ShapeDtypeStruct((2**15, 2**16), jnp.float32)),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(why, g):
    with _choice.target("gpu"), pytest.raises(ValueError, match=why):
        jax.eval_shape(partial(named, mu=empty((1,))[0]), g)


def test_without_a_gpu_naming_the_kernel_raises():
    with pytest.raises(ValueError, match="needs a GPU"):
        named(jnp.zeros(256), *empty((256,))[:1])
