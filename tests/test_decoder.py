"""The scan over layers: how it is cut, that it changes nothing, and what its program holds."""

import dataclasses
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
import tiny
import transformers
from hub_configs import HUB

from pallas_kernels.attention import Rule, reference
from unsloth_jax import decoder, leaves, lora, losses, quant, train, tree
from unsloth_jax.decoder import Group, groups
from unsloth_jax.dims import Batch
from unsloth_jax.leaves import Stacks
from unsloth_jax.models import family, tree_of
from unsloth_jax.quant import nf4
from unsloth_jax.remat import KEPT, Memory
from workflows import objective

DENSE = jnp.zeros((12, 2, 2))
CUTS = {
    "uniform": ("a" * 6, [Group(0, 1, 6)]),
    "one": ("a", [Group(0, 1, 1)]),
    "alternating": ("abababab", [Group(0, 2, 4)]),
    "alternating, cut short": ("abababa", [Group(0, 2, 3), Group(6, 1, 1)]),
    "five and one": ("aaaaab" * 2, [Group(0, 6, 2)]),
    "five and one, cut short": ("aaaaab" * 2 + "aaa", [Group(0, 6, 2), Group(12, 1, 3)]),
    "two halves": ("aaabbb", [Group(0, 1, 3), Group(3, 1, 3)]),
    "prefix": ("baaaaa", [Group(0, 1, 1), Group(1, 1, 5)]),
    "no pattern": ("abcd", [Group(i, 1, 1) for i in range(4)]),
}


@pytest.mark.parametrize("kinds, want", CUTS.values(), ids=CUTS)
def test_layers_are_cut_into_rounds_of_equal_patterns(kinds, want):
    assert groups(tuple(kinds), {"w": DENSE[: len(kinds)]}) == want


def test_layers_of_different_leaves_or_adapters_are_cut_apart():
    part = lambda *ids: Stacks((DENSE[: len(ids)],), (ids,))
    some = groups((None,) * 6, {"w": DENSE[:6], "w.a": part(2, 3)})
    assert some == [Group(0, 1, 2), Group(2, 1, 2), Group(4, 1, 2)]
    mixed = Stacks((DENSE[:3], DENSE[:3]), ((0, 2, 4), (1, 3, 5)))
    assert groups((None,) * 6, {"w": mixed}) == [Group(0, 2, 3)]


@pytest.mark.parametrize("seed", range(20))
def test_any_kinds_are_covered_once_in_order(seed):
    draw = random.Random(seed)
    kinds = tuple(draw.choice("ab") for _ in range(draw.randrange(1, 30)))
    covered = []
    for g in groups(kinds, {}):
        ids = range(g.start, g.start + g.period * g.repeats)
        assert all(kinds[i] == kinds[g.start + (i - g.start) % g.period] for i in ids)
        covered += ids
    assert covered == list(range(len(kinds)))


def batch(rows: list[list[int]], length: int) -> Batch:
    tokens, positions, segments = tiny.padded(rows, length)
    targets = jnp.roll(tokens, -1, 1)
    return Batch(tokens, targets, segments.astype(jnp.float32), positions, segments)


def nll(module, c, params, b: Batch, memory: Memory, chunk: int = losses.CHUNK):
    rows = b.tokens, b.positions, b.segments
    x = decoder.forward(module, c, params, *rows, memory, embedded=b.embedded)
    return losses.sft(losses.token_logprobs(x, module.head(c, params), b.targets, chunk), b.weights)


LEANER = {
    "full": Memory("full"),
    "written out, in tiles": Memory("none", tiles=2, unroll=True),
    "attention": Memory("attention"),
    "mlp": Memory("mlp"),
    "in tiles": Memory("full", tiles=5),
    "written out": Memory("full", unroll=True),
}
SHORT = ("full", "written out, in tiles")


@pytest.mark.parametrize(
    "way", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in LEANER]
)
def test_spending_memory_otherwise_leaves_loss_and_gradients_as_they_are(way):
    pair = tiny.pair("llama_tied_biased")
    b = batch([tiny.draw(1, 20), tiny.draw(2, 12)], 20)

    def both(memory):
        loss = lambda params: nll(*pair[1:3], params, b, memory).mean()
        value = jax.jit(jax.value_and_grad(loss))(pair.params)
        return jax.tree.map(np.asarray, value)

    (plain, plain_gradient), (saved, saved_gradient) = both(Memory("none")), both(LEANER[way])
    assert abs(plain - saved) <= 1e-6 * abs(plain)
    for (path, x), y in zip(
        tree.flatten(plain_gradient).items(), tree.flatten(saved_gradient).values(), strict=True
    ):
        assert np.abs(x - y).max() <= 1e-6 * max(1.0, np.abs(x).max()), path


def test_in_layers_written_out_dx_waits_for_the_adapters_gradients():
    pair = tiny.pair("llama")
    b = batch([tiny.draw(1, 20)], 20)
    adapters = lora.init(jax.random.key(0), pair.params, 2, ("q_proj", "up_proj"))

    def barriers(memory):
        loss = lambda adapters: nll(*pair[1:3], lora.attach(pair.params, adapters, 1.0), b, memory)
        text = str(jax.make_jaxpr(jax.grad(lambda adapters: loss(adapters).mean()))(adapters))
        lines = [line for line in text.splitlines() if "= optimization_barrier" in line]
        return [len(line.split("= optimization_barrier")[1].split()) for line in lines]

    # x, and a, b and scale of two adapters.
    held = 1 + 3 * 2
    assert held in barriers(Memory("none", unroll=True))
    assert held not in barriers(Memory("none"))


def test_rows_of_a_table_on_the_host_give_the_same_hidden_states():
    pair = tiny.pair("llama")
    b = batch([tiny.draw(1, 20), tiny.draw(2, 12)], 20)
    params = objective.hosted(pair.params)
    looked_up = jax.tree.map(jnp.asarray, objective.embedded(params, jax.tree.map(np.asarray, b)))
    hidden = jax.jit(lambda params, b: nll(*pair[1:3], params, b, Memory()).value)
    np.testing.assert_array_equal(hidden(params, looked_up), hidden(pair.params, b))
    with pytest.raises(TypeError, match="in host memory"):
        hidden(params, b)


def unrolled(module, c, params, b: Batch):
    """The same model as a plain loop over layers."""
    by = module.angles(c, b.positions, decoder.document_lengths(b.segments))
    x = module.embed(c, params, b.tokens)
    stacked = tree.flatten(params["model"]["layers"]["*"])

    for i, window in enumerate(module.kinds(c)):

        def attend(q, k, v, *, scale, window, cap=None):
            y = reference(Rule(scale, window, cap), q, k, v, b.segments, b.positions)
            return y.reshape(*q.shape[:2], -1), None

        w = tree.unflatten({path: leaves.layer(leaf, i) for path, leaf in stacked.items()})
        x, _ = module.block(c, window, w, x, by, attend)
    return module.norm(c, params, x)


ALTERNATING = {
    "alternating windows": ((None, 3) * 3, None),
    "adapters on the last layers": ((None,) * 6, (4, 5)),
    "adapters here and there on alternating windows": ((3, None) * 3, (0, 3, 4)),
}


@pytest.mark.parametrize("windows, adapted", ALTERNATING.values(), ids=ALTERNATING)
def test_the_scan_equals_a_plain_loop(windows, adapted):
    pair = tiny.pair("qwen3")
    c = dataclasses.replace(pair.config, layers=6, windows=windows)
    double = lambda path, w: jnp.concatenate([w, w[::-1] * 0.9]) if "*" in path else w
    params = tree.map_paths(double, pair.params)
    if adapted:
        adapters = lora.init(jax.random.key(0), params, 2, ("q_proj", "up_proj"), adapted)
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        params = lora.attach(params, adapters, 1.0)
    b = batch([tiny.draw(3, 12)], 12)
    rows = b.tokens, b.positions, b.segments
    run = jax.jit(lambda params: decoder.forward(pair.family, c, params, *rows))
    want = np.asarray(unrolled(pair.family, c, params, b))
    np.testing.assert_allclose(run(params), want, atol=2e-5 * want.std())


def shapes_of(module, c, dtype=jnp.float32):
    """The parameter tree as shapes, so that a large model can be traced without its weights."""
    return tree_of(module, c, lambda _, shape: jax.ShapeDtypeStruct(shape, dtype))


def lowered_step(c, module, length: int, micro: int = 2):
    """(traced training step of adapters over an NF4 base, the base's shapes)."""
    pack = lambda params: quant.quantize(params, "nf4", lambda p: p.endswith("_proj.weight"))
    base = jax.eval_shape(pack, shapes_of(module, c))
    adapters = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, 8), base)
    optimizer = optax.adamw(1e-3)

    def loss(trainable, frozen, b):
        return nll(module, c, lora.attach(frozen, trainable, 2.0), b, Memory("full"))

    step = train.make_step(loss, optimizer)
    first = jax.jit(lambda adapters, base, b: step(train.start(adapters, optimizer), base, b))
    whole = lambda dtype: jax.ShapeDtypeStruct((micro, 2, length), dtype)
    b = Batch(*(whole(d) for d in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    return first.trace(adapters, base, b), base


@pytest.fixture(scope="module")
def real_step():
    """A step of the size of SmolLM2, 2 x 2 rows of 2048 tokens; nothing is computed."""
    hf = HUB["HuggingFaceTB/SmolLM2-135M"].hf
    module = family(hf["model_type"])
    c = module.config(hf)
    traced, base = lowered_step(c, module, 2048)
    return c, base, traced


def is_nf4(leaf) -> bool:
    return isinstance(leaf, nf4.NF4)


def size(shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def test_no_constant_above_a_mebibyte_is_captured(real_step):
    _, _, traced = real_step
    inner = [traced.jaxpr] + [
        value
        for eqn in programs.equations(traced.jaxpr.jaxpr)
        for value in eqn.params.values()
        if isinstance(value, jax.extend.core.ClosedJaxpr)
    ]
    constants = [x for closed in inner for x in closed.consts]
    assert all(np.asarray(x).nbytes < 2**20 for x in constants)
    # A float32 constant is spelled with eight digits a number.
    assert max(map(len, traced.lower().as_text().splitlines())) < 2**20


def test_no_scores_of_all_tokens_and_no_wide_copy_of_the_base_are_traced(real_step):
    c, base, traced = real_step
    arrays = programs.made(traced.jaxpr)
    assert any(c.vocab in shape for _, shape, _ in arrays)
    scores = [shape for _, shape, _ in arrays if c.vocab in shape and size(shape) > 1024 * c.vocab]
    assert not [s for s in scores if c.width not in s]
    flat = tree.flatten(base)
    packed = [w.shape for path, w in flat.items() if path.endswith("_proj.weight")]
    wide = [shape for _, shape, dtype in arrays if shape in packed and "float" in dtype]
    assert not wide


@pytest.mark.parametrize("keep", list(KEPT))
@pytest.mark.parametrize("adapted", [None, (1, 2)])
def test_the_backward_pass_saves_no_packed_weights(adapted, keep):
    """Reading a layer out of a quantized stack is repeated, or the base would be held twice."""
    pair = tiny.pair("llama")
    pack = lambda params: quant.quantize(params, "nf4", lambda p: p.endswith("_proj.weight"))
    base = jax.eval_shape(pack, pair.params)
    start = lambda base: lora.init(jax.random.key(0), base, 2, layers=adapted)
    b = batch([tiny.draw(3, 12)], 12)

    def loss(adapters, base):
        return nll(*pair[1:3], lora.attach(base, adapters, 1.0), b, Memory(keep)).value

    traced = jax.jit(jax.grad(loss)).trace(jax.eval_shape(start, base), base)
    bytes_ = [shape for _, shape, dtype in programs.made(traced.jaxpr) if dtype == "uint8"]
    packed = {w.packed.shape[1:] for w in jax.tree.leaves(base, is_leaf=is_nf4) if is_nf4(w)}
    assert packed & set(bytes_)
    assert not [shape for shape in bytes_ if shape[1:] in packed and shape[0] > 1]


def test_the_program_does_not_grow_with_the_layers():
    hf = HUB["HuggingFaceTB/SmolLM2-135M"].hf
    module = family(hf["model_type"])
    lines = []
    for layers in (3, 24):
        c = module.config(hf | {"num_hidden_layers": layers})
        traced, _ = lowered_step(c, module, 128, micro=1)
        lines.append(len(traced.lower().as_text().splitlines()))
    assert lines[1] <= 1.02 * lines[0]


# Families whose layers differ: their number of layers and their kinds at 8 and at 48 layers.
PATTERNS = {
    "llama": {}, "gemma2": {}, "gemma3_text": {}, "qwen2": dict(
        use_sliding_window=True, sliding_window=8, max_window_layers=4),
    "smollm3": {}, "cohere2": {}, "qwen3_moe": dict(mlp_only_layers=[0], moe_intermediate_size=64),
    "gpt_oss": {}, "llama4_text": {}, "qwen3_5_text": {},
}  # fmt: skip


def deep(name: str, layers: int):
    """(family, config) of an entry with its family's own pattern over so many layers."""
    own = ("layer_types", "no_rope_layers", "moe_layers", "max_window_layers", "mlp_only_layers")
    kind, fields = tiny.TINY[name]
    fields = {k: v for k, v in fields.items() if k not in own}
    hf = getattr(transformers, f"{kind}Config")(
        **fields | dict(num_hidden_layers=layers) | PATTERNS[name]
    ).to_dict()
    module = family(hf["model_type"])
    return module, module.config(hf)


def lowered(name: str, layers: int):
    module, c = deep(name, layers)
    return lowered_step(c, module, 64, micro=1)[0].lower()


LONGER = [
    name if name == "gemma3_text" else pytest.param(name, marks=pytest.mark.slow)
    for name in PATTERNS
]


@pytest.mark.parametrize("name", LONGER)
def test_programs_of_48_layers_are_as_long_as_those_of_8(name):
    kinds = deep(name, 48)[0].kinds(deep(name, 48)[1])
    assert (len(set(kinds)) > 1) == (name != "llama")
    lines = [len(lowered(name, layers).as_text().splitlines()) for layers in (8, 48)]
    assert lines[1] <= 1.25 * lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_48_layers_compile_in_at_most_one_and_a_half_times_8(name, figure):
    def seconds(layers: int) -> float:
        took = []
        for _ in range(2):
            jax.clear_caches()
            start = time.process_time()
            lowered(name, layers).compile()
            took.append(time.process_time() - start)
        return min(took)

    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        ratio = seconds(48) / seconds(8)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    figure(f"compile time of 48 layers over 8, {name}", ratio, 1.5)
