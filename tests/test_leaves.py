"""The kinds of weight: one answer for each function, whatever the leaf is made of."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import tiny

from unsloth_jax import decoder, leaves, lora, losses, quant, tree
from unsloth_jax.leaves import Lora, Quantized, Stacks, View, dense, layer
from unsloth_jax.quant import nf4

LAYERS, OUT, IN, RANK = 4, 12, 8, 2
IDS = tiny.draw(0, 12)
CHANGED = (1, 2)  # layers with adapters, of three: runs of one and of two layers


@flax.struct.dataclass
class Int8:
    """All that a foreign format has to bring: here one scale for each row."""

    codes: Any  # int8 [*stack, O, I]
    scale: Any  # float32 [*stack, O, 1]

    @property
    def shape(self):
        return self.codes.shape

    def dequantize(self):
        return self.codes.astype(jnp.float32) * self.scale

    def matmul(self, x):
        y = jnp.einsum("...i,oi->...o", x, self.codes.astype(x.dtype))
        return y * self.scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def int8(w) -> Int8:
    scale = jnp.abs(w).max(-1, keepdims=True) / 127
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale)


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def adapted(base) -> Lora:
    a, b = random(1, LAYERS, RANK, IN), random(2, LAYERS, OUT, RANK)
    return Lora(base, a, b, jnp.linspace(0.5, 2.0, LAYERS))


WEIGHT = random(0, LAYERS, OUT, IN)
KINDS = {
    "array": WEIGHT,
    "int8": int8(WEIGHT),
    "nf4": nf4.quantize(WEIGHT),
    "lora": adapted(WEIGHT),
    "lora on int8": adapted(int8(WEIGHT)),
    "lora on nf4": adapted(nf4.quantize(WEIGHT)),
}
EXACT = {"rtol": 1e-6, "atol": 1e-6}
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(params=KINDS)
def leaf(request):
    return KINDS[request.param]


def merged(leaf) -> np.ndarray:
    """The whole stack by NumPy, layer by layer."""
    if not isinstance(leaf, Lora):
        return np.asarray(leaf.dequantize() if isinstance(leaf, Quantized) else leaf)
    a, b, scale = (np.asarray(x, np.float64) for x in (leaf.a, leaf.b, leaf.scale))
    rows = zip(merged(leaf.base), scale, a, b, strict=True)
    return np.stack([w + s * b @ a for w, s, a, b in rows])


def test_dense_is_the_weight_with_its_adapter(leaf):
    np.testing.assert_allclose(dense(leaf), merged(leaf), **EXACT)
    assert leaf.shape == (LAYERS, OUT, IN)


@pytest.mark.parametrize("i", range(LAYERS))
def test_layer_indexes_every_field_of_a_stack(leaf, i):
    np.testing.assert_allclose(dense(layer(leaf, i)), merged(leaf)[i], **EXACT)


@pytest.mark.parametrize("kind", ["array", "int8", "nf4"])
def test_layer_takes_a_traced_number(kind):
    found = jax.jit(lambda i: dense(layer(KINDS[kind], i)))(jnp.int32(2))
    np.testing.assert_allclose(found, merged(KINDS[kind])[2], **EXACT)


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_a_product_with_the_dense_weight_and_its_bias(leaf, bias, shape):
    x, node = random(3, *shape), {"weight": layer(leaf, 1)}
    want = np.asarray(x) @ merged(leaf)[1].T
    if bias:
        node["bias"] = random(4, OUT)
        want = want + np.asarray(node["bias"])
    np.testing.assert_allclose(leaves.linear(node, x), want, **CLOSE)


def test_linear_answers_in_the_dtype_of_its_input(leaf):
    node = {"weight": layer(leaf, 0), "bias": random(4, OUT)}
    y = leaves.linear(node, random(3, 2, IN).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    want = np.asarray(random(3, 2, IN)) @ merged(leaf)[0].T + np.asarray(node["bias"])
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.05 * np.abs(want).max())


def test_linears_are_linear_one_by_one():
    nodes = [{"weight": layer(kind, 0)} for kind in KINDS.values()]
    x = random(3, 2, IN)
    for node, y in zip(nodes, leaves.linears(nodes, x), strict=True):
        np.testing.assert_array_equal(y, leaves.linear(node, x))


def test_embed_gathers_rows_of_the_dense_table(leaf):
    ids = jnp.asarray([[0, 11, 3], [3, 3, 7]])
    found = leaves.embed({"weight": layer(leaf, 3)}, ids)
    np.testing.assert_allclose(found, merged(leaf)[3][np.asarray(ids)], **CLOSE)


def test_views_and_stacks_find_each_layer_in_its_part(leaf):
    view = View(leaf, (3, 1))
    assert view.shape == (2, OUT, IN)
    mixed = Stacks((view, WEIGHT[:2]), ((1, 2), (0, 3)))
    want = {0: np.asarray(WEIGHT[0]), 1: merged(leaf)[3], 2: merged(leaf)[1], 3: WEIGHT[1]}
    for i, w in want.items():
        np.testing.assert_allclose(dense(layer(mixed, i)), w, **EXACT)


ORDERS = [[0, 1, 2, 3], [0], [3], [1, 2], [0, 2], [1, 3], [3, 1], [2, 2], [0, 1, 3]]


@pytest.mark.parametrize("at", ORDERS)
def test_take_picks_layers_in_order(at):
    found = decoder.take(WEIGHT, at)
    np.testing.assert_array_equal(found, np.asarray(WEIGHT)[at])
    assert (found is WEIGHT) == (at == [0, 1, 2, 3])


@pytest.mark.parametrize("at", ORDERS)
def test_split_gives_back_each_layer_inside_a_scan(leaf, at):
    view = View(leaf, (2, 0, 1, 3))
    for whole, where in ((leaf, at), (view, [view.at[i] for i in at])):
        xs, rebuild = decoder.split(whole, at)
        for j, i in enumerate(where):
            got = rebuild(jax.tree.map(lambda x, j=j: x[j], xs))
            np.testing.assert_allclose(dense(got), merged(leaf)[i], **EXACT)


def test_split_carries_layer_numbers_instead_of_quantized_bytes():
    xs, _ = decoder.split(KINDS["lora on nf4"], [1, 3])
    base, own = xs
    assert base.tolist() == [1, 3] and base.dtype == jnp.int32
    assert [x.shape for x in own] == [(2, RANK, IN), (2, OUT, RANK), (2,)]


def drawn(params, layers=None):
    """Adapters whose `b` is not zero."""
    adapters = lora.init(jax.random.key(1), params, RANK, layers=layers)
    fill = lambda x: random(5, *x.shape) * 0.1
    return tree.map_paths(
        lambda path, x: jax.tree.map(fill, x) if path.endswith(".b") else x, adapters
    )


def scores(params) -> np.ndarray:
    pair = tiny.pair("qwen3")
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded([IDS], 12)))


def merge_by_hand(params, adapters, layers, scale):
    """Dense float32 stacks with `scale * b @ a` added to some layers by NumPy."""
    flat, pairs = tree.flatten(params), tree.flatten(adapters)
    out = {path: np.array(dense(w)) for path, w in flat.items()}
    first = lambda x: np.asarray(x.parts[0] if isinstance(x, Stacks) else x)
    for path in (p.removesuffix(".a") for p in pairs if p.endswith(".a")):
        a, b = first(pairs[f"{path}.a"]), first(pairs[f"{path}.b"])
        for j, i in enumerate(layers):
            out[f"{path}.weight"][i] += scale * b[j] @ a[j]
    return tree.unflatten({path: jnp.asarray(w) for path, w in out.items()})


def test_a_foreign_format_and_adapters_on_it_run_in_a_model(monkeypatch):
    monkeypatch.setitem(quant.FORMATS, "int8", int8)
    params = tiny.pair("qwen3").params
    base = quant.quantize(params, "int8", tree.matcher((*(f"{t}.weight" for t in lora.TARGETS),)))
    assert sum(isinstance(w, Int8) for w in tree.flatten(base).values()) == 7
    adapters = drawn(base)
    found = scores(lora.attach(base, adapters, 0.5))
    want = scores(merge_by_hand(base, adapters, range(3), 0.5))
    np.testing.assert_allclose(found, want, atol=1e-4 * want.std())
    assert np.abs(scores(params) - want).max() > 0.1 * want.std()


@pytest.fixture(scope="module")
def packed():
    """(NF4 base, adapters on some layers only)."""
    where = lambda path: path.endswith("_proj.weight")
    base = quant.quantize(tiny.pair("qwen3").params, "nf4", where)
    return base, drawn(base, CHANGED)


def loss_and_gradient(adapters, base):
    """((loss, logits), gradient) of adapters at scale 0.5."""
    pair = tiny.pair("qwen3")
    tokens, positions, segments = tiny.padded([IDS], 12)

    def loss(adapters):
        params = lora.attach(base, adapters, 0.5)
        family, c = pair.family, pair.config
        x = decoder.forward(family, c, params, tokens, positions, segments)
        logps = losses.token_logprobs(x, family.head(c, params), jnp.roll(tokens, -1, 1))
        return -logps.sum(), decoder.logits(family, c, params, x)

    return jax.value_and_grad(loss, has_aux=True)(adapters)


@pytest.fixture(scope="module")
def step(packed):
    """`loss_and_gradient` as (traced, compiled) programs."""
    base, adapters = packed
    traced = jax.jit(loss_and_gradient).trace(adapters, base)
    return traced, traced.lower().compile()


def test_adapters_on_some_layers_equal_a_merge_by_hand(packed, step):
    base, adapters = packed
    found = step[1](adapters, base)[0][1]
    want = scores(merge_by_hand(base, adapters, CHANGED, 0.5))
    np.testing.assert_allclose(found, want, atol=1e-4 * want.std())


def test_gradients_of_adapters_equal_finite_differences(packed, step):
    base, adapters = packed
    _, gradient = step[1](adapters, base)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    flat, size = tree.flatten(adapters), 1e-2
    for path, g in tree.flatten(gradient).items():
        norm = np.sqrt(sum(float((x * x).sum()) for x in jax.tree.leaves(g)))
        there, back = (
            flat | {path: jax.tree.map(lambda w, d, by=by: w + by * d, flat[path], g)}
            for by in (size / norm, -size / norm)
        )
        up, down = (step[1](tree.unflatten(x), base)[0][0] for x in (there, back))
        assert abs(float(up - down) / (2 * size) - norm) <= 0.01 * norm, path


def test_adapters_on_some_layers_copy_no_quantized_stack(packed, step):
    """Neither in the traced gradient nor in the compiled one is there a part of a packed stack."""
    base, _ = packed
    stacks = {w.packed.shape[1:] for w in tree.flatten(base).values() if isinstance(w, nf4.NF4)}
    assert len(stacks) == 3
    several = lambda shape: len(shape) == 3 and shape[0] > 1 and shape[1:] in stacks
    traced = [shape for _, shape, dtype in programs.made(step[0].jaxpr) if dtype == "uint8"]
    assert any(shape in stacks for shape in traced)
    assert not any(several(shape) for shape in traced)
    arrays = programs.compiled(step[1].as_text())
    whole = {op for op, shape, dtype in arrays if dtype == "u8" and several(shape)}
    assert whole and whole <= {"parameter", "get-tuple-element", "bitcast"}


@pytest.mark.parametrize(
    "at",
    [[0, 1, 3, 4], [1, 2, 4, 5], [0, 2, 3, 5], [2, 3, 1, 0]],
    ids=["front", "end", "no", "back"],
)
def test_blocks_of_layers_are_those_asked_for(at):
    stack = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(decoder.take(stack, at), np.asarray(stack)[at])
