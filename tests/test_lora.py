"""LoRA and its files against PEFT on torch, and merged weights against plain NumPy."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from bridge import peft_adapter
from bridge.peft_adapter import Settings
from unsloth_jax import lora, quant, tree
from unsloth_jax.leaves import Lora, Stacks, dense, layer

LENGTH = 24
ROWS = [tiny.draw(11, LENGTH), tiny.draw(12, LENGTH)]
TOLERANCE = 1e-4  # of the logits' standard deviation
SOME_LAYERS = r"model\.layers\.(0|2)\.mlp\.(up|down)_proj"
LORA = {
    "llama": Settings(4, 8.0, targets=lora.TARGETS),
    "mistral": Settings(4, 6.0, rslora=True, targets=("q_proj", "v_proj")),
    "qwen2": Settings(3, 7.5, targets="all-linear", start="gaussian"),
    "qwen3": Settings(4, 16.0, targets=("k_proj", "o_proj", "gate_proj"), layers=(0, 2)),
    "llama_tied_biased": Settings(2, 8.0, targets=SOME_LAYERS),
    "llama_gelu": Settings(2, 8.0, targets=("lm_head", "down_proj"), layers=(1,)),
}
CHOICES = [
    ("all-linear", None),
    (["q_proj"], None),
    (["gate_proj", "v_proj"], [0, 2]),
    (["mlp.up_proj", "model.layers.1.self_attn.k_proj"], None),
    (["lm_head", "o_proj"], [1]),
    (SOME_LAYERS, None),
    (r".*\.(q|k)_proj", None),
]


def scale(s: Settings) -> float:
    return lora.scaling(s.alpha, s.rank, s.rslora)


def drawn(params, s: Settings, seed: int = 5):
    """Adapters of these settings with `b` random, so that they change the result."""
    adapters = lora.init(jax.random.key(seed), params, s.rank, s.targets, s.layers, s.start)
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
    return tree.map_paths(lambda p, x: jax.tree.map(fill, x) if p.endswith(".b") else x, adapters)


def scores(pair: tiny.Pair, params) -> np.ndarray:
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded(ROWS, LENGTH)))


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ROWS)).logits.numpy()


def in_peft(name: str, s: Settings, seed: int = 9) -> peft.PeftModel:
    """PEFT's own adapter of the same settings on transformers' model, `lora_B` redrawn."""
    targets = s.targets if isinstance(s.targets, str) else list(s.targets)
    fields = peft.LoraConfig(
        task_type="CAUSAL_LM", r=s.rank, lora_alpha=s.alpha, use_rslora=s.rslora,
        target_modules=targets, layers_to_transform=s.layers and list(s.layers),
        init_lora_weights=s.start, lora_dropout=0.0,
    )  # fmt: skip
    model = peft.get_peft_model(tiny.reference(name), fields).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(torch.tensor(rng.normal(0, 0.2, p.shape)))
    return model


def names_adapted(params, targets, layers=None) -> set[str]:
    found = lora.modules(params, targets, layers)
    return {p.replace("*", str(i), 1) for p, ids in found.items() for i in ids or (0,)}


def arrays_equal(x, y) -> bool:
    same = jax.tree.map(lambda a, b: bool((a == b).all()), x, y)
    return jax.tree.structure(x) == jax.tree.structure(y) and all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", LORA)
def test_our_adapter_gives_the_same_logits_in_peft(name, tmp_path):
    pair, s = tiny.pair(name), LORA[name]
    adapters = drawn(pair.params, s)
    peft_adapter.save(tmp_path / "ours", adapters, s)
    model = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "ours").eval()
    expected, base = theirs(model), theirs(pair.model)
    got = scores(pair, lora.attach(pair.params, adapters, scale(s)))
    assert np.abs(got - expected).max() <= TOLERANCE * expected.std()
    assert np.abs(base - expected).max() > 0.1 * expected.std()


@pytest.mark.parametrize("name", LORA)
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


@pytest.mark.parametrize("name", LORA)
def test_saved_files_hold_the_names_and_fields_that_peft_writes(name, tmp_path):
    pair, s = tiny.pair(name), LORA[name]
    peft_adapter.save(tmp_path / "ours", drawn(pair.params, s), s)
    in_peft(name, s).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / peft_adapter.WEIGHTS) for who in ("ours", "theirs"))
    shapes = lambda x: {k: (v.shape, v.dtype) for k, v in x.items() if "base_layer" not in k}
    assert shapes(ours) == shapes(theirs)
    mine, other = (read_config(tmp_path / who) for who in ("ours", "theirs"))
    assert set(mine) <= set(other)
    assert {k for k in mine if mine[k] != other[k]} <= {"target_modules", "base_model_name_or_path"}


def read_config(folder: Path) -> dict:
    return json.loads((folder / peft_adapter.CONFIG).read_text())


@pytest.mark.parametrize("name", LORA)
def test_saved_adapters_load_bit_for_bit_with_their_settings(name, tmp_path):
    pair = tiny.pair(name)
    notes = {"chat_template_sha256": "12ab"}
    s = LORA[name]._replace(base="some/model", revision="main", metadata=notes)
    adapters = drawn(pair.params, s)
    peft_adapter.save(tmp_path / "a", adapters, s)
    again, read = peft_adapter.load(tmp_path / "a", pair.params)
    assert arrays_equal(adapters, again)
    kept = lambda s: s._replace(targets=None, metadata=None)
    assert kept(read) == kept(s) and read.metadata == notes
    assert names_adapted(pair.params, read.targets, read.layers) == names_adapted(
        pair.params, s.targets, s.layers
    )


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
    for path, ids in lora.modules(params, s.targets, s.layers).items():
        w, on = f"{path}.weight", ids or (None,)
        at = lambda leaf, i: leaf if i is None else layer(leaf, i)
        for i in on:
            a, b = (np.asarray(at(pairs[f"{path}.{side}"], i)) for side in "ab")
            yield at(attached[w], i), dense(at(flat[w], i)), a, b


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
        ulp = np.float32(jnp.finfo(dtype).eps) * (np.abs(w) + np.abs(delta))
        assert isinstance(leaf, Lora)
        assert (np.abs(np.asarray(dense(leaf), np.float32) - expected) <= ulp).all()
        assert np.abs(delta).max() > 0.1
        count += 1
    assert count == len(names_adapted(params, s.targets, s.layers))


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
        (dict(targets=("q_proj", "qq_proj")), r"qq_proj.*match nothing; there are .*q_proj"),
        (dict(targets="nothing"), "'nothing'.*match nothing"),
        (dict(targets=()), "match nothing"),
        (dict(layers=(3,)), r"names \[3\]; there are 0 to 2"),
        (dict(layers=()), "names no layer"),
        (dict(targets=SOME_LAYERS, layers=(0,)), "regular expression"),
        (dict(start="pissa"), r"'pissa' is not supported; supported: \[True, 'gaussian'\]"),
        (dict(rank=0), "positive integer, got 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(key, change, message):
    with pytest.raises(ValueError, match=message):
        lora.init(key, tiny.pair("llama").params, **dict(rank=4) | change)


@pytest.fixture
def folder(tmp_path):
    """A good adapter of llama on q_proj, to be spoilt."""
    s = Settings(2, 4.0, targets=("q_proj",))
    peft_adapter.save(tmp_path / "adapter", drawn(tiny.pair("llama").params, s), s)
    return tmp_path / "adapter"


def spoil_config(folder: Path, **fields):
    (folder / peft_adapter.CONFIG).write_text(json.dumps(read_config(folder) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_dora=True), dict(modules_to_save=["lm_head"]), dict(alpha_pattern={"q_proj": 2}),
        dict(rank_pattern={"q_proj": 2}), dict(bias="all"), dict(lora_bias=True), dict(r="four"),
        dict(fan_in_fan_out=True), dict(target_parameters=["w"]), dict(corda_config={"x": 1}),
        dict(eva_config={"rho": 2.0}), dict(trainable_token_indices=[1]), dict(peft_type="IA3"),
        dict(task_type="SEQ_CLS"), dict(init_lora_weights="pissa"), dict(init_lora_weights="eva"),
        dict(layer_replication=[[0, 2]]), dict(megatron_config={"x": 1}), dict(use_qalora=True),
        dict(layers_pattern="blocks"), dict(alora_invocation_tokens=[3]), dict(lora_alpha=None),
        dict(a_field_of_tomorrow="on"),
    ],
    ids=str,
)  # fmt: skip
def test_config_fields_that_cannot_be_honoured_are_refused_by_name(folder, fields):
    spoil_config(folder, **fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        peft_adapter.load(folder, tiny.pair("llama").params)


def test_every_field_that_cannot_be_honoured_stands_in_one_error(folder):
    spoil_config(folder, use_dora=True, bias="all")
    with pytest.raises(ValueError, match="use_dora=True.*bias='all'"):
        peft_adapter.load(folder, tiny.pair("llama").params)


def test_config_fields_of_every_peft_default_are_understood(folder):
    spoil_config(folder, **json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
                 | read_config(folder))  # fmt: skip
    peft_adapter.load(folder, tiny.pair("llama").params)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(target_modules=r".*\.q_proj"), "all"),
        (dict(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]), "all"),
        (dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*k_proj"), "all"),
        (dict(layers_to_transform=[0, 1, 2], layers_pattern="layers"), "all"),
        (dict(layers_to_transform=1), "too many"),
        (dict(target_modules="all-linear"), "too few"),
        (dict(target_modules=["q_proj", "v_proj"]), "too few"),
        (dict(target_modules=["embed_tokens"]), "embedding"),
        (dict(target_modules=["W_pack"]), "no module"),
    ],
    ids=str,
)
def test_the_file_must_hold_what_its_config_names(folder, fields, expected):
    spoil_config(folder, **fields)
    load = lambda: peft_adapter.load(folder, tiny.pair("llama").params)
    if expected == "all":
        adapters, read = load()
        again = names_adapted(tiny.pair("llama").params, read.targets, read.layers)
        assert again == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    else:
        words = {"too many": "unexpected.*layers.0", "too few": "missing.*layers.0"}
        with pytest.raises(ValueError, match="(?s)" + words.get(expected, expected)):
            load()


def test_missing_unexpected_misshapen_and_broken_tensors_stand_in_one_error(folder):
    path, key = (
        folder / peft_adapter.WEIGHTS,
        "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight",
    )
    values = load_file(path)
    del values[key.format(0, "A")]
    values["base_model.model.vision.lora_A.weight"] = np.zeros((2, 2), np.float32)
    values[key.format(1, "A")] = np.zeros((2, 65), np.float32)
    values[key.format(1, "B")] = values[key.format(1, "B")] * np.float32(np.nan)
    values[key.format(2, "A")] = np.zeros((2, 64), np.int32)
    save_file(values, path)
    with pytest.raises(ValueError) as caught:
        peft_adapter.load(folder, tiny.pair("llama").params)
    for words in (
        r"missing .*layers.0.*lora_A.weight \(2, 64\)", r"unexpected .*vision.lora_A",
        r"layers.1.*lora_A.* has shape \(2, 65\), rank and base say \(2, 64\)",
        "layers.1.*lora_B.*not finite", "layers.2.*lora_A.*dtype int32",
    ):  # fmt: skip
        assert re.search(words, str(caught.value)), words


def test_a_head_that_was_changed_beside_its_adapter_is_refused(tmp_path):
    pair, s = tiny.pair("llama_gelu"), LORA["llama_gelu"]
    in_peft("llama_gelu", s).save_pretrained(tmp_path)
    path, key = tmp_path / peft_adapter.WEIGHTS, "base_model.model.lm_head.base_layer.weight"
    values = load_file(path)
    assert key in values
    save_file(values | {key: values[key] + 1}, path)
    with pytest.raises(ValueError, match=f"unexpected {key}"):
        peft_adapter.load(tmp_path, pair.params)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_16_bit_adapter_files_load_as_float32(folder, dtype):
    path = folder / peft_adapter.WEIGHTS
    values = {k: v.astype(dtype) for k, v in load_file(path).items()}
    save_file(values, path)
    adapters, _ = peft_adapter.load(folder, tiny.pair("llama").params)
    a = adapters["model"]["layers"]["*"]["self_attn"]["q_proj"]["a"]
    assert a.dtype == jnp.float32
    expected = values["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(a[1], expected.astype(np.float32))


@pytest.mark.parametrize("name", [peft_adapter.WEIGHTS, peft_adapter.CONFIG])
def test_a_missing_or_truncated_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        peft_adapter.load(folder, tiny.pair("llama").params)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        peft_adapter.load(folder, tiny.pair("llama").params)


@pytest.mark.parametrize(
    ("said", "spoil", "message"),
    [
        (Settings(3, 4.0, targets=("q_proj",)), lambda x: x, r"rank \[2\].*rank 3"),
        (Settings(2, 4.0, targets=("k_proj",)), lambda x: x, "q_proj.*targets .'k_proj'"),
        (Settings(2, 4.0, targets=("q_proj",), layers=(1,)), lambda x: x, "layers.0"),
        (Settings(2, 4.0, targets=("q_proj",)), lambda x: x * np.inf, "not finite"),
    ],
    ids=["rank", "targets", "layers", "values"],
)
def test_nothing_is_written_of_adapters_that_are_not_what_is_said(tmp_path, said, spoil, message):
    adapters = drawn(tiny.pair("llama").params, Settings(2, 4.0, targets=("q_proj",)))
    with pytest.raises(ValueError, match=message):
        peft_adapter.save(tmp_path / "a", jax.tree.map(spoil, adapters), said)
    assert not list(tmp_path.iterdir())


def test_adapters_on_the_embedding_are_not_written(tmp_path):
    s = Settings(2, 4.0, targets=("embed_tokens",))
    with pytest.raises(ValueError, match="model.embed_tokens can't be written"):
        peft_adapter.save(tmp_path / "a", drawn(tiny.pair("llama").params, s), s)


def test_a_folder_that_holds_files_is_left_as_it_is(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    s = Settings(2, 4.0, targets=("q_proj",))
    with pytest.raises(FileExistsError, match="not empty"):
        peft_adapter.save(folder, drawn(tiny.pair("llama").params, s, seed=6), s)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(before) == [peft_adapter.CONFIG, peft_adapter.WEIGHTS]
