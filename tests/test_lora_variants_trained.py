"""Weights trained as they are: gradients against torch, PEFT's modules_to_save, resized tables."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import programs
import pytest
import tiny
import torch
from adapted import read_config
from safetensors.numpy import load_file, save_file

from bridge import merge, peft_adapter
from bridge.peft_adapter import Settings
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import decoder, leaves, lora, losses, quant, train, tree
from unsloth_jax.dims import Batch, Total
from unsloth_jax.leaves import Lora, Stacks, Vacant, View
from unsloth_jax.lora import trained

LENGTH = 12
ROWS = [tiny.draw(71, LENGTH), [*tiny.draw(72, 4), 9, 9, 9, 9, *tiny.draw(73, 4)]]
BOTH = ("embed_tokens", "lm_head")
EMBEDDING = "model.embed_tokens.weight"
PAIRS = Settings(2, 4.0, targets=("q_proj",))


def loss(name: str, trainable, params):
    """Summed cross entropy of every next token."""
    pair, (tokens, positions, segments) = tiny.pair(name), tiny.padded(ROWS, LENGTH)
    params = lora.attach(params, trainable, 2.0)
    hidden = decoder.forward(pair.family, pair.config, params, tokens, positions, segments)
    head = pair.family.head(pair.config, params)
    return -losses.token_logprobs(hidden, head, jnp.roll(tokens, -1, 1))[:, :-1].sum()


@cache
def compiled(name: str):
    return jax.jit(jax.value_and_grad(lambda trainable, params: loss(name, trainable, params)))


def scores(name: str, params) -> np.ndarray:
    pair = tiny.pair(name)
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded(ROWS, LENGTH)))


@cache
def in_torch(name: str):
    """(loss, gradient of every parameter by its full name) of transformers' model."""
    model, ids = tiny.reference(name), torch.tensor(ROWS)
    logits = model(ids).logits[:, :-1]
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    total.backward()
    return total.item(), {k: p.grad.numpy() for k, p in model.named_parameters()}


TRAINED = [
    ("llama", BOTH), ("llama", "all"), ("qwen3", BOTH), ("qwen3", "all"),
    ("llama_tied_biased", ("norm", "post_attention_layernorm", "k_proj")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "modules"), TRAINED, ids=str)
def test_gradients_of_trained_weights_are_those_of_torch(name, modules):
    params = tiny.pair(name).params
    own = trained.init(params, modules)
    value, grads = compiled(name)(own, params)
    total, want = in_torch(name)
    assert abs(float(value) - total) < 1e-5 * total
    count = 0
    for path, g in tree.flatten(grads).items():
        for i in range(3) if ".*." in path else (None,):
            there = want[path if i is None else path.replace("*", str(i))]
            here = np.asarray(g if i is None else g[i])
            assert np.abs(here - there).max() <= 1e-4 * np.abs(there).max(), (path, i)
            count += 1
    assert count == (len(want) if modules == "all" else {"llama": 2, "qwen3": 1}.get(name, 10))


@pytest.mark.parametrize(("name", "path"), [("qwen3", EMBEDDING), ("llama", "lm_head.weight")])
def test_gradients_of_a_tied_and_of_an_own_head_equal_finite_differences(name, path):
    params, own = tiny.pair(name).params, trained.init(tiny.pair(name).params, BOTH)
    run = compiled(name)
    g = tree.flatten(run(own, params)[1])[path]
    norm, size = float(jnp.linalg.norm(g)), 1e-2
    there, back = (
        run(tree.unflatten(tree.flatten(own) | {path: tree.flatten(own)[path] + by * g}), params)[0]
        for by in (size / norm, -size / norm)
    )
    assert abs(float(there - back) / (2 * size) - norm) <= 0.01 * norm


def test_both_uses_of_a_tied_table_add_to_its_gradient():
    pair, rows = tiny.pair("qwen3"), tiny.padded(ROWS, LENGTH)
    table = tree.flatten(pair.params)[EMBEDDING]

    def value(above, below):
        embedding = {"weight": above}
        params = pair.params | {"model": pair.params["model"] | {"embed_tokens": embedding}}
        hidden = decoder.forward(pair.family, pair.config, params, *rows)
        logps = losses.token_logprobs(hidden, {"weight": below}, jnp.roll(rows[0], -1, 1))
        return -logps[:, :-1].sum()

    first, second = jax.jit(jax.grad(value, (0, 1)))(table, table)
    own = trained.init(pair.params, BOTH)
    g = tree.flatten(compiled("qwen3")(own, pair.params)[1])[EMBEDDING]
    np.testing.assert_allclose(g, first + second, atol=1e-5 * float(jnp.abs(g).max()))
    assert min(float(jnp.abs(x).max()) for x in (first, second)) > 0.01 * float(jnp.abs(g).max())


def test_a_frequent_tokens_gradient_is_summed_in_float32():
    ids, table = jnp.zeros((4, 512), jnp.int32), jnp.ones((3, 8), jnp.bfloat16)
    value = lambda t: leaves.embed({"weight": t}, ids).astype(jnp.float32).sum() * 1.01
    found = jax.grad(value)(table)
    step = float(jnp.bfloat16(1.01))
    np.testing.assert_allclose(found[0].astype(jnp.float32), 2048 * step, rtol=2**-8)
    assert not np.asarray(found[1:], np.float32).any()
    # A CPU widens 16-bit sums by itself, so that the values alone prove nothing here.
    made = programs.made(jax.jit(jax.grad(value)).trace(table).jaxpr)
    assert {dtype for op, _, dtype in made if "scatter" in op} == {"float32"}


def test_float32_masters_leave_the_model_in_16_bits():
    name = "qwen3"
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.pair(name).params)
    own = trained.init(params, "all")
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("float32")}
    placed = lora.attach(params, own, 1.0)
    assert {x.dtype for x in jax.tree.leaves(placed)} == {jnp.dtype("bfloat16")}
    grads = jax.eval_shape(jax.grad(lambda t: loss(name, t, params)), own)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    moved = jax.tree.map(lambda x: x + 1e-4, own)
    assert float(jnp.abs(jax.tree.leaves(moved)[0] - jax.tree.leaves(own)[0]).min()) > 0


def test_places_of_trained_weights_need_not_hold_them():
    params = tiny.pair("llama").params
    own = tree.unflatten(
        tree.flatten(trained.init(params, BOTH))
        | tree.flatten(lora.init(jax.random.key(0), params, 2, ("q_proj",)))
    )
    frozen = trained.vacated(params, own)
    flat = tree.flatten(frozen)
    assert {p for p, x in flat.items() if isinstance(x, Vacant)} == {EMBEDDING, "lm_head.weight"}
    want, _ = compiled("llama")(own, params)
    found, _ = compiled("llama")(own, frozen)
    assert float(found) == float(want)
    everything = trained.vacated(params, trained.init(params, "all"))
    assert jax.tree.leaves(everything) == [] and everything == trained.vacated(
        params, trained.init(params, "all")
    )


def test_stacks_of_several_kinds_are_trained_in_their_parts():
    norm = jnp.ones((3, 4), jnp.bfloat16)
    parts = Stacks((norm[:1], norm[1:].astype(jnp.float32)), ((1,), (0, 2)))
    params = {"layers": {"*": {"norm": {"weight": parts}}}}
    own = trained.init(params, ("norm",))
    placed = tree.flatten(lora.attach(params, own, 1.0))["layers.*.norm.weight"]
    assert [x.dtype.name for x in placed.parts] == ["bfloat16", "float32"]
    assert [x.dtype.name for x in own["layers"]["*"]["norm"]["weight"].parts] == ["float32"] * 2
    frozen = tree.flatten(trained.vacated(params, own))["layers.*.norm.weight"]
    assert [type(x) for x in frozen.parts] == [Vacant, Vacant]
    again = tree.flatten(lora.overlay({"w": frozen}, {"w": placed}))["w"]
    assert again.layers == placed.layers


def test_a_step_moves_pairs_and_trained_weights_together():
    params = tiny.pair("llama").params
    adapters = lora.init(jax.random.key(0), params, 2, ("q_proj",))
    own = tree.unflatten(tree.flatten(adapters) | tree.flatten(trained.init(params, BOTH)))
    rule = optax.sgd(1e-3)
    total = lambda t, frozen, b: Total(loss("llama", t, frozen), jnp.float32(22))
    step = train.make_step(total, rule)
    none = Batch(*(jnp.zeros((1, 1, 1), kind) for kind in "iifii"))
    state, report = step(train.start(own, rule), params, none)
    after, before = tree.flatten(state.trainable), tree.flatten(own)
    still = {p for p in before if bool((after[p] == before[p]).all())}
    assert bool(report.finite) and still == {"model.layers.*.self_attn.q_proj.a"}


def moved(params, modules, seed: int = 3):
    """A trainable tree: pairs with `b` drawn, and trained weights off their place."""
    rng = np.random.default_rng(seed)
    noise = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)
    adapters = tree.flatten(lora.init(jax.random.key(4), params, PAIRS.rank, PAIRS.targets))
    own = tree.flatten(jax.tree.map(noise, trained.init(params, modules)))
    return tree.unflatten({p: noise(x) for p, x in adapters.items()} | own)


def redrawn(model: peft.PeftModel, seed: int = 5) -> peft.PeftModel:
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p.add_(torch.tensor(rng.normal(0, 0.1, p.shape), dtype=torch.float32))
    return model.eval()


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ROWS)).logits.numpy()


@pytest.mark.parametrize(
    ("name", "modules"),
    [("llama", BOTH), ("llama", ("embed_tokens",)), ("qwen3", BOTH), ("llama", ("model.norm",)),
     ("llama", ("input_layernorm", "lm_head"))],
    ids=str,
)  # fmt: skip
def test_a_folder_with_trained_modules_gives_the_same_logits_in_peft(name, modules, tmp_path):
    params, s = tiny.pair(name).params, PAIRS._replace(saved=modules)
    own = moved(params, tuple(m.removeprefix("model.") for m in modules))
    if modules == ("model.norm",):
        own = moved(params, modules)
    peft_adapter.save(tmp_path / "a", own, s)
    model = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "a").eval()
    want, found = theirs(model), scores(name, lora.attach(params, own, 2.0))
    assert np.abs(found - want).max() <= 1e-4 * want.std()
    again, read = peft_adapter.load(tmp_path / "a", params)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), own, again)
    assert all(jax.tree.leaves(same)) and read.saved == modules
    model.save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / who / peft_adapter.WEIGHTS)) for who in ("a", "theirs")]
    assert names[0] == names[1]
    assert read_config(tmp_path / "a")["modules_to_save"] == [*modules]


@pytest.mark.parametrize(
    ("name", "modules", "tie"),
    [
        ("llama", [*BOTH], False),
        ("llama", ["lm_head"], False),
        ("llama", ["embed_tokens"], True),
        ("qwen3", ["embed_tokens"], True),
    ],
)
def test_trained_modules_of_peft_give_the_same_logits_here(name, modules, tie, tmp_path):
    fields = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"],
        modules_to_save=modules, ensure_weight_tying=tie,
    )  # fmt: skip
    model = redrawn(peft.get_peft_model(tiny.reference(name), fields))
    model.save_pretrained(tmp_path)
    own, _ = peft_adapter.load(tmp_path, tiny.pair(name).params)
    want, found = theirs(model), scores(name, lora.attach(tiny.pair(name).params, own, 2.0))
    assert np.abs(found - want).max() <= 1e-4 * want.std()
    assert np.abs(scores(name, tiny.pair(name).params) - want).max() > 0.1 * want.std()


def test_halves_of_a_tied_pair_that_differ_or_stand_alone_are_refused(tmp_path):
    for n, modules in enumerate(([*BOTH], ["embed_tokens"])):
        fields = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=modules
        )
        model = redrawn(peft.get_peft_model(tiny.reference("qwen3"), fields))
        model.save_pretrained(tmp_path / str(n))
    params = tiny.pair("qwen3").params
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        peft_adapter.load(tmp_path / "0", params)
    with pytest.raises(ValueError, match="trains one of embedding and head.*both or neither"):
        peft_adapter.load(tmp_path / "1", params)


def test_folders_whose_trained_modules_are_not_what_is_said_are_refused(tmp_path):
    params = tiny.pair("llama").params
    own = moved(params, BOTH)
    for saved, message in ((("lm_head",), "embed_tokens.weight'. was trained beside"),
                           ((*BOTH, "norm"), "name .'norm'. that were not trained")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            peft_adapter.save(tmp_path / "a", own, PAIRS._replace(saved=saved))
    peft_adapter.save(tmp_path / "a", own, PAIRS._replace(saved=BOTH))
    path = tmp_path / "a" / peft_adapter.WEIGHTS
    values = load_file(path)
    key = "base_model.model.lm_head.weight"
    save_file({k: v for k, v in values.items() if k != key}, path)
    with pytest.raises(ValueError, match=rf"missing {key} \(256, 64\)"):
        peft_adapter.load(tmp_path / "a", params)
    save_file(values | {key: values[key][:200]}, path)
    with pytest.raises(ValueError, match=rf"{key} has shape \(200, 64\)"):
        peft_adapter.load(tmp_path / "a", params)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_merged_models_hold_the_trained_weights(name, tmp_path):
    pair, own = tiny.pair(name), moved(tiny.pair(name).params, BOTH)
    source = SafetensorsSource(tiny.save(pair.model, tmp_path))
    found = merge.merged(pair.family, pair.config, pair.params, own, 2.0, source, "float32")
    placed = tree.flatten(lora.attach(pair.params, own, 2.0))
    tables = {w.name: w.read() for w in found.weights}
    for path in (p for p in (EMBEDDING, "lm_head.weight") if p in placed):
        np.testing.assert_array_equal(tables[path], placed[path])
        assert path in found.adapted
    whole = jax.tree.map(lambda x: x + 1, trained.init(pair.params, "all"))
    frozen = trained.vacated(pair.params, whole)
    everything = merge.merged(pair.family, pair.config, frozen, whole, 1.0, source, "float32")
    before = {w.name: source.read(w.name) for w in everything.weights}
    for w in everything.weights:
        np.testing.assert_array_equal(w.read(), before[w.name] + 1)
    assert everything.facts["trained"] == len(before)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (("lm_head",), "no modules .'lm_head'.; 'lm_head' is tied: name 'embed_tokens' too"),
        (("head", "embed_tokens"), "no modules .'head'.; there are .*embed_tokens"),
        ((), "a list of names or 'all'"),
        ("embed_tokens", "a list of names or 'all'"),
        (("k_proj",), "only float arrays.*k_proj.*'NF4'.*load_in_16bit=True"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_as_it_is_is_refused(modules, message):
    params = quant.quantize(
        tiny.pair("qwen3").params, "nf4", lambda path: path.endswith("k_proj.weight")
    )
    with pytest.raises(ValueError, match=message):
        trained.init(params, modules)


def test_trained_weights_without_a_place_are_refused():
    params = tiny.pair("llama").params
    table = params["lm_head"]["weight"]
    hosted = params | {"lm_head": {"weight": leaves.Hosted(np.asarray(table))}}
    for base, path, value, message in (
        (params, "lm_head.weight", table[:9], r"\(9, 64\).*holds .*\(256, 64\)"),
        (params, "other.weight", table, "holds NoneType"),
        (hosted, "lm_head.weight", table, "holds Hosted"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.overlay(base, {path: value})
    twice = moved(params, ("q_proj",))
    with pytest.raises(ValueError, match="q_proj.weight.*have adapters: choose one"):
        lora.attach(params, twice, 1.0)
    assert not isinstance(lora.attach(params, {}, 1.0)["lm_head"]["weight"], Lora | View)
