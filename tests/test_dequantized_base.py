"""base="dequant4" and "dequant8": what is written is what was trained, adapted or not."""

import json

import jax
import numpy as np
import pytest
import tiny
import tiny_chat
import torch

from bridge import merge, safetensors_file
from unsloth_jax import FastLanguageModel
from workflows import saving

SIZES = dict(vocab_size=tiny_chat.VOCAB)
MODELS = {
    "qwen3": ("Qwen3", SIZES),
    # A layer of each kind: dense, and of experts in whole blocks of 4 bits.
    "qwen3_moe": ("Qwen3Moe", tiny.TINY["qwen3_moe"][1] | SIZES | dict(moe_intermediate_size=64)),
    "falcon_h1": ("FalconH1", tiny.TINY["falcon_h1"][1] | SIZES),
}


def trained(folder, name, bits, size):
    """A quantized model whose queries alone have adapters, their B of that `size`."""
    kind, fields = MODELS[name]
    tiny_chat.save(folder, kind, **fields)
    model, _ = tiny_chat.load(folder, load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj"])
    drawn = lambda x: size * jax.random.normal(jax.random.key(x.size), x.shape)
    model.adapters = jax.tree.map(drawn, model.adapters) if size else model.adapters
    return model


def written(model, folder, base):
    """transformers' model of the merged weights, kept in float32."""
    m = model
    found = merge.merged(
        m.family, m.config, m.params, m.adapters, m.scale, m.source, "float32", base, m.initial
    )
    folder.mkdir()
    safetensors_file.save(folder, found.weights, "5GB")
    (folder / "config.json").write_text(json.dumps(saving.hf_config(model, "float32")))
    return tiny_chat.reference(folder)


CASES = [("qwen3", 8, 0.1), *((name, 4, size) for name in MODELS for size in (0.0, 0.1))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits", "size"), CASES)
def test_transformers_runs_the_written_weights_as_we_run_those_trained_on(
    name, bits, size, tmp_path
):
    model = trained(tmp_path / "base", name, bits, size)
    ids = np.asarray([tiny.draw(0, 24)])
    theirs = written(model, tmp_path / "merged", f"dequant{bits}")
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
        original = tiny_chat.reference(tmp_path / "base")(torch.tensor(ids)).logits.numpy()
    assert np.abs(model(ids) - expected).max() <= 1e-4 * expected.std()
    assert np.abs(original - expected).max() > 0.01 * expected.std()


@pytest.mark.slow
def test_exports_into_the_dequantized_weights_are_the_trained_model(tmp_path):
    model = trained(tmp_path / "base", "qwen3", 4, 0.1)
    merged = model.save_pretrained_merged(tmp_path / "merged", base="dequant4")
    # Layers' seven matrices, of which the queries' are adapted too.
    assert (merged["dequantized"], merged["adapted"]) == (7 * tiny_chat.LAYERS, tiny_chat.LAYERS)
    assert merged["kl_trained_to_written"] < 1e-3
    how = dict(base="dequant4", quantization_method="f32", run_in_llama_cpp=False)
    gguf = model.save_pretrained_gguf(tmp_path / "gguf", **how)
    assert abs(gguf["quantization"]["model.F32.gguf"]["kl_trained_to_written"]) < 1e-6
    original = model.save_pretrained_merged(tmp_path / "original")
    assert "dequantized" not in original and original["kl_trained_to_written"] > 1e-3
