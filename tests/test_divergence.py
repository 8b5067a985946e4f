"""KL(trained || written): about zero where nothing was lost, large where the adapter was."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import torch
from safetensors.numpy import load_file, save_file

from bridge import merge
from bridge.gguf_source import GGUFSource
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import tree
from workflows import divergence, keywords, saving


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights in float32, so that only what is asked for is rounded."""
    folder = tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")
    weights = load_file(folder / "model.safetensors")
    floats = {name: w.astype(np.float32) for name, w in weights.items()}
    save_file(floats, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (folder / "config.json").write_text(json.dumps(config | {key: "float32"}))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return tiny_chat.adapted(folder)


@pytest.fixture(scope="module")
def reference(model):
    return divergence.trained(model)


@pytest.fixture(scope="module")
def ggufs(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("ggufs") / "g"
    return out, model.save_pretrained_gguf(out, quantization_method=["f32", "q8_0", "q4_k_m"])


def test_an_export_in_float32_is_the_trained_model(ggufs):
    facts = ggufs[1]["quantization"]
    assert abs(facts["model.F32.gguf"]["kl_trained_to_written"]) < 1e-7
    assert facts["model.F32.gguf"]["likeliest_token_equal"] == 1
    kls = [facts[f"model.{fmt}.gguf"]["kl_trained_to_written"] for fmt in ("Q8_0", "Q4_K_M")]
    assert 1e-6 < kls[0] < 1e-2 < kls[1] < divergence.FAR
    assert json.loads((ggufs[0] / "manifest.json").read_text()) == ggufs[1]


def test_a_file_without_the_adapter_is_far_from_the_trained_model(folder, reference):
    found = divergence.measured(reference, SafetensorsSource(folder), jnp.float32)
    assert found.kl > 0.05 and found.same_token < 0.9


def test_the_figures_equal_torchs_on_transformers_models(folder, model, reference):
    found = divergence.measured(reference, SafetensorsSource(folder), jnp.float32)
    with torch.no_grad():
        base = tiny_chat.reference(folder)(torch.tensor(reference.tokens).long()).logits
    trained = torch.tensor(model(reference.tokens))
    logs = [torch.log_softmax(x.double(), -1) for x in (base, trained)]
    kl = torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.same_token == (base.argmax(-1) == trained.argmax(-1)).float().mean().item()


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_layers_run_one_by_one_give_the_whole_models_scores(tmp_path, family):
    base = tiny_chat.save(tmp_path / "base", family)
    model, _ = tiny_chat.load(base)
    tokens = np.random.default_rng(0).integers(3, tiny_chat.VOCAB, (2, 16))
    got = divergence.logits(SafetensorsSource(base), jnp.float32, tokens)
    assert np.abs(got - model(tokens)).max() < 1e-5 * got.std()


def test_a_model_without_adapters_is_not_compared(folder, tmp_path):
    plain, _ = tiny_chat.load(folder)
    manifest = plain.save_pretrained_merged(tmp_path / "m")
    assert "kl_trained_to_written" not in manifest


@pytest.fixture(scope="module")
def coarse(folder):
    """A 4-bit model whose rounding error is fifty times its adapters' delta."""
    model = tiny_chat.adapted(folder, load_in_4bit=True)
    ratio = np.median(list(ratios(model).values()))
    flat = tree.flatten(model.adapters)
    shrink = lambda path, x: x * ratio / 50 if path.endswith(".b") else x
    model.adapters = tree.unflatten({path: shrink(path, x) for path, x in flat.items()})
    return model


def ratios(m):
    return merge.distances(m.family, m.config, m.params, m.adapters, m.scale, m.source)


def test_a_rounding_error_of_fifty_deltas_shows_in_one_base_only(coarse, tmp_path):
    original = coarse.save_pretrained_merged(tmp_path / "o")
    rounded = coarse.save_pretrained_merged(tmp_path / "d", base="dequant4")
    assert original["base_error_over_delta"]["median"] == pytest.approx(50, rel=0.01)
    kl = [m["kl_trained_to_written"] for m in (original, rounded)]
    assert kl[0] > 50 * kl[1] and kl[1] < 1e-3
    assert rounded["likeliest_token_equal"] > original["likeliest_token_equal"]
    files = saving.gguf(coarse, tmp_path / "g", None, ["f32"], "dequant4", False)
    assert files["quantization"]["model.F32.gguf"]["kl_trained_to_written"] < 1e-6


def test_a_far_export_is_warned_of_with_the_other_base(coarse, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keywords, "_said", set())
    monkeypatch.setattr(divergence, "FAR", 1e-3)
    coarse.save_pretrained_merged(tmp_path / "o")
    told = capsys.readouterr().out
    assert told.count("WARNING: the merged weights") == 1 and "base='dequant4' merges" in told
    coarse.save_pretrained_merged(tmp_path / "d", base="dequant4")
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_scores_that_are_no_numbers_are_refused_and_nothing_is_left(folder, tmp_path):
    model = tiny_chat.adapted(folder)
    flat = tree.flatten(model.adapters)
    # Each weight stays finite, what they make of any token does not.
    huge = {p: x * 1e38 if p.endswith(".b") else x for p, x in flat.items()}
    model.adapters = tree.unflatten(huge)
    with pytest.raises(ValueError, match=r"KL\(trained \|\| written\) is nan, not finite"):
        model.save_pretrained_merged(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_file_that_only_llama_cpp_understands_is_verified_without_a_kl(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=100, rope_theta=1e4)
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    model = tiny_chat.adapted(base)
    manifest = model.save_pretrained_gguf(tmp_path / "g", quantization_method="q8_0")
    facts = manifest["quantization"]["model.Q8_0.gguf"]
    assert "rope" in facts["kl_not_measured"] and facts["rounding"]["Q8_0"]["error"] < 0.008
    with pytest.raises(ValueError, match="rope"):
        GGUFSource(tmp_path / "g" / "model.Q8_0.gguf")


def test_the_tokens_are_fixed_and_varied(model):
    first, second = divergence.trained(model), divergence.trained(model)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.tokens.shape == (4, divergence.LENGTH) and len(np.unique(first.tokens)) > 30


def test_tokens_that_have_no_embedding_are_left_out(tmp_path):
    model = tiny_chat.adapted(tiny_chat.save(tmp_path, vocab_size=300))
    assert divergence.trained(model).tokens.max() < 300


def test_the_head_in_parts_gives_the_whole_heads_scores(folder, monkeypatch):
    source, tokens = SafetensorsSource(folder), np.arange(12).reshape(2, 6)
    whole = divergence.logits(source, jnp.float32, tokens)
    monkeypatch.setattr(divergence, "ROWS", 100)
    np.testing.assert_allclose(divergence.logits(source, jnp.float32, tokens), whole, atol=1e-5)
