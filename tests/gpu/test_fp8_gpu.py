"""e4m3 on a GPU: kernels equal their references bit by bit, products stay within the rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3, nf4_fp8, nf4_matmul
from pallas_kernels.nf4_matmul import LowRank, Packed
from unsloth_jax.quant import FORMATS

pytestmark = pytest.mark.gpu
SHAPES = [(1536, 576), (1024, 4096), (4096, 14336)]


def stack(shape, double=True):
    w = jax.random.normal(jax.random.key(0), (2, *shape), jnp.bfloat16) * 0.02
    return FORMATS["nf4"](w, double=double)


def equal(ours, theirs):
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_reference(shape, double, transposed):
    leaf = stack(shape, double)
    args = leaf.layout, leaf.packed, leaf.statistics, 1, transposed
    equal(nf4_fp8.decode(*args, "pallas"), nf4_fp8.decode(*args, "xla"))


@pytest.mark.parametrize("widths", [(4096,), (14336, 14336), (4096, 1024, 1024), (576, 192, 192)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casting_rows_equals_the_reference(widths, dtype):
    keys = jax.random.split(jax.random.key(1), len(widths))
    size = jnp.exp(4 * jax.random.normal(jax.random.key(2), (300, 1))).at[7].set(0)
    draw = lambda k, w: (jax.random.normal(k, (300, w)) * size).astype(dtype)
    xs = [draw(k, w) for k, w in zip(keys, widths, strict=True)]
    factors = [jnp.exp2(jnp.arange(w) % 9 - 4.0) for w in widths]
    equal(e4m3.cast_rows(xs, factors, "pallas"), e4m3.cast_rows(xs, factors, "xla"))


@pytest.mark.parametrize("rows", [2048, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_off_by_the_rounding_alone(shape, rows):
    leaf, (O, I) = stack(shape), shape
    keys = jax.random.split(jax.random.key(3), 4)
    draw = lambda k, *s: jax.random.normal(k, s)
    x, g = (draw(k, rows, n).astype(jnp.bfloat16) for k, n in zip(keys, (I, O), strict=False))
    pair = LowRank(draw(keys[2], 16, I) * 0.01, draw(keys[3], O, 16) * 0.01, jnp.float32(1))

    @jax.jit
    def both(x, g, pair):
        def run(products):
            w = [Packed(leaf.packed, leaf.statistics, jnp.int32(1))]
            y, back = jax.vjp(lambda *a: products([leaf.layout], a[0], w, [a[1]])[0], x, pair)
            return y, *back(g)

        return run(nf4_fp8.products), run(nf4_matmul.products)

    (y, dx, pairs), (exact_y, exact_dx, exact_pairs) = both(x, g, pair)
    off = lambda a, b: float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b))
    assert 0.01 < off(y, exact_y) < 0.051 and 0.01 < off(dx, exact_dx) < 0.051
    assert off(pairs.a, exact_pairs.a) < 8e-3 and off(pairs.b, exact_pairs.b) < 8e-3
    text = both.lower(x, g, pair).compile().as_text()
    print(rows, shape, "products of 8 bits by cuBLASLt:", text.count('"__cublas$lt$matmul$f8"'))
