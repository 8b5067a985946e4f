"""GLM-4 (0414): norms before and after, half of each head turned in pairs (arXiv:2406.12793)."""

from collections.abc import Mapping
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unsloth_jax import rope
from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "glm4"
GGUF_READS = ("rope.dimension_count",)

NORMS = (*llama.NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")
DEFAULTS = dict(
    num_key_value_heads=2, head_dim=128, rms_norm_eps=1.5625e-7, max_position_embeddings=131072
)


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    if "partial_rotary_factor" not in (hf.get("rope_parameters") or {}):
        hf = {"partial_rotary_factor": 0.5} | hf
    fields.check(hf, own=("attention_bias", "partial_rotary_factor"))
    common = fields.sizes(hf)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"], partial=True),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", True),
        o_bias=False,
        mlp_bias=False,
        windows=(None,) * common["layers"],
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    D, F = c.width, c.mlp_width
    inner = {name: m for name, m in llama.matrices(c).items() if name.startswith("self_attn")}
    inner |= {
        "mlp.gate_up_proj": ((2 * F, D), ("mlp", "width"), False),
        "mlp.down_proj": ((D, F), ("width", "mlp"), False),
    }
    return llama.weights(c, inner, NORMS)


def block(
    c: Config,
    window: int | None,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    unit = lambda name, x: rms_norm(w[name]["weight"], x, c.eps)

    y, kept = llama.attention(
        c, w["self_attn"], unit("input_layernorm", x), by["all"], attend, window,
        turn=rope.rotate_pairs,
    )  # fmt: skip
    x = checkpoint_name(x + unit("post_self_attn_layernorm", y), "mid")
    y = mlp(w["mlp"], unit("post_attention_layernorm", x), c.activation)
    return x + unit("post_mlp_layernorm", y), kept


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {"rope_dimension_count": c.rope.width}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    heads, width = values["attention.head_count"], values["embedding_length"]
    share = values["rope.dimension_count"] / values.get("attention.key_length", width // heads)
    bias = llama.from_gguf(values, names, rope)["attention_bias"]
    return {
        "attention_bias": bias,
        "rope_parameters": rope | {"partial_rotary_factor": share},
    }
