"""Tiny random checkpoints of every family, every tensor redrawn so that mistakes show."""

from pathlib import Path

import numpy as np
import torch
import transformers

SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
PLAIN = {k: v for k, v in SMALL.items() if k != "head_dim"}
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.5)
TINY: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", SMALL),
    "llama_tied_biased": ("Llama", SMALL | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama3_rope": ("Llama", SMALL | dict(rope_parameters=LLAMA3)),
    "llama_linear": ("Llama", SMALL | dict(rope_parameters=LINEAR)),
    "llama_dynamic": ("Llama", SMALL | dict(rope_parameters=DYNAMIC)),
    "llama_gelu": ("Llama", PLAIN | dict(hidden_act="gelu_pytorch_tanh")),
    "mistral": ("Mistral", SMALL | dict(sliding_window=8)),
    "mistral_full": ("Mistral", PLAIN | dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", PLAIN | dict(tie_word_embeddings=True)),
    "qwen2_yarn_window": (
        "Qwen2",
        PLAIN | dict(rope_parameters=YARN, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", SMALL | dict(tie_word_embeddings=True)),
    "qwen3_biased": (
        "Qwen3",
        SMALL | dict(attention_bias=True, rope_parameters=YARN, use_sliding_window=True, sliding_window=8,
                     layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
}  # fmt: skip


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Matrices N(0, 1.5/sqrt(fan in)), embeddings N(0, 1), norms U(0.5, 1.5), biases N(0, 0.5)."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                value = rng.normal(0, 0.5, p.shape) if name.endswith("bias") else rng.uniform(0.5, 1.5, p.shape)
            elif "embed_tokens" in name:
                value = rng.normal(0, 1, p.shape)
            else:
                value = rng.normal(0, 1.5 / np.sqrt(p.shape[1]), p.shape)
            p.copy_(torch.tensor(value.astype(np.float32)))
    return model


def reference(name: str, **changes) -> torch.nn.Module:
    """transformers' model of one entry, float32, eager attention, redrawn."""
    family, fields = TINY[name]
    config = getattr(transformers, f"{family}Config")(**(fields | changes))
    config._attn_implementation = "eager"
    return redraw(getattr(transformers, f"{family}ForCausalLM")(config).float().eval())


def save(model: torch.nn.Module, folder: Path, **options) -> Path:
    """The model as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    return folder
