"""Tiny random checkpoints of every family, every tensor redrawn so that mistakes show."""

from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from bridge import hf
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import decoder

SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
PLAIN = {k: v for k, v in SMALL.items() if k != "head_dim"}
# Thetas and epsilons far from the defaults, so that a forgotten one shows.
DEFAULT = dict(rope_type="default", rope_theta=1e6)
LINEAR = dict(rope_type="linear", rope_theta=2e4, factor=2.5)
DYNAMIC = dict(rope_type="dynamic", rope_theta=2e4, factor=2.0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=8e3, factor=2.0, original_max_position_embeddings=32)
YARN_TUNED = YARN | dict(
    beta_fast=2.0, beta_slow=0.5, truncate=False, mscale=1.0, mscale_all_dim=4.0
)  # fmt: skip
LAST_TWO_WINDOWED = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
MIDDLE_WINDOWED = dict(
    use_sliding_window=True, sliding_window=8,
    layer_types=["full_attention", "sliding_attention", "full_attention"],
)  # fmt: skip
WINDOWED = dict(
    sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)
CAPS = dict(query_pre_attn_scalar=20, attn_logit_softcapping=3.0, final_logit_softcapping=40.0)
LONGROPE = dict(
    rope_type="longrope", rope_theta=2e4, partial_rotary_factor=0.75,
    short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.0], long_factor=[1.5, 2.0, 2.5, 3.0, 4.0, 6.0],
)  # fmt: skip
MAMBA = dict(
    mamba_d_ssm=128, mamba_n_heads=8, mamba_n_groups=2, mamba_d_state=24, mamba_d_conv=3,
    mamba_chunk_size=16, num_hidden_layers=2,
)  # fmt: skip
MIXED = dict(num_experts_per_tok=2)
ROUTED = MIXED | dict(
    moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, routed_scaling_factor=1.7,
)  # fmt: skip
LATENT = ROUTED | dict(
    num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=128, qk_nope_head_dim=24,
    qk_rope_head_dim=32, v_head_dim=48,
)  # fmt: skip
BIASED = dict(attention_bias=True, rms_norm_eps=0.02)
DELTA = dict(
    layer_types=[*["linear_attention"] * 2, "full_attention", "linear_attention"],
    linear_conv_kernel_dim=3, linear_key_head_dim=16, linear_value_head_dim=32,
    linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip

TINY: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", SMALL),
    "llama_tied_biased": (
        "Llama", SMALL | BIASED | dict(mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama3_rope": ("Llama", SMALL | dict(rope_parameters=LLAMA3)),
    "llama_linear": ("Llama", SMALL | dict(rope_parameters=LINEAR)),
    "llama_dynamic": ("Llama", SMALL | dict(rope_parameters=DYNAMIC)),
    "llama_gelu": ("Llama", PLAIN | dict(hidden_act="gelu_pytorch_tanh")),
    "mistral": ("Mistral", SMALL | dict(sliding_window=8, rms_norm_eps=0.02)),
    "mistral_full": ("Mistral", PLAIN | dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", PLAIN | dict(tie_word_embeddings=True, rms_norm_eps=0.02)),
    "qwen2_yarn_window": ("Qwen2", PLAIN | LAST_TWO_WINDOWED | dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", SMALL | dict(tie_word_embeddings=True, rope_parameters=DEFAULT)),
    "qwen3_biased": (
        "Qwen3", SMALL | BIASED | MIDDLE_WINDOWED | dict(rope_parameters=YARN_TUNED),
    ),
    "ministral3": (
        "Ministral3", SMALL | dict(rope_parameters=YARN | dict(llama_4_scaling_beta=0.5)),
    ),
    "gemma": ("Gemma", SMALL | dict(rms_norm_eps=0.02, attention_bias=True)),
    "gemma2": ("Gemma2", SMALL | CAPS | dict(sliding_window=8, rms_norm_eps=0.02)),
    "gemma3_text": (
        "Gemma3Text", SMALL | WINDOWED | dict(
            query_pre_attn_scalar=20, tie_word_embeddings=False,
            rope_parameters=dict(full_attention=LINEAR, sliding_attention=DEFAULT)),
    ),
    "phi3": (
        "Phi3", PLAIN | dict(original_max_position_embeddings=48, rope_parameters=LONGROPE),
    ),
    "phi3_window": ("Phi3", PLAIN | dict(sliding_window=8, tie_word_embeddings=True)),
    "granite": (
        "Granite", PLAIN | BIASED | dict(
            embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.4,
            logits_scaling=4.0, mlp_bias=True),
    ),
    "cohere": ("Cohere", PLAIN | dict(use_qk_norm=True, layer_norm_eps=0.02, attention_bias=True)),
    "cohere2": ("Cohere2", SMALL | WINDOWED | dict(layer_norm_eps=0.02)),
    "olmo2": ("Olmo2", PLAIN | dict(rms_norm_eps=0.02)),
    "smollm3": (
        "SmolLM3", PLAIN | dict(
            no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=8),
    ),
    "starcoder2": ("Starcoder2", PLAIN | dict(norm_epsilon=0.02, sliding_window=8)),
    "glm4": ("Glm4", SMALL | dict(rms_norm_eps=0.02)),
    "exaone4": ("Exaone4", SMALL | WINDOWED | dict(rms_norm_eps=0.02)),
    "qwen3_5_text": (
        "Qwen3_5Text", SMALL | DELTA | BIASED | dict(
            num_hidden_layers=4,
            rope_parameters=DEFAULT | dict(partial_rotary_factor=0.5, mrope_section=[3, 3, 2])),
    ),
    "falcon_h1": (
        "FalconH1", SMALL | MAMBA | BIASED | dict(
            mlp_bias=True, mamba_proj_bias=True, projectors_bias=True, mamba_rms_norm=True,
            embedding_multiplier=0.6, lm_head_multiplier=0.5, key_multiplier=0.7,
            attention_in_multiplier=1.3, attention_out_multiplier=0.8, ssm_in_multiplier=0.9,
            ssm_out_multiplier=1.2, mlp_multipliers=[1.4, 0.7],
            ssm_multipliers=[1.3, 0.8, 0.7, 1.2, 0.6]),
    ),
    "falcon_h1_plain": (
        "FalconH1", PLAIN | MAMBA | dict(mamba_conv_bias=False, tie_word_embeddings=True),
    ),
    "mixtral": (
        "Mixtral", PLAIN | MIXED | dict(num_local_experts=4, sliding_window=8, rms_norm_eps=0.02),
    ),
    "qwen3_moe": (
        "Qwen3Moe", SMALL | MIXED | BIASED | dict(
            num_experts=6, moe_intermediate_size=32, norm_topk_prob=True, mlp_only_layers=[1]),
    ),
    "qwen3_moe_unnormed": (
        "Qwen3Moe", SMALL | MIXED | dict(
            num_experts=4, moe_intermediate_size=32, tie_word_embeddings=True,
            use_sliding_window=True, sliding_window=8),
    ),
    "glm4_moe": (
        # A dict of its own: transformers writes into it.
        "Glm4Moe", SMALL | ROUTED | BIASED | dict(use_qk_norm=True, rope_parameters=dict(DEFAULT)),
    ),
    "glm4_moe_unnormed": (
        "Glm4Moe", PLAIN | ROUTED | dict(norm_topk_prob=False, partial_rotary_factor=0.25),
    ),
    "deepseek_v3": (
        "DeepseekV3", PLAIN | LATENT | BIASED | dict(rope_parameters=YARN_TUNED),
    ),
    "deepseek_v3_whole_queries": (
        "DeepseekV3", PLAIN | LATENT | dict(
            q_lora_rank=None, rope_interleave=False, norm_topk_prob=False, v_head_dim=64),
    ),
    "qwen3_next": (
        "Qwen3Next", SMALL | MIXED | DELTA | BIASED | dict(
            layer_types=["linear_attention", "linear_attention", "full_attention"], num_experts=6,
            moe_intermediate_size=32, mlp_only_layers=[1], shared_expert_intermediate_size=64,
            rope_parameters=DEFAULT | dict(partial_rotary_factor=0.5)),
    ),
    "gpt_oss": (
        "GptOss", SMALL | MIXED | WINDOWED | dict(
            num_local_experts=4, intermediate_size=48, swiglu_limit=1.0, swiglu_alpha=1.2,
            rms_norm_eps=0.02, rope_parameters=YARN | dict(truncate=False, beta_fast=2.0)),
    ),
    "llama4_text": (
        "Llama4Text", SMALL | MIXED | dict(
            num_local_experts=4, moe_layers=[0, 2], intermediate_size_mlp=192, rms_norm_eps=0.02,
            no_rope_layers=[1, 0, 1], attention_chunk_size=8, floor_scale=8, attn_scale=0.5),
    ),
    "llama4_text_unnormed": (
        "Llama4Text", SMALL | dict(
            num_local_experts=3, interleave_moe_layer_step=2, use_qk_norm=False,
            attention_bias=True, attn_temperature_tuning=False, tie_word_embeddings=True,
            no_rope_layers=[1, 1, 0], attention_chunk_size=20, rope_parameters=LLAMA3,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"]),
    ),
}  # fmt: skip

# One entry of each family, by its model_type.
EACH = {
    "llama": "llama", "ministral3": "ministral3", "mistral": "mistral", "qwen2": "qwen2",
    "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3_text",
    "phi3": "phi3", "granite": "granite", "cohere": "cohere", "cohere2": "cohere2",
    "olmo2": "olmo2", "smollm3": "smollm3", "starcoder2": "starcoder2", "glm4": "glm4",
    "exaone4": "exaone4", "qwen3_5_text": "qwen3_5_text", "falcon_h1": "falcon_h1",
    "mixtral": "mixtral", "qwen3_moe": "qwen3_moe", "glm4_moe": "glm4_moe",
    "deepseek_v3": "deepseek_v3", "llama4_text": "llama4_text", "gpt_oss": "gpt_oss",
    "qwen3_next": "qwen3_next",
}  # fmt: skip
# Entries whose parts others have too: all their tests but the logits' go to `make test-full`.
LESSER = (
    "ministral3", "gemma", "phi3_window", "granite", "cohere", "olmo2", "smollm3", "exaone4",
    "glm4_moe", "glm4_moe_unnormed", "deepseek_v3_whole_queries",
    "falcon_h1_plain",
    "llama4_text_unnormed", "qwen3_next", "deepseek_v3", "llama4_text", "gpt_oss",
)  # fmt: skip


def entries(names) -> list:
    """Entries as parameters of a test, LESSER ones marked slow."""
    slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
    return [slow(name) if name in LESSER else name for name in names]


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Matrices N(0, 1.5/sqrt(fan in)), embeddings N(0, 1), norms U(0.5, 1.5), biases N(0, 0.5).

    Sinks N(1, 1).
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                value = rng.normal(0, 0.5, p.shape)
            elif name.endswith("sinks"):
                value = rng.normal(1, 1, p.shape)
            elif name.endswith("A_log"):
                # States that fade within some tens of tokens, as trained ones do.
                value = rng.uniform(-3, 0, p.shape)
            elif "conv1d" in name:
                value = rng.normal(0, 1.5 / np.sqrt(p.shape[-1]), p.shape)
            elif ".mlp.gate.weight" in name or ".router." in name:
                # Wide apart, so that rounding never changes a choice.
                value = rng.normal(0, 6 / np.sqrt(p.shape[1]), p.shape)
            elif p.ndim == 3:
                value = rng.normal(0, 1.5 / np.sqrt(p.shape[2]), p.shape)
            elif p.ndim == 1 or "norm" in name:
                value = rng.uniform(0.5, 1.5, p.shape)
                if model.config.model_type == "qwen3_next" and "linear_attn" not in name:
                    # These store how far factors are from 1; routers widen what twice as much errs.
                    value -= 1
            elif "embed_tokens" in name:
                value = rng.normal(0, 1, p.shape)
            else:
                value = rng.normal(0, 1.5 / np.sqrt(p.shape[1]), p.shape)
            p.copy_(torch.tensor(value.astype(np.float32)))
        for name, p in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                p.copy_(torch.tensor(rng.normal(0, 0.5, p.shape).astype(np.float32)))
    return model


# Of eight draws of qwen3_next's, two put packed rows 1.1e-5 and 1.3e-5 of the logits' spread apart,
# by one token whose router magnifies rounding; the others at most 6.3e-6.
DRAWS = {"qwen3_next": 2}


def reference(name: str, **changes) -> torch.nn.Module:
    """transformers' model of one entry, float32, eager attention, redrawn."""
    family, fields = TINY[name]
    config = getattr(transformers, f"{family}Config")(**(fields | changes))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    return redraw(model(config).float().eval(), DRAWS.get(name, 0))


def save(model: torch.nn.Module, folder: Path, **options) -> Path:
    """The model as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    return folder


class Pair(NamedTuple):
    """transformers' model and ours of the same weights; `params` are float32."""

    model: torch.nn.Module
    family: ModuleType
    config: Any
    params: dict


def ours(model: torch.nn.Module) -> tuple[ModuleType, Any, dict]:
    """(family, config, parameters) of transformers' model, read from what it saves."""
    with TemporaryDirectory() as folder:
        return hf.load(SafetensorsSource(save(model, Path(folder))))


@cache
def pair(name: str) -> Pair:
    """One entry of TINY in both programs, made once a session: don't change it."""
    model = reference(name)
    return Pair(model, *ours(model))


shared_jit = partial(jax.jit, static_argnums=(0, 1))


@shared_jit
def logits(family, c, params, tokens, positions, segments):
    """float32 [B, T, V]; compiled once for each config and shape, whichever test asks."""
    hidden = decoder.forward(family, c, params, tokens, positions, segments)
    return decoder.logits(family, c, params, hidden)


def padded(rows: list, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens, positions, segments) int32 [B, length], one document a row, padding at the end."""
    tokens = jnp.asarray([[*row, *[0] * (length - len(row))] for row in rows], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    return tokens, positions, (positions < jnp.asarray([[len(r)] for r in rows])).astype(jnp.int32)


def draw(seed: int, length: int, vocab: int = 256) -> list[int]:
    """Random token ids without the special ones."""
    return np.random.default_rng(seed).integers(3, vocab, length).tolist()
