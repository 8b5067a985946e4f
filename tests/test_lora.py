"""LoRA against PEFT on torch, and merged weights against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from adapted import EXPERTS, LORA, SOME_LAYERS, drawn, in_peft, names_adapted, scale

from bridge import peft_adapter
from bridge.peft_adapter import Settings
from unsloth_jax import lora, quant, tree
from unsloth_jax.leaves import Lora, Stacks, dense, layer
from unsloth_jax.lora import targets as sites

LENGTH = 24
ROWS = [tiny.draw(11, LENGTH), tiny.draw(12, LENGTH)]
TOLERANCE = 1e-4  # of the logits' standard deviation
CHOICES = [
    ("all-linear", None),
    (["q_proj"], None),
    (["gate_proj", "v_proj"], [0, 2]),
    (["mlp.up_proj", "model.layers.1.self_attn.k_proj"], None),
    (["lm_head", "o_proj"], [1]),
    (SOME_LAYERS, None),
    (r".*\.(q|k)_proj", None),
]


def scores(pair: tiny.Pair, params) -> np.ndarray:
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded(ROWS, LENGTH)))


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ROWS)).logits.numpy()


@pytest.mark.parametrize("name", tiny.entries(LORA))
def test_our_adapter_gives_the_same_logits_in_peft(name, tmp_path, figure):
    pair, s = tiny.pair(name), LORA[name]
    adapters = drawn(pair.params, s)
    peft_adapter.save(tmp_path / "ours", adapters, s)
    model = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "ours").eval()
    expected, base = theirs(model), theirs(pair.model)
    got = scores(pair, lora.attach(pair.params, adapters, scale(s)))
    said = f"our adapter's logits in PEFT, {pair.model.config.model_type}, {name}, share of std"
    figure(said, np.abs(got - expected).max() / expected.std(), TOLERANCE)
    assert np.abs(base - expected).max() > 0.1 * expected.std()


@pytest.mark.parametrize("name", tiny.entries(LORA))
def test_an_adapter_of_peft_gives_the_same_logits_here(name, tmp_path):
    pair, s = tiny.pair(name), LORA[name]
    model = in_peft(name, s)
    model.save_pretrained(tmp_path)
    adapters, read = peft_adapter.load(tmp_path, pair.params)
    expected = theirs(model)
    got = scores(pair, lora.attach(pair.params, adapters, scale(read)))
    assert np.abs(got - expected).max() <= TOLERANCE * expected.std()
    assert jax.tree.structure(adapters) == jax.tree.structure(drawn(pair.params, s))
    assert (read.rank, read.alpha, read.rslora, read.layers) == (
        s.rank,
        s.alpha,
        s.rslora,
        s.layers,
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_names_of_single_experts_matrices_load_as_peft_fuses_them(name, tmp_path):
    """PEFT then gives gate and up together a pair of twice the rank and the same scale."""
    names = ("w1", "w2", "w3") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    s = Settings(2, 6.0, targets=(*names, "v_proj"))
    in_peft(name, s).save_pretrained(tmp_path / "theirs")
    pair = tiny.pair(name)
    adapters, read = peft_adapter.load(tmp_path / "theirs", pair.params)
    expected = theirs(in_peft(name, s))
    got = scores(pair, lora.attach(pair.params, adapters, scale(read)))
    assert np.abs(got - expected).max() <= TOLERANCE * expected.std()
    peft_adapter.save(tmp_path / "again", adapters, read)
    model = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "again").eval()
    assert np.abs(theirs(model) - expected).max() <= TOLERANCE * expected.std()


def test_permuted_experts_are_noticed(tmp_path):
    pair, s = tiny.pair("qwen3_moe_unnormed"), Settings(2, 4.0, targets=EXPERTS)
    adapters = drawn(pair.params, s)
    expected = scores(pair, lora.attach(pair.params, adapters, scale(s)))
    turned = tree.map_paths(
        lambda path, x: jnp.roll(x, 1, axis=1) if path.endswith("b") else x, adapters
    )
    got = scores(pair, lora.attach(pair.params, turned, scale(s)))
    assert np.abs(got - expected).max() > 0.1 * expected.std()


def test_routers_and_experts_are_no_linear_modules():
    """PEFT's "all-linear" would take Llama 4's router, an adapter of which is refused."""
    chosen = names_adapted(tiny.pair("llama4_text").params, "all-linear")
    ends = {name.partition("feed_forward.")[2] for name in chosen}
    projections = {"gate_proj", "up_proj", "down_proj"}
    assert ends == {"", *projections, *(f"shared_expert.{name}" for name in projections)}


@pytest.mark.parametrize(("targets", "layers"), CHOICES, ids=str)
def test_targets_and_layers_choose_what_peft_chooses(targets, layers):
    fields = peft.LoraConfig(r=2, target_modules=targets, layers_to_transform=layers)
    model = peft.get_peft_model(tiny.reference("llama"), fields)
    chosen = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert names_adapted(tiny.pair("llama").params, targets, layers) == chosen


def matrix_pairs(params, adapters, s: Settings):
    """(merged weight, base weight, a, b) of every adapted matrix of every layer."""
    flat, pairs = tree.flatten(params), tree.flatten(adapters)
    attached = tree.flatten(lora.attach(params, adapters, scale(s)))
    at = lambda leaf, i: leaf if i is None else layer(leaf, i)
    for path, ids in lora.modules(params, s.targets, s.layers).items():
        site = sites.sites(params)[path]
        ends = np.cumsum([0, *site.heights])
        for w, start, stop in zip(site.weights, ends[:-1], ends[1:], strict=True):
            for i in ids or (None,):
                a, b = (np.asarray(at(pairs[f"{path}.{side}"], i)) for side in "ab")
                yield at(attached[w], i), dense(at(flat[w], i)), a, b[..., start:stop, :]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in LORA), ("llama", "bfloat16")]
)
def test_merged_weights_equal_a_recomputation_to_one_ulp(name, dtype):
    pair, s = tiny.pair(name), LORA[name]
    params = jax.tree.map(lambda x: x.astype(dtype), pair.params)
    adapters, count = drawn(params, s), 0
    for leaf, base, a, b in matrix_pairs(params, adapters, s):
        w, delta = np.asarray(base, np.float32), np.float32(scale(s)) * (b @ a)
        expected = (w + delta).astype(dtype).astype(np.float32)
        # Products of experts and of one row are summed in another order: a sum's own bound.
        terms = scale(s) * (np.abs(b) @ np.abs(a))
        size = np.abs(delta) if b.ndim == 2 and len(b) > 1 else s.rank * terms
        ulp = np.float32(jnp.finfo(dtype).eps) * (np.abs(w) + size)
        assert isinstance(leaf, Lora)
        assert (np.abs(np.asarray(dense(leaf), np.float32) - expected) <= ulp).all()
        assert np.abs(delta).max() > 0.1
        count += 1
    chosen = lora.modules(params, s.targets, s.layers)
    known = sites.sites(params)
    assert count == sum(len(ids or "1") * len(known[p].weights) for p, ids in chosen.items())


def test_merged_weights_equal_those_that_peft_merges(tmp_path):
    pair, s = tiny.pair("llama"), LORA["llama"]
    adapters = drawn(pair.params, s)
    peft_adapter.save(tmp_path / "a", adapters, s)
    model = peft.PeftModel.from_pretrained(tiny.reference("llama"), tmp_path / "a")
    state = model.merge_and_unload().state_dict()
    for path, leaf in tree.flatten(lora.attach(pair.params, adapters, scale(s))).items():
        expected = [state[n].numpy() for n in (path.replace("*", str(i)) for i in range(3))]
        got = np.asarray(dense(leaf))
        np.testing.assert_allclose(
            got, np.stack(expected) if "*" in path else expected[0], atol=2e-6
        )


def test_merged_parameters_give_the_logits_of_the_attached_ones():
    pair, s = tiny.pair("llama"), LORA["llama"]
    attached = lora.attach(pair.params, drawn(pair.params, s), scale(s))
    merged = tree.map_paths(lambda path, leaf: dense(leaf), attached)
    expected = scores(pair, attached)
    assert np.abs(scores(pair, merged) - expected).max() <= TOLERANCE * expected.std()


def test_adapters_over_4_bit_layers_merge_into_what_these_dequantize_to():
    s = Settings(4, 8.0, targets=("k_proj",), layers=(0, 2))
    params = quant.quantize(
        tiny.pair("qwen3").params, "nf4", lambda path: path.endswith("k_proj.weight")
    )
    for leaf, base, a, b in matrix_pairs(params, drawn(params, s), s):
        expected = np.asarray(base) + np.float32(scale(s)) * (b @ a)
        np.testing.assert_allclose(np.asarray(dense(leaf)), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fresh_adapters_merge_into_the_bytes_of_the_base(name):
    pair, s = tiny.pair(name), LORA[name]
    adapters = lora.init(jax.random.key(0), pair.params, s.rank, s.targets, s.layers)
    for leaf, base, a, b in matrix_pairs(pair.params, adapters, s):
        assert np.asarray(dense(leaf)).tobytes() == np.asarray(base).tobytes()
        assert a.any() and not b.any() and a.dtype == b.dtype == np.float32


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_starts_are_spread_as_those_of_peft(start):
    rank, targets = 8, ["q_proj", "down_proj"]
    model = in_peft("llama", Settings(rank, 8, targets=targets, start=start))
    adapters = tree.flatten(
        lora.init(jax.random.key(3), tiny.pair("llama").params, rank, targets, start=start)
    )
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        ours = np.asarray(adapters[f"model.layers.*.{path}.a"])
        keys = [f"model.layers.{i}.{path}.lora_A.default.weight" for i in range(3)]
        state = {k.removeprefix("base_model.model."): v for k, v in model.state_dict().items()}
        expected = np.stack([state[k].numpy() for k in keys])
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours.std(), expected.std(), rtol=0.08)
        assert abs(ours.mean()) < 0.08 * expected.std()
        if start is True:
            bound = expected.shape[-1] ** -0.5
            assert 0.99 * bound < np.abs(ours).max() <= bound
            assert 0.99 * bound < np.abs(expected).max() <= bound * (1 + 1e-6)
        else:
            np.testing.assert_allclose(ours.std(), 1 / rank, rtol=0.08)
            assert np.abs(ours).max() > 2.5 / rank


def test_starts_differ_by_key_module_and_layer():
    params = tiny.pair("llama").params
    a = lambda seed: tree.flatten(lora.init(jax.random.key(seed), params, 4, ("q_proj", "k_proj")))
    q, k, other = (
        np.asarray(a(seed)[f"model.layers.*.self_attn.{name}.a"])
        for seed, name in ((0, "q_proj"), (0, "k_proj"), (1, "q_proj"))
    )
    np.testing.assert_array_equal(q, a(0)["model.layers.*.self_attn.q_proj.a"])
    assert len(np.unique(np.concatenate([*q, *k, *other]))) == q.size * 3


def test_layers_without_adapters_have_no_pair_and_keep_their_weight():
    pair, s = tiny.pair("qwen3"), LORA["qwen3"]
    adapters = drawn(pair.params, s)
    assert all(
        isinstance(x, Stacks) and x.layers == ((0, 2),) for x in tree.flatten(adapters).values()
    )
    leaf = tree.flatten(lora.attach(pair.params, adapters, 2.0))[
        "model.layers.*.mlp.gate_proj.weight"
    ]
    base = pair.params["model"]["layers"]["*"]["mlp"]["gate_proj"]["weight"]
    assert not isinstance(layer(leaf, 1), Lora) and isinstance(layer(leaf, 2), Lora)
    np.testing.assert_array_equal(layer(leaf, 1), base[1])


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora", "expected"),
    [(16, 16, False, 1.0), (16, 8, False, 2.0), (16, 16, True, 4.0), (1, 4, True, 0.5)],
)
def test_scaling_is_alpha_by_rank_or_by_its_root(alpha, rank, rslora, expected):
    assert lora.scaling(alpha, rank, rslora) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(targets=("q_proj", "qq_proj")), r"qq_proj.*match nothing; nearest known: .*q_proj"),
        (dict(targets="nothing"), "'nothing'.*match nothing"),
        (dict(targets=()), "match nothing"),
        (dict(layers=(3,)), r"names \[3\]; there are 0 to 2"),
        (dict(layers=()), "names no layer"),
        (dict(targets=SOME_LAYERS, layers=(0,)), "regular expression"),
        (dict(targets=["layers.1.mlp.up_proj"], layers=(0,)), "leaves nothing to adapt.*up_proj"),
        (dict(start="pissa"), r"'pissa' does not leave the base.*\[True, 'gaussian'\]"),
        (dict(rank=0), "positive integer, got 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(key, change, message):
    with pytest.raises(ValueError, match=message):
        lora.init(key, tiny.pair("llama").params, **dict(rank=4) | change)


@pytest.mark.parametrize("layers", [(True,), (0, True)], ids=str)
def test_a_layer_that_is_no_integer_is_refused(key, layers):
    with pytest.raises(TypeError, match=r"must be integers, got \[True\]"):
        lora.init(key, tiny.pair("llama").params, 4, layers=layers)
