"""Products with NF4 weights and their adapters: the merged kernel against both terms apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _choice, nf4_matmul
from pallas_kernels.nf4_matmul import LowRank, Packed
from unsloth_jax.leaves import Lora, layer, linears
from unsloth_jax.quant import nf4

LAYERS, WIDTH, ROWS, RANK = 2, 128, 24, 4
HEIGHTS = (64, 32, 32)
GROUPS = {
    "all adapted": (True, True, True),
    "one without": (True, False, True),
    "none": (False, False, False),
}


def draw(seed, *shape, scale=1.0):
    return jax.random.normal(jax.random.key(seed), shape) * scale


def group(adapted):
    """(layouts, weights, pairs) of a group that shares its input, and the leaves they are of."""
    leaves, pairs = [], []
    for n, (height, on) in enumerate(zip(HEIGHTS, adapted, strict=True)):
        w = draw(n, LAYERS, height, WIDTH, scale=WIDTH**-0.5)
        leaves.append(nf4.quantize(w, dtype="bfloat16"))
        a, b = draw(n + 10, RANK, WIDTH, scale=0.1), draw(n + 20, height, RANK, scale=0.1)
        pairs.append(LowRank(a, b, jnp.float32(2.0)) if on else None)
    weights = [Packed(w.packed, w.statistics, jnp.int32(1)) for w in leaves]
    return [w.layout for w in leaves], weights, pairs, leaves


def both(adapted, dtype, implementation):
    layouts, weights, pairs, _ = group(adapted)
    x = draw(5, 2, ROWS // 2, WIDTH).astype(dtype)
    cotangents = [draw(30 + n, 2, ROWS // 2, h).astype(dtype) for n, h in enumerate(HEIGHTS)]

    def loss(x, pairs):
        ys = nf4_matmul.products(layouts, x, weights, pairs, implementation)
        wide = lambda y: y.astype(jnp.float32)
        return sum(jnp.sum(wide(y) * wide(g)) for y, g in zip(ys, cotangents, strict=True)), ys

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, pairs)


@pytest.mark.parametrize(
    "case",
    ["one without", *(pytest.param(n, marks=pytest.mark.slow) for n in ("all adapted", "none"))],
)
def test_merged_products_and_gradients_equal_the_terms_apart(case):
    expected = both(GROUPS[case], jnp.float32, "xla")
    with _choice.target("gpu", interpret=True):
        got = both(GROUPS[case], jnp.bfloat16, "merged")
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours = ours.astype(jnp.float32)
        # bfloat16 inputs and weights: 2^-8 each, averaged over the sums.
        assert jnp.linalg.norm(ours - wanted) <= 6e-3 * jnp.linalg.norm(wanted)


def test_gradients_keep_the_dtypes_of_what_they_are_of():
    with _choice.target("gpu", interpret=True):
        (dx, pairs), _ = both(GROUPS["all adapted"], jnp.bfloat16, "merged")
    assert dx.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(pairs)} == {jnp.dtype("float32")}


def test_leaves_of_a_stack_reach_the_merged_kernel():
    _, weights, pairs, leaves = group(GROUPS["all adapted"])
    x = draw(5, ROWS, WIDTH).astype(jnp.bfloat16)
    node = lambda w, p: {"weight": Lora(layer(w, 1), p.a, p.b, p.scale)}
    nodes = [node(w, p) for w, p in zip(leaves, pairs, strict=True)]
    with _choice.target("gpu", interpret=True):
        text = str(jax.make_jaxpr(lambda nodes: linears(nodes, x))(nodes))
        merged = linears(nodes, x)
    apart = linears(nodes, x)
    assert text.count("pallas_call") == len(nodes)
    for ours, wanted in zip(merged, apart, strict=True):
        assert jnp.linalg.norm(ours - wanted) <= 2e-2 * jnp.linalg.norm(wanted)


def test_backward_keeps_no_weight_and_dequantizes_again():
    layouts, weights, pairs, _ = group(GROUPS["all adapted"])
    x = draw(5, ROWS, WIDTH).astype(jnp.bfloat16)
    with _choice.target("gpu"):
        loss = lambda x: sum(y.sum() for y in nf4_matmul.products(layouts, x, weights, pairs))
        saved = jax.eval_shape(lambda x: jax.vjp(loss, x)[1], x)
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
        grad = traced.lower(lowering_platforms=("cuda",)).as_text()
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(saved)}
    assert not shapes & {(h, WIDTH) for h in HEIGHTS}
    assert grad.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2 * len(HEIGHTS)


def test_the_merged_road_is_refused_with_the_reason_where_it_cannot_run():
    layouts, weights, pairs, _ = group(GROUPS["all adapted"])
    x = draw(5, ROWS, WIDTH)
    with pytest.raises(ValueError, match="needs a GPU"):
        nf4_matmul.products(layouts, x, weights, pairs, "merged")
    with _choice.target("gpu"), pytest.raises(ValueError, match="not float32"):
        nf4_matmul.products(layouts, x, weights, pairs, "merged")
