"""NF4 weights in e4m3: decoding bit by bit, products within e4m3's rounding, what is kept."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import made

from pallas_kernels import _choice, nf4_fp8, nf4_matmul
from pallas_kernels.nf4_matmul import LowRank, Packed
from unsloth_jax import quant, tree
from unsloth_jax.leaves import Lora, Stacks, layer, linears
from unsloth_jax.quant import nf4

LAYERS, WIDTH, ROWS, RANK = 2, 192, 40, 4
HEIGHTS = (64, 32, 32)
# A value v in [1, 2) x 2^e is rounded to 2^(e - 3): at most half of that off, and a twelfth of its
# square in the mean, where the values' last bits are random. Two factors, rounded independently:
ROUNDING = 2.0**-4
TYPICAL = math.sqrt(2) * 2.0**-3 / math.sqrt(12)


def draw(seed, *shape, scale=1.0):
    return jax.random.normal(jax.random.key(seed), shape) * scale


def stack(shape, double=True, dtype="bfloat16"):
    """Weights whose rows differ in size by orders of magnitude."""
    w = draw(shape[0], LAYERS, *shape, scale=0.02)
    w = w * jnp.exp(draw(1, LAYERS, shape[0], 1))
    return quant.FORMATS["nf4"](w, dtype=dtype, double=double)


def decoded(leaf, layer, transposed):
    with _choice.target("gpu", interpret=True):
        args = leaf.layout, leaf.packed, leaf.statistics, layer, transposed
        return nf4_fp8.decode(*args, implementation="pallas")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "shape", [(16, 64), (48, 576), pytest.param((192, 256), marks=pytest.mark.slow)]
)
def test_the_kernel_equals_the_reference_bit_for_bit(shape, double, transposed):
    leaf = stack(shape, double)
    got = decoded(leaf, jnp.int32(1), transposed)
    wanted = nf4_fp8.reference(leaf.layout, leaf.packed, leaf.statistics, 1, transposed)
    assert got[0].shape == (shape[::-1] if transposed else shape)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


@pytest.mark.parametrize("double", [True, False])
def test_decoded_weights_are_the_exact_ones_rounded_once_to_four_bits(double):
    leaf = stack((64, 320), double)
    exact = leaf.replace(dtype="float32").at(0).dequantize()
    w8, scale = nf4_fp8.reference(leaf.layout, leaf.packed, leaf.statistics, 0)
    error = w8.astype(jnp.float32) * scale[:, None] - exact
    # Below 2^-6 of the scale e4m3 counts in steps of 2^-9.
    bound = jnp.maximum(ROUNDING * jnp.abs(exact), scale[:, None] / 1024)
    assert jnp.all(jnp.abs(error) <= bound)
    assert jnp.linalg.norm(error) <= TYPICAL / math.sqrt(2) * jnp.linalg.norm(exact)
    assert abs(error.mean()) <= 2e-3 * jnp.abs(exact).mean()
    # Nested statistics tell what a group of 256 blocks does not exceed, others the row's own.
    largest = jnp.abs(w8.astype(jnp.float32)).max(-1)
    assert jnp.all(largest <= 256) and (double or jnp.all(largest >= 128))
    assert jnp.all(jnp.frexp(scale)[0] == 0.5)  # powers of two


@pytest.mark.parametrize("blocks", [1, 3, 4, 11])
def test_a_rows_top_is_that_of_all_groups_it_lies_in(blocks):
    layout = nf4.nf4.Layout((16, 64 * blocks), nested_block=4)
    groups = np.random.default_rng(blocks).uniform(1, 100, 4 * blocks).astype(np.float32)
    wanted = np.repeat(groups, 4).reshape(16, blocks).max(1) + 2
    statistics = nf4.nf4.Statistics(None, jnp.asarray(groups), None, jnp.float32(-2))
    np.testing.assert_allclose(nf4_fp8.row_tops(layout, statistics), wanted, rtol=1e-6)


def group(pairs_there=(True, False, True)):
    """(leaves, weights, pairs) that share their input."""
    leaves = [stack((height, WIDTH)) for height in HEIGHTS]
    pairs = [
        LowRank(draw(n, RANK, WIDTH, scale=0.02), draw(n + 9, h, RANK, scale=0.02), jnp.float32(2))
        if on
        else None
        for n, (h, on) in enumerate(zip(HEIGHTS, pairs_there, strict=True))
    ]
    return leaves, [Packed(w.packed, w.statistics, jnp.int32(1)) for w in leaves], pairs


def both_ways(products, dtype, implementation, pairs_there=(True, False, True)):
    """(gradients by x and the pairs, products) in float32."""
    leaves, weights, pairs = group(pairs_there)
    layouts = [w.layout for w in leaves]
    x = draw(5, 2, ROWS // 2, WIDTH).astype(dtype)
    cotangents = [draw(30 + n, 2, ROWS // 2, h).astype(dtype) for n, h in enumerate(HEIGHTS)]

    def run(x, pairs):
        ys_of = lambda x, pairs: products(layouts, x, weights, pairs, implementation)
        ys, back = jax.vjp(ys_of, x, pairs)
        return *back(cotangents), ys

    return jax.tree.map(lambda x: x.astype(jnp.float32), jax.jit(run)(x, pairs))


def off(ours, exact):
    return jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("there", [(True, False, True), (False, False, False)])
def test_products_and_gradients_are_off_by_e4m3s_rounding_alone(dtype, there):
    """Both factors are rounded independently, by 2^-3 / sqrt(12) of themselves in the mean at most.

    A sum of such products is then off by sqrt(2) of that in norm, 5.1 %; adapters by bfloat16's.
    """
    dx, pairs, ys = both_ways(nf4_fp8.products, dtype, "xla", there)
    exact_dx, exact_pairs, exact_ys = both_ways(nf4_matmul.products, jnp.float32, "xla", there)
    for ours, exact in zip([dx, *ys], [exact_dx, *exact_ys], strict=True):
        assert 0.01 < off(ours, exact) <= TYPICAL
    assert jax.tree.structure(pairs) == jax.tree.structure(exact_pairs)
    for ours, exact in zip(pairs, exact_pairs, strict=True):
        if ours is not None:
            assert off(ours.a, exact.a) <= 6e-3 and off(ours.b, exact.b) <= 6e-3


def test_backward_only_leaves_the_products_as_they_are():
    backward_only = partial(nf4_fp8.products, backward_only=True)
    dx, pairs, ys = both_ways(backward_only, jnp.bfloat16, "xla")
    same_dx, same_pairs, _ = both_ways(nf4_fp8.products, jnp.bfloat16, "xla")
    _, _, same_ys = both_ways(nf4_matmul.products, jnp.bfloat16, "xla")
    for ours, theirs in zip(ys, same_ys, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(
        *map(jax.tree.leaves, ((dx, pairs), (same_dx, same_pairs))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_low_rank_terms_are_not_rounded_to_eight_bits():
    """With one weight of zeros only its low-rank term is left."""
    pair = group()[2][0]
    zero = quant.FORMATS["nf4"](jnp.zeros((LAYERS, HEIGHTS[0], WIDTH)), dtype="bfloat16")
    w = [Packed(zero.packed, zero.statistics, 0)]
    x = draw(5, ROWS, WIDTH).astype(jnp.bfloat16)
    (y,), back = jax.vjp(lambda x: nf4_fp8.products([zero.layout], x, w, [pair], "xla"), x)
    whole = 2 * pair.b @ pair.a
    assert off(y.astype(jnp.float32), x.astype(jnp.float32) @ whole.T) <= 6e-3
    g = draw(6, *y.shape).astype(jnp.bfloat16)
    assert off(back([g])[0].astype(jnp.float32), g.astype(jnp.float32) @ whole) <= 6e-3


def test_rows_of_tokens_don_t_change_each_other():
    leaves, weights, _ = group()
    x = draw(5, ROWS, WIDTH).astype(jnp.bfloat16)
    args = [w.layout for w in leaves], weights, [None] * 3
    run = lambda x: nf4_fp8.products(args[0], x, args[1], args[2], "xla")
    for whole, loud in zip(run(x), run(x.at[0].multiply(1024)), strict=True):
        np.testing.assert_array_equal(whole[1:], loud[1:])
        np.testing.assert_array_equal(whole[0] * 1024, loud[0])


def nodes_of(leaves, pairs, number):
    """Nodes of one layer, their products asked for in e4m3."""
    leaves = [leaf.replace(matmul_dtype="fp8") for leaf in leaves]
    wrap = lambda w, p: w if p is None else Lora(w, p.a, p.b, p.scale)
    return [{"weight": wrap(layer(w, number), p)} for w, p in zip(leaves, pairs, strict=True)]


def test_leaves_reach_the_kernel_and_mix_with_others_in_order():
    leaves, _, pairs = group()
    x = draw(5, ROWS, WIDTH).astype(jnp.bfloat16)
    nodes = nodes_of(leaves, pairs, 1)
    with _choice.target("gpu", interpret=True):
        text = str(jax.make_jaxpr(lambda nodes: linears(nodes, x))(nodes))
        ours = linears(nodes, x)
    assert text.count("pallas_call") == len(nodes) + 1  # and one for the shared input
    emulated = linears(nodes, x)
    plain = nodes_of(leaves, pairs, 1)
    plain[1] = {"weight": layer(leaves[1], 1)}
    mixed = linears(plain, x)
    wide = lambda y: y.astype(jnp.float32)
    for n, (y, wanted) in enumerate(zip(ours, emulated, strict=True)):
        assert off(wide(y), wide(wanted)) <= 6e-3
        assert bool(jnp.all(mixed[n] == wanted)) == (n != 1)
        assert off(wide(mixed[n]), wide(wanted)) <= TYPICAL


def test_no_wide_weight_is_made_and_backward_keeps_none():
    leaves, weights, pairs = group()
    layouts = [w.layout for w in leaves]
    x = draw(5, ROWS, WIDTH).astype(jnp.bfloat16)
    loss = lambda x: sum(y.sum() for y in nf4_fp8.products(layouts, x, weights, pairs, "pallas"))
    with _choice.target("gpu"):
        saved = jax.eval_shape(lambda x: jax.vjp(loss, x)[1], x)
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    sides = {s for h in HEIGHTS for s in ((h, WIDTH), (WIDTH, h))}
    kept = {np.shape(leaf) for leaf in jax.tree.leaves(saved)}
    assert not kept & sides
    arrays = {(shape, dtype) for _, shape, dtype in made(traced.jaxpr)}
    assert {dtype for shape, dtype in arrays if shape in sides} == {"float8_e4m3fn"}
    # A weight each, and what is cast: x, and all cotangents at once.
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 2 * len(HEIGHTS) + 2
    # Both operands of every product of 8 bits have the summed side innermost.
    eight = [line for line in text.split("\n") if "dot_general" in line and "f8E4M3FN" in line]
    assert len(eight) == 2 * len(HEIGHTS)
    assert all("contracting_dims = [1] x [1]" in line for line in eight)
    moved = [line for line in text.split("\n") if "f8E4M3FN" in line and "transpose" in line]
    assert not moved and "dynamic_slice" not in text


@pytest.mark.parametrize(
    "why, leaf",
    [
        ("widths of 64 n", lambda: stack((16, 96))),
        ("heights of 16 n", lambda: stack((24, 64))),
        ("blocks of 64", lambda: quant.FORMATS["nf4"](draw(0, LAYERS, 16, 128), block=128)),
    ],
)
def test_uneven_weights_are_refused_with_the_reason(why, leaf):
    leaf = leaf()
    for how in ("pallas", "xla"):
        with _choice.target("gpu", interpret=True), pytest.raises(ValueError, match=why):
            nf4_fp8.decode(leaf.layout, leaf.packed, leaf.statistics, 0, implementation=how)


def test_without_a_fitting_gpu_naming_the_kernel_raises(monkeypatch):
    leaves, weights, pairs = group()
    args = [w.layout for w in leaves], draw(5, ROWS, WIDTH), weights, pairs
    with pytest.raises(ValueError, match="needs a GPU"):
        nf4_fp8.products(*args, "pallas")
    monkeypatch.setattr(_choice, "capability", lambda: 8.0)
    with _choice.target("gpu"), pytest.raises(ValueError, match="8.9, this GPU has 8.0"):
        nf4_fp8.products(*args, "pallas")


def test_bytes_past_32_bits_are_refused():
    shape = jax.ShapeDtypeStruct((48, 13824, 5120), jnp.uint8)
    with _choice.target("gpu"):
        assert "2^31" in nf4_fp8.supports(nf4.nf4.Layout((13824, 5120 * 2)), shape)


def params():
    even, uneven = stack((32, 64)), stack((32, 96))
    parts = Stacks((stack((16, 64)), draw(0, 1, 16, 64)), ((0, 2), (1,)))
    one = quant.FORMATS["nf4"](draw(1, 32, 64))
    nodes = dict(even=even, uneven=uneven, parts=parts, plain=draw(2, LAYERS, 16, 64), one=one)
    return {name: {"weight": leaf} for name, leaf in nodes.items()}


def test_stacks_of_even_layout_are_marked_and_nothing_else_changes():
    before = params()
    after = quant.matmul_in(before, "fp8", emulate=True)
    flat = tree.flatten(after)
    assert flat["even.weight"].matmul_dtype == "fp8" == flat["parts.weight"].parts[0].matmul_dtype
    assert flat["uneven.weight"].matmul_dtype == "bf16" == flat["one.weight"].matmul_dtype
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert a is b
    back = quant.matmul_in(after, "bf16")
    assert jax.tree.structure(back) == jax.tree.structure(before)


def test_marking_is_refused_where_the_products_cannot_run():
    with pytest.raises(ValueError, match="needs a GPU"):
        quant.matmul_in(params(), "fp8")
    with pytest.raises(ValueError, match="no stacks of NF4"):
        quant.matmul_in({"a": {"weight": draw(0, 2, 16, 64)}}, "fp8", emulate=True)
    with pytest.raises(ValueError, match="widths of 64 n"):
        quant.matmul_in({"a": {"weight": stack((16, 96))}}, "fp8", emulate=True)
    with pytest.raises(ValueError, match=r"'fp4', known are \['bf16', 'fp8', "):
        quant.matmul_in(params(), "fp4")
