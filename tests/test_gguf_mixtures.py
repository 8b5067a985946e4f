"""GGUF files of Qwen3-Next, gpt-oss and DeepSeek-V3 beyond what their converter is asked for."""

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_chat

from bridge import gguf_file
from bridge.safetensors_file import Weight
from tests.oracles import gguf_answers as base
from tests.oracles import gguf_families as made
from tests.test_gguf_families import TOLERANCE, differences, model_of, written
from tests.test_gguf_file import speaking
from tests.test_mxfp4 import SIZES, packed
from unsloth_jax import FastLanguageModel

OTHERWISE = {
    "weights of another sum": (
        "qwen3_next",
        dict(norm_topk_prob=False),
        "norm_topk_prob False where .* True",
    ),
    "a layer without experts": (
        "qwen3_next",
        dict(mlp_only_layers=[1]),
        r"mixtures of experts \(True, False, True, True, True\) where",
    ),
    "delta nets elsewhere": (
        "qwen3_next",
        dict(layer_types=[*made.ALTERNATING[:4], "full_attention"]),
        r"delta nets in layers \(True, False, True, False, False\)",
    ),
    "delta nets' other values": (
        "qwen3_next",
        dict(linear_value_head_dim=16),
        "linear_value_head_dim 16 where .* 32",
    ),
    "biases beside delta nets": (
        "qwen3_next",
        dict(attention_bias=True),
        "no place for 8 biases: blk.1.attn_k.bias",
    ),
    "no biases of attention": (
        "gpt_oss",
        dict(attention_bias=False),
        "attention_bias False where .* True",
    ),
    "another clamp": ("gpt_oss", dict(swiglu_limit=5.0), "swiglu_limit 5.0 where .* 7.0"),
    "another gate": ("gpt_oss", dict(swiglu_alpha=1.0), "swiglu_alpha 1.0 where .* 1.702"),
    "a tied head": ("gpt_oss", dict(tie_word_embeddings=True), "tie_word_embeddings True"),
    "windows elsewhere": (
        "gpt_oss",
        dict(layer_types=["full_attention", "sliding_attention"] * 2),
        r"sliding windows \(None, 32, None, 32\) where .* \(32, None",
    ),
    "yarn's other ramp": (
        "gpt_oss",
        dict(rope_parameters=made.rope(15e4, **made.BARE_YARN, beta_fast=16.0)),
        "yarn with other beta_fast",
    ),
    "halves that turn": ("deepseek_v3", dict(rope_interleave=False), "rope_interleave False"),
    "queries without a vector": (
        "deepseek_v3",
        dict(q_lora_rank=None),
        "3 layers and q_lora_rank null True where .* False",
    ),
    "queries with a vector": (
        "deepseek_v3_lite",
        dict(q_lora_rank=16),
        "27 layers and q_lora_rank null False where .* True",
    ),
    "all groups": ("deepseek_v3", dict(topk_group=3), "groups left out False"),
    "biases of latents": (
        "deepseek_v3",
        dict(attention_bias=True),
        "no place for 9 biases: blk.0.attn_kv_a_mqa.bias",
    ),
    "llama3": (
        "deepseek_v3",
        dict(rope_parameters=made.base.LLAMA3),
        "rope type 'llama3', which llama.cpp has for none but",
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(case, tmp_path):
    name, changes, message = OTHERWISE[case]
    with pytest.raises(ValueError, match=message):
        written(tmp_path, made.CONFIGS[name] | changes)
    assert not (tmp_path / "model.gguf").exists()


YARN = made.rope(1e4, **made.BARE_YARN)
COMPUTED = {
    "yarn without mscale": ("deepseek_v3", dict(rope_parameters=YARN)),
    "yarn that scales scores alone": (
        "deepseek_v3",
        dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    ),
    "yarn that scales twice": (
        "deepseek_v3",
        dict(rope_parameters=YARN | dict(mscale=2.0, mscale_all_dim=0.8)),
    ),
    "yarn with an attention factor": (
        "deepseek_v3",
        dict(rope_parameters=YARN | dict(attention_factor=1.3, mscale_all_dim=1.0)),
    ),
    "a config that names no way to score": ("deepseek_v3", dict(scoring_func=None)),
    "another epsilon": ("deepseek_v3", dict(rms_norm_eps=1e-5)),
    "an attention factor": (
        "gpt_oss",
        dict(rope_parameters=made.CONFIGS["gpt_oss"]["rope_parameters"] | {"attention_factor": 2}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPUTED)
def test_llama_cpp_computes_what_the_converter_has_no_keys_for(case, tmp_path):
    name, changes = COMPUTED[case]
    config = made.CONFIGS[name] | changes
    written(tmp_path, config)
    server = speaking(tmp_path / "model.gguf")
    found = differences(model_of(tmp_path, config), server, (1, 17, 120))
    assert max(found.values()) < TOLERANCE, found


def test_norms_of_latent_vectors_with_another_epsilon_are_told(tmp_path):
    config = made.CONFIGS["deepseek_v3"]
    assert not written(tmp_path / "usual", config).notes
    (note,) = written(tmp_path, config | dict(rms_norm_eps=1e-5)).notes
    assert "rms_norm_eps=1e-05" in note and "with 1e-06" in note


def test_a_ramp_between_broken_dimensions_is_told_as_far_as_llama_cpp_rounds_it(tmp_path):
    config = made.CONFIGS["gpt_oss"]
    # As openai/gpt-oss-20b has it.
    real = made.rope(
        15e4, **made.BARE_YARN | dict(factor=32.0, original_max_position_embeddings=4096)
    )
    config = config | dict(head_dim=64, rope_parameters=real | dict(truncate=False))
    (note,) = written(tmp_path, config).notes
    assert "truncate=False" in note and "up to 2.2e-04 radians a token" in note


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_next", "deepseek_v3"])
def test_weights_in_bfloat16_make_the_file_of_their_values(name, tmp_path):
    config, files = made.CONFIGS[name], []
    folder = made.tokenizer(config, tmp_path / "tokenizer")
    narrow = {n: w.astype(ml_dtypes.bfloat16) for n, w in made.weights(config).items()}
    for dtype in (ml_dtypes.bfloat16, np.float32):
        weights = [
            Weight(n, w.shape, np.dtype(dtype), lambda w=w, t=dtype: w.astype(t))
            for n, w in narrow.items()
        ]
        files.append(tmp_path / f"{np.dtype(dtype).name}.gguf")
        gguf_file.save(files[-1], config, weights, folder, "f32", name=base.NAME)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_adapters_of_a_checkpoint_in_mxfp4_end_in_a_file_that_llama_cpp_agrees_with(tmp_path):
    sizes = tiny.TINY["gpt_oss"][1] | SIZES | dict(vocab_size=tiny_chat.VOCAB)
    sizes |= dict(swiglu_alpha=1.702, swiglu_limit=7.0, sliding_window=64, rope_parameters=YARN)
    folder = packed(tiny_chat.save(tmp_path / "base", "GptOss", **sizes))
    model, tokenizer = tiny_chat.load(folder, max_seq_length=32)
    FastLanguageModel.get_peft_model(
        model, r=2, target_modules=["q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    fill = lambda x: jax.random.normal(jax.random.key(1), x.shape) / 10
    model.adapters = jax.tree.map(fill, model.adapters)
    facts = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method="f32")
    found = facts["quantization"]["model.F32.gguf"]
    assert facts["base_blocks"] == ["MXFP4"]
    # It refuses a file whose tokens lie too far below the merged model's likeliest.
    assert found["llama_cpp"]["equal"] > 240
