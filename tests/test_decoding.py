"""Prefill and single tokens against the training forward, and what decoding holds in memory."""

import re
from functools import cache

import adapted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pallas_kernels import _choice
from unsloth_jax import decoder, decoding, leaves, lora, quant, sample, tree, unstack
from unsloth_jax.models import family as family_of
from unsloth_jax.models import qwen3_moe
from unsloth_jax.sample import Sampling

prefill = tiny.shared_jit(decoding.prefill, static_argnames=("slots", "dtype"))
step = tiny.shared_jit(decoding.step)
# Shapes for what is only compiled: no product of widths equals another's.
BIG = dict(
    num_hidden_layers=5,
    vocab_size=900,
    hidden_size=320,
    intermediate_size=1216,
    num_attention_heads=8,
)
BATCH, SLOTS = 3, 448


def layer_matrix(path: str) -> bool:
    return path.endswith("_proj.weight")


@cache
def fine_tuned(name: str) -> tuple:
    """(family, config, parameters in 4 bits with adapters that count)."""
    pair = tiny.pair(name)
    params = quant.quantize(pair.params, "nf4", layer_matrix)
    settings = adapted.LORA.get(name, adapted.LORA["llama"])
    adapters = adapted.drawn(params, settings)
    return *pair[1:3], lora.attach(params, adapters, adapted.scale(settings))


def continued(family, c, params, layers, row: list[int], at: int) -> np.ndarray:
    """Logits after each token from `at` on: a padded prompt of `at` tokens, then one by one."""
    tokens = jnp.asarray([row[:at] + [77] * 7, [5] * (at + 7)], jnp.int32)
    lengths = jnp.asarray([at, 3], jnp.int32)
    hidden, room = prefill(family, c, params, tokens, lengths, slots=128, dtype=jnp.float32)
    found = [hidden[:, at - 1]]
    for token in row[at:]:
        token = jnp.asarray([token, 9], jnp.int32)
        hidden, room = step(family, c, layers, room, token, jnp.asarray([1, 0], jnp.int32))
        found.append(hidden)
    assert room.used.tolist() == [len(row), 3] and room.context.tolist() == [at, 3]
    return np.asarray(decoder.logits(family, c, params, jnp.stack(found, 1)))[0]


@pytest.mark.parametrize("name", ["qwen2_yarn_window", "mistral", "qwen3_biased"])
def test_a_padded_prompt_and_single_tokens_equal_forward(name):
    pair = tiny.pair(name)
    row = tiny.draw(7, 50)
    want = np.asarray(tiny.logits(*pair[1:], *tiny.padded([row], 50)))[0, 32:]
    found = continued(*pair[1:], pair.params, row, 33)
    assert np.abs(found - want).max() <= 2e-5 * want.std()


@pytest.mark.parametrize("name", ["qwen3", "llama_tied_biased", "llama_gelu"])
def test_materialized_layers_decode_as_stored_ones(name):
    family, c, params = fine_tuned(name)
    row = tiny.draw(8, 20)
    ways = (params, *(unstack.materialized(family, c, params, merged) for merged in (True, False)))
    stored, *plain = (continued(family, c, params, layers, row, 16) for layers in ways)
    for found in plain:
        assert np.abs(stored - found).max() <= 2e-5 * stored.std()


@pytest.mark.parametrize("plain", [False, True])
def test_layers_of_different_kinds_decode_as_forward(plain):
    family, c, params = tiny.pair("qwen2")[1:]
    four = lambda w: quant.FORMATS["nf4"](w)
    kinds = lambda w: leaves.Stacks((four(w[jnp.asarray([1, 2])]), w[:1]), ((1, 2), (0,)))
    params = tree.map_paths(lambda p, w: kinds(w) if layer_matrix(p) else w, params)
    row = tiny.draw(9, 12)
    want = np.asarray(tiny.logits(family, c, params, *tiny.padded([row], 12)))[0, 7:]
    layers = unstack.materialized(family, c, params) if plain else params
    found = continued(family, c, params, layers, row, 8)
    assert np.abs(found - want).max() <= 2e-5 * want.std()


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama_tied_biased"])
def test_a_materialized_leaf_is_the_merged_weight_of_its_layer(name, merged):
    family, c, params = fine_tuned(name)
    plain = unstack.materialized(family, c, params, merged)
    stacked = {
        path.removeprefix(f"{family.LAYERS}.*."): leaf
        for path, leaf in tree.flatten(params).items()
        if ".*." in path
    }
    for i, node in enumerate(plain.layers):
        flat = tree.flatten(node)
        assert set(flat) == set(stacked)
        for path, leaf in flat.items():
            want = leaves.dense(leaves.layer(stacked[path], i))
            got = leaf.dequantize() if isinstance(leaf, unstack.Joined) else leaf
            np.testing.assert_allclose(got, want, atol=1e-6)
            assert leaf.shape == want.shape
    rest = tree.flatten(plain.rest)
    kinds = jax.Array if merged else (jax.Array, leaves.Lora)
    assert all(isinstance(leaf, kinds) for leaf in rest.values())
    assert not any(family.LAYERS in path for path in rest)


@pytest.mark.parametrize("merged", [True, False])
def test_projections_that_share_their_input_are_one_array_and_one_product(merged):
    """Adapters that stay apart are one product more for all of them."""
    family, c, params = fine_tuned("llama")
    node = unstack.materialized(family, c, params, merged).layers[0]
    q, k, v = (node["self_attn"][f"{n}_proj"]["weight"] for n in "qkv")
    assert q.whole is k.whole is v.whole
    ranks = 0 if merged else q.up.shape[1]
    assert q.whole.shape[0] == sum(q.heights) + ranks and (merged or ranks > 0)
    nodes = [node["self_attn"][f"{n}_proj"] for n in "qkv"]
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 1, 64)), jnp.float32)
    text = str(jax.make_jaxpr(lambda nodes, x: leaves.linears(nodes, x))(nodes, x))
    assert text.count("dot_general") == (1 if merged else 2)
    for some in ([0, 1, 2], [1], [2, 0]):
        got = leaves.linears([nodes[n] for n in some], x)
        for y, n in zip(got, some, strict=True):
            np.testing.assert_allclose(y, x @ nodes[n]["weight"].dequantize().T, atol=1e-5)
    with pytest.raises(ValueError, match="those of one layer, asked for layer 0"):
        leaves.layer(q, 0)


def test_experts_of_a_materialized_layer_are_read_by_their_numbers():
    family, c, params = tiny.pair("qwen3_moe")[1:]
    node = unstack.materialized(family, c, params).layers[0]["mlp"]["experts"]["*"]
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 64)), jnp.float32)
    groups = leaves.Groups(jnp.asarray([1, 4]), jnp.asarray([0, 1, 0, 0, 1, 0], jnp.int32))
    for name in qwen3_moe.NAMES[:2]:
        w = params["model"]["layers"]["*"]["mlp"]["experts"]["*"][name]["weight"].parts[0][0]
        want = jnp.einsum("ni,noi->no", x, w[jnp.asarray([1, 4])])
        np.testing.assert_allclose(leaves.grouped(node[name], x, groups), want, atol=1e-5)


def test_the_bytes_of_materialized_layers_are_known_before():
    family, c, params = fine_tuned("qwen3")
    made = unstack.materialized(family, c, params).layers
    held = {id(x): x.nbytes for x in jax.tree.leaves(made)}
    assert unstack.plain_bytes(family, params) == sum(held.values())
    assert not any(x is y for x in jax.tree.leaves(made) for y in jax.tree.leaves(params))


@cache
def big() -> tuple:
    """(family, config, 4-bit parameters with adapters, as shapes) of a wider llama."""
    hf = tiny.reference("llama").config.to_dict() | BIG | dict(head_dim=64)
    family = family_of(hf["model_type"])
    c = family.config(hf)
    zeros = lambda: tree.unflatten({
        path: jnp.zeros((c.layers, *shape) if "*" in path else shape)
        for path, (shape, _) in family.weights(c).items()
    })  # fmt: skip

    def make():
        params = quant.quantize(zeros(), "nf4", layer_matrix)
        return lora.attach(params, lora.init(jax.random.key(0), params, 8), 2.0)

    return family, c, jax.eval_shape(make)


def draft_of(family, c) -> sample.Draft:
    """A generation of BATCH rows under way."""
    rows = lambda dtype: jnp.zeros((BATCH,), dtype)
    room = decoding.empty(family, c, BATCH, SLOTS, jnp.float32)
    seen = jnp.zeros((BATCH, c.vocab), bool)
    start = (rows(jnp.int32), rows(jnp.float32), seen, rows(bool), jax.random.key(0))
    return sample.Draft(room, *start)


def compiled(decode):
    """`decode` over `big` for 16 tokens, compiled and never run."""
    family, c, params = big()
    knobs = Sampling(*(jnp.asarray(x, jnp.float32) for x in Sampling(top_k=0)))
    run = lambda params, draft: decode(
        family, c, params, draft, jnp.asarray([-2]), knobs, steps=16, limit=16
    )
    lowered = jax.jit(run, donate_argnums=1).lower(
        params, jax.eval_shape(lambda: draft_of(family, c))
    )
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


@cache
def decoding_program():
    return compiled(sample.decode)


def wide_layer() -> int:
    """Bytes of one layer's matrices in float32."""
    family, c, params = big()
    return unstack.plain_bytes(family, params) // c.layers


def test_stored_weights_are_wide_in_two_layers_at_most():
    temporary = decoding_program().memory_analysis().temp_size_in_bytes
    assert temporary < 2.5 * wide_layer(), (temporary, wide_layer())


@pytest.mark.parametrize("how", ["before the loop", "before the first layer"])
def test_weights_that_are_wide_in_all_layers_would_be_noticed(how, monkeypatch):
    after, none = unstack.after, lambda i, x: (jnp.asarray(i, jnp.int32), x)
    first = lambda i, x: after(i, x) if i == 0 else none(i, x)
    monkeypatch.setattr(unstack, "after", none if how == "before the loop" else first)
    temporary = compiled(sample.decode).memory_analysis().temp_size_in_bytes
    assert temporary > big()[1].layers * wide_layer()


def test_the_caches_are_written_in_place():
    program = decoding_program()
    _, c, _ = big()
    shape = f"{BATCH},{c.kv_heads},{SLOTS},{c.head_width}"
    text = program.as_text()
    donated = re.search(r"input_output_alias=\{(.*)\}, ", text.splitlines()[0]).group(1)
    assert donated.count("-alias") >= 2 * c.layers
    assert not re.findall(rf"= bf16\[{shape}\]\S* copy\(", text)


@pytest.mark.parametrize("batch, launches", [(1, 2), (64, 1)])
def test_for_a_gpu_attention_is_one_or_two_launches_a_layer(batch, launches):
    """Rows too few for the GPU are cut into parts, which a second launch joins."""
    hf = tiny.reference("llama").config.to_dict() | dict(num_key_value_heads=4)
    family = family_of(hf["model_type"])
    c = family.config(hf)
    stack = lambda path, size: (c.layers, *size) if "*" in path else size
    shapes = tree.unflatten({
        path: jax.ShapeDtypeStruct(stack(path, size), jnp.bfloat16)
        for path, (size, _) in family.weights(c).items()
    })  # fmt: skip
    plain = jax.eval_shape(lambda p: unstack.materialized(family, c, p), shapes)
    room = jax.eval_shape(lambda: decoding.empty(family, c, batch, 256, jnp.bfloat16))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    with _choice.target("gpu"):
        run = jax.jit(lambda *args: decoding.step(family, c, *args), donate_argnums=1)
        text = run.trace(plain, room, row, row).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == launches * c.layers
    assert text.count("stablehlo.dot_general") == 4 * c.layers
