"""The NF4 kernel in interpret mode, bit by bit, and its lowering for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _choice
from pallas_kernels import nf4_dequantize as kernel
from unsloth_jax.quant import nf4

LAYERS = 3

SHAPES = [(16, 128), (48, 384)]  # the second has more blocks than one outer scale serves


@partial(jax.jit, static_argnums=(0, 1, 2))
def stack(shape, dtype="bfloat16", double=True):
    w = jax.random.normal(jax.random.key(shape[0]), (LAYERS, *shape)) * 0.02
    return nf4.quantize(w, dtype=dtype, double=double)


def low_rank(shape, rank):
    a, b = jax.random.split(jax.random.key(rank))
    draw = lambda key, shape: jax.random.normal(key, shape) * 0.1
    return kernel.LowRank(draw(a, (rank, shape[1])), draw(b, (shape[0], rank)), jnp.float32(0.5))


def interpreted(leaf, *args):
    with _choice.target("gpu", interpret=True):
        return kernel.dequantize(leaf.layout, leaf.packed, leaf.statistics, *args)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_layer_read_from_the_stack_equals_the_reference_bit_for_bit(shape, double, dtype):
    leaf = stack(shape, dtype, double)
    for i in (0, LAYERS - 1):
        expected = kernel.reference(leaf.layout, leaf.packed, leaf.statistics, i)
        got = interpreted(leaf, jnp.int32(i))
        assert got.dtype == dtype and got.shape == shape
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("rank", [4, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_low_rank_term_is_added_before_the_one_rounding(shape, rank):
    leaf, pair = stack(shape), low_rank(shape, rank)
    exact = kernel.reference(leaf.layout, leaf.packed, leaf.statistics, 1, pair, jnp.float32)
    got = interpreted(leaf, 1, pair).astype(jnp.float32)
    delta = 0.5 * pair.b @ pair.a
    # One rounding of the sum (2^-8), one of the delta and of each factor (3 x 2^-8).
    bound = 2.0**-7.9 * jnp.abs(exact) + 2.0**-6 * 0.5 * jnp.abs(pair.b) @ jnp.abs(pair.a)
    assert jnp.all(jnp.abs(got - exact) <= bound)
    assert jnp.abs(got - exact).max() < 0.05 * jnp.abs(delta).max()


def test_a_matrix_without_a_stack_is_taken():
    leaf = stack((32, 256))
    one = jax.tree.map(lambda x: x[2], leaf)
    np.testing.assert_array_equal(interpreted(one), interpreted(leaf, 2))


def test_the_kernel_lowers_for_a_gpu_and_copies_no_layer():
    leaf = stack((64, 512))
    with _choice.target("gpu"):
        read = lambda leaf, i: kernel.dequantize(leaf.layout, leaf.packed, leaf.statistics, i)
        traced = jax.jit(read).trace(leaf, jnp.int32(1))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text and "dynamic_slice" not in text


@pytest.mark.parametrize(
    "why, leaf, kwargs",
    [
        ("widths of 128", lambda: stack((16, 64)), {}),
        ("heights of 16", lambda: stack((8, 128)), {}),
        ("not float32", lambda: stack((16, 128), "float32"), {}),
        ("second one", lambda: stack((16, 128), "float16"), {"dtype": jnp.bfloat16}),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name_and_done_by_xla(why, leaf, kwargs):
    leaf = leaf()
    args = leaf.layout, leaf.packed, leaf.statistics, 1
    with _choice.target("gpu", interpret=True):
        with pytest.raises(ValueError, match=why):
            kernel.dequantize(*args, implementation="pallas", **kwargs)
        got = kernel.dequantize(*args, **kwargs)
    np.testing.assert_array_equal(got, kernel.reference(*args, **kwargs))


def test_without_a_gpu_naming_the_kernel_raises():
    leaf = stack((16, 128))
    with pytest.raises(ValueError, match="needs a GPU"):
        kernel.dequantize(leaf.layout, leaf.packed, leaf.statistics, 0, implementation="pallas")


def test_bytes_past_32_bits_are_left_to_xla():
    shape = jax.ShapeDtypeStruct((48, 13824, 5120), jnp.uint8)
    layout = nf4.nf4.Layout((13824, 5120 * 2))
    with _choice.target("gpu"):
        assert "2^31" in kernel.supports(layout, shape, nf4.nf4.Statistics(None))
