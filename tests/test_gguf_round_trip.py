"""HF -> GGUF -> ours: what a file of each family is read back as."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat

from bridge import gguf_file, hf
from bridge.gguf_source import GGUFSource
from bridge.safetensors_file import SafetensorsSource, Weight
from tests.oracles import gguf_answers as base
from tests.oracles import gguf_families as made
from tests.test_gguf_families import written
from unsloth_jax import FastLanguageModel
from unsloth_jax.models import FAMILIES, deepseek_v3, falcon_h1, family, glm4_moe
from workflows import divergence

READERS = {name for name, module in FAMILIES.items() if hasattr(module, "from_gguf")}
NAMES = [
    name
    for name, config in made.CONFIGS.items()
    if name not in made.QUANTIZED and config["model_type"] in READERS
]
FAST = ("gemma2", "phi3_long", "cohere2", "ministral3", "glm4", "granite_biases", "qwen3_moe")
CUT = ("qwen3_next", "deepseek_v3")  # a weight of theirs is two tensors of other rows
MIXED = ("mixtral", "glm4_moe", "llama4", "qwen3_5", "falcon_h1", "gpt_oss", *CUT)
# The only list of what a file's keys don't say. llama.cpp has no windows there; images' sections
# are written where the config has none; factors are in the weights, so that a file's model has 1.
LOST = {
    "mixtral": ("windows",),
    "qwen3_moe": ("windows",),
    "starcoder2": ("windows",),
    "qwen3_5_tied": ("sections",),
    "falcon_h1": (*falcon_h1.SCALES, *sum(falcon_h1.LISTS.values(), ())),
}


def numbers(value):
    """A config's fields with every float as float32, which is what GGUF holds."""
    if dataclasses.is_dataclass(value):
        return {f.name: numbers(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple(map(numbers, value))
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_file_is_read_back_as_what_it_was_written_from(name, tmp_path):
    config = made.CONFIGS[name]
    written(tmp_path, config)
    source = GGUFSource(tmp_path / "model.gguf")
    module, c = hf.described(source)
    # Mistral's and Llama's files name one architecture; only a window tells them apart.
    windowless = name == "mistral_pieces"
    assert module is family("llama" if windowless else config["model_type"])
    own = family(config["model_type"]).config(config)
    lost = LOST.get(name, LOST.get(config["model_type"], ()))
    found, want = numbers(c), numbers(own)
    differ = {k: (found[k], want[k]) for k in want if found[k] != want[k] and k not in lost}
    assert not differ
    weights = made.weights(config)
    assert set(source.headers()) == set(weights)
    for path, w in weights.items():
        found = source.read(path)
        assert source.headers()[path].shape == found.shape == w.shape
        if path.endswith("A_log"):  # several have the same exponential in float32
            assert np.abs(found - w).max() < 1e-7
            found, w = (np.float32(np.exp(np.float64(x))) for x in (found, w))
        assert np.array_equal(found, kept(config, own, path, w)), path


def halves(value):
    """Powers of two instead of other factors."""
    return [*map(halves, value)] if isinstance(value, list) else 2.0 if value > 1 else 0.5


def kept(config, c, path, w):
    """A weight as a file of its family's has it: norms above 1, or with Falcon-H1's factors."""
    if config["model_type"] == "falcon_h1" and not path.endswith("A_log"):
        return falcon_h1.to_gguf(c, path, w).reshape(w.shape)
    whole = not path.endswith("norm.weight") or path.endswith("linear_attn.norm.weight")
    if whole or not config["model_type"].startswith(("gemma", "qwen3_5", "qwen3_next")):
        return w
    return w + np.float32(1) - np.float32(1)


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in (*FAST, *MIXED))]
)
def test_the_file_gives_the_checkpoints_scores(name, tmp_path):
    config = made.CONFIGS[name]
    if name == "falcon_h1":  # factors that no product is rounded by
        config = config | {k: halves(v) for k, v in config.items() if "multiplier" in k}
    written(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    base.save_file(made.weights(config), tmp_path / "model.safetensors", {"format": "pt"})
    tokens = np.random.default_rng(0).integers(3, 480, (2, 48)).astype(np.int32)
    sources = SafetensorsSource(tmp_path), GGUFSource(tmp_path / "model.gguf")
    want, found = (divergence.logits(one, jnp.float32, tokens) for one in sources)
    assert np.abs(found - want).max() <= 1e-5 * want.std()


def test_another_way_to_weigh_experts_is_refused():
    with pytest.raises(ValueError, match="expert_gating_func is 1; only 2 is supported"):
        glm4_moe.from_gguf({"expert_gating_func": 1}, set(), {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qwen3_moe", *MIXED[1:], "deepseek_v3_lite", "gpt_oss_default_rope"]
)
def test_a_file_written_again_from_what_was_read_has_the_same_bytes(name, tmp_path):
    written(tmp_path, made.CONFIGS[name])
    source, again = GGUFSource(tmp_path / "model.gguf"), tmp_path / "again.gguf"
    weights = [
        Weight(n, h.shape, np.dtype(np.float32), lambda n=n: source.read(n))
        for n, h in source.headers().items()
    ]
    folder = tmp_path / "tokenizer"
    gguf_file.save(again, source.config, weights, folder, "f32", name=base.NAME)
    assert again.read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ("qwen3_moe", *MIXED) if n not in CUT])
def test_an_exports_kl_is_measured_and_its_file_loads_as_the_trained_model(name, tmp_path):
    model = tiny_chat.adapted(made.folder(name, tmp_path / "base"))
    manifest = model.save_pretrained_gguf(
        tmp_path / "g", quantization_method=["f32", "q8_0"], run_in_llama_cpp=False
    )
    kls = [facts["kl_trained_to_written"] for facts in manifest["quantization"].values()]
    assert abs(kls[0]) < 1e-7 and 1e-5 < kls[1] < 5e-2  # rounding sends tokens to other experts
    again, _ = tiny_chat.load(tmp_path / "g" / "model.F32.gguf")
    tokens = divergence.trained(model).tokens
    want, found = model(tokens), again(tokens)
    assert np.abs(found - want).max() <= 1e-4 * want.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_a_cut_weights_file_loads_as_the_trained_model(name, tmp_path):
    model, _ = tiny_chat.load(made.folder(name, tmp_path / "base"))
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["o_proj", "lm_head"])
    rng = np.random.default_rng(0)
    drawn = lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32)
    model.adapters = jax.tree.map(drawn, model.adapters)
    manifest = model.save_pretrained_gguf(
        tmp_path / "g", quantization_method=["f32", "q8_0"], run_in_llama_cpp=False
    )
    facts = manifest["quantization"]
    assert abs(facts["model.F32.gguf"]["kl_trained_to_written"]) < 1e-7
    assert facts["model.Q8_0.gguf"]["kl_trained_to_written"] > 1e-5
    again, _ = tiny_chat.load(tmp_path / "g" / "model.F32.gguf")
    tokens = divergence.trained(model).tokens
    want, found = model(tokens), again(tokens)
    # Adapters beside their weights and added to them: apart by a hybrid's rounding.
    assert np.abs(found - want).max() <= 3e-4 * want.std()
    eighth = GGUFSource(tmp_path / "g" / "model.Q8_0.gguf").headers()
    shapes = {n: w.shape for n, w in made.weights(made.CONFIGS[name]).items()}
    assert {n: tuple(h.shape) for n, h in eighth.items()} == shapes


YARNS = (
    {},
    dict(mscale=0.707, mscale_all_dim=0.707),
    dict(mscale=2.0, mscale_all_dim=0.8),
    dict(attention_factor=1.3, mscale_all_dim=1.0),
)


@pytest.mark.parametrize("scales", YARNS)
def test_yarn_of_latent_attention_is_read_back_from_its_two_keys(scales, tmp_path):
    config = made.CONFIGS["deepseek_v3"]
    config = config | dict(rope_parameters=made.rope(1e4, **made.BARE_YARN, **scales))
    written(tmp_path, config)
    _, found = hf.described(GGUFSource(tmp_path / "model.gguf"))
    want = family("deepseek_v3").config(config)
    assert found.score_scale == pytest.approx(want.score_scale, rel=1e-6)
    assert found.rope.attention_factor == pytest.approx(want.rope.attention_factor, rel=1e-6)
    same = lambda c: dataclasses.replace(c.rope, attention_factor=1.0)
    assert same(found) == same(want)


def test_deepseek_v2s_files_are_refused():
    with pytest.raises(ValueError, match="expert_gating_func is 1; only 2 is supported"):
        deepseek_v3.from_gguf(dict.fromkeys(deepseek_v3.GGUF_READS, 1), set(), {})


def test_every_family_that_reads_files_is_read_here():
    elsewhere = {"llama", "mistral", "qwen2", "qwen3"}  # test_gguf_source.py
    assert {made.CONFIGS[name]["model_type"] for name in NAMES} | elsewhere == READERS
