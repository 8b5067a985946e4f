"""Ministral 3's text model: Mistral's layer with YaRN and queries that grow with their position.

Queries beyond the first context are multiplied with 1 + beta log(1 + floor(position / context)),
as in Llama 4; transformers `modeling_ministral3`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.llama import to_gguf as to_gguf
from unsloth_jax.models.llama import weights as weights

GGUF_ARCH = "mistral3"
GGUF_READS = ("rope.scaling.yarn_log_multiplier", "attention.temperature_scale")

DEFAULTS = dict(
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=262144
)
OWN = ("llama_4_scaling_beta", "max_position_embeddings")  # of rope_parameters


@dataclass(frozen=True)
class Config(llama.Config):
    beta: float = 0.0
    context: int = 0  # tokens


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = dict(hf.get(key) or {})
    beta, _ = (given.pop(name, None) for name in OWN)
    hf = DEFAULTS | dict(hf) | {key: given}
    fields.check(hf, own=("sliding_window",))
    if beta is None or "original_max_position_embeddings" not in given:
        raise ValueError(
            "ministral3 needs rope_parameters with llama_4_scaling_beta and "
            f"original_max_position_embeddings, got {sorted(given)}"
        )
    common = fields.sizes(hf)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows=(hf.get("sliding_window"),) * common["layers"],
        beta=beta,
        context=given["original_max_position_embeddings"],
    )


def angles(c: Config, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> dict[str, Any]:
    """cos and sin, and the queries' factor float32 [B, T, 1, 1]."""
    whole = (positions // c.context).astype(jnp.float32)
    grown = 1 + c.beta * jnp.log(1 + whole)
    return llama.angles(c, positions, lengths) | {"queries": grown[..., None, None]}


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
    a, grown = w["self_attn"], by["queries"]
    mix = lambda y: llama.attention(c, a, y, by["all"], attend, window, query_scale=grown)
    return llama.pre_normed(c, w, x, mix, mlp)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    growth, r = 0.1 * math.log(c.rope.factor), c.rope
    # What llama.cpp makes an attention factor of, as YaRN does of mscale_all_dim beside mscale 1.
    multiplier = ((1 + growth) / r.attention_factor - 1) / growth if growth > 0 else 0.0
    own = {"rope_scaling_yarn_log_mul": multiplier, "attn_temperature_scale": c.beta}
    return llama.gguf_keys(c) | own


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    multiplier, beta = (values[key] for key in GGUF_READS)
    growth = 0.1 * math.log(rope["factor"])
    attention = (1 + growth) / (1 + growth * multiplier)
    own = {"attention_factor": attention, "llama_4_scaling_beta": beta}
    return {"rope_parameters": rope | own}
