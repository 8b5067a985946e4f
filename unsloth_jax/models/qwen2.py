"""Qwen2 and Qwen2.5: Llama's layer with biases on q, k and v (arXiv:2407.10671)."""

from collections.abc import Mapping
from typing import Any

from unsloth_jax.models import fields
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import block as block
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.llama import weights as weights

GGUF_ARCH = "qwen2"
GGUF_READS = ("attention.sliding_window",)
DEFAULTS = dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096)
OWN = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    fields.check(hf, own=OWN)
    if hf.get("head_dim") not in (None, hf["hidden_size"] // hf["num_attention_heads"]):
        raise ValueError(f"qwen2 has no head_dim of its own, got head_dim={hf['head_dim']}")
    common = fields.sizes(hf)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        windows=fields.windows(hf, common["layers"]),
    )


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    window = values.get("attention.sliding_window")
    if window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
