"""Granite 3: Llama's layer with scaled embeddings, scores and residuals (IBM; transformers)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Params, Scores
from unsloth_jax.layers import Attend, Mlp, feed_forward, scaled
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import to_gguf as to_gguf
from unsloth_jax.models.llama import weights as weights

GGUF_ARCH = "granite"
GGUF_READS = ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")

SCALES = (
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"
)  # fmt: skip


@dataclass(frozen=True)
class Config(llama.Config):
    embedding_scale: float = 1.0
    scale: float = 1.0  # of the products of queries and keys
    residual_scale: float = 1.0
    logit_divisor: float = 1.0


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    fields.check(hf, own=("attention_bias", "mlp_bias", *SCALES))
    common = fields.sizes(hf)
    bias = hf.get("attention_bias", False)
    embedding, scale, residual, divisor = (hf.get(name, 1.0) for name in SCALES)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        windows=(None,) * common["layers"],
        embedding_scale=embedding,
        scale=scale,
        residual_scale=residual,
        logit_divisor=divisor,
    )


def embed(
    c: Config, params: Params, ids: Int[Array, "B T"], rows: Float[Array, "B T D"] | None = None
) -> Float[Array, "B T D"]:
    """Rows of the table, scaled."""
    return scaled(llama.embed(c, params, ids, rows), c.embedding_scale)


def scores(c: Config) -> Scores:
    """What is done to the head's scores."""
    return Scores(scale=1 / c.logit_divisor)


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
    a = w["self_attn"]
    mix = lambda y: llama.attention(c, a, y, by["all"], attend, window, scale=c.scale)
    return llama.pre_normed(c, w, x, mix, mlp, scale=c.residual_scale)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return llama.gguf_keys(c) | {
        "attention_scale": c.scale,
        "embedding_scale": c.embedding_scale,
        "residual_scale": c.residual_scale,
        "logit_scale": c.logit_divisor,
    }


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return llama.from_gguf(values, names, rope) | {
        name: values[key] for name, key in zip(SCALES, GGUF_READS, strict=True)
    }
