"""The models that are measured, as fields of a Hugging Face config.json."""

import json
from pathlib import Path
from typing import Any

LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": LLAMA | dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=500000.0,
        max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], hidden_act="silu",
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
        tie_word_embeddings=False, attention_bias=False, bos_token_id=1, eos_token_id=2,
    ),
    "tiny": LLAMA | dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=10000.0,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
}  # fmt: skip


def config(shape: str) -> dict[str, Any]:
    """Fields by a name in CONFIGS or from the config.json at a path.

    Raises ValueError where it is neither.
    """
    if shape in CONFIGS:
        return CONFIGS[shape]
    if not Path(shape).is_file():
        raise ValueError(f"{shape!r} is no config.json and not one of {sorted(CONFIGS)}")
    return json.loads(Path(shape).read_text())
