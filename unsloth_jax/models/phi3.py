"""Phi-3, 3.5 and 4: Llama's layer with joined projections, LongRoPE (arXiv:2404.14219)."""

from collections.abc import Mapping
from typing import Any

from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import block as block
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "phi3"
GGUF_READS = ("attention.sliding_window", "rope.dimension_count")

DEFAULTS = dict(
    rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096
)
# Of Phi-4-mini's own code, which transformers' has not: what they say when they say nothing.
ONLY = {
    "attention_bias": (False, None),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "mlp_bias": (False,),
}


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    fields.check(hf, ("sliding_window", "partial_rotary_factor"), ONLY)
    common = fields.sizes(hf)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"], partial=True),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows=(hf.get("sliding_window"),) * common["layers"],
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    q, kv, D, F = c.heads * c.head_width, c.kv_heads * c.head_width, c.width, c.mlp_width
    inner = {
        "self_attn.qkv_proj": ((q + 2 * kv, D), ("heads", "width"), False),
        "self_attn.o_proj": ((D, q), ("width", "heads"), False),
        "mlp.gate_up_proj": ((2 * F, D), ("mlp", "width"), False),
        "mlp.down_proj": ((D, F), ("width", "mlp"), False),
    }
    return llama.weights(c, inner)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {"sliding_window": c.windows[0] or 0}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    heads, width = values["attention.head_count"], values["embedding_length"]
    share = values["rope.dimension_count"] / (width // heads)
    return {
        "sliding_window": values.get("attention.sliding_window") or None,
        "original_max_position_embeddings": values["rope.scaling.original_context_length"],
        "rope_parameters": rope | {"partial_rotary_factor": share},
    }
