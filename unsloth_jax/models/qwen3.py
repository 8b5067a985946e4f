"""Qwen3: dense decoder, an RMSNorm on every query and key head (arXiv:2505.09388)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, llama, qwen2
from unsloth_jax.models.llama import LAYERS, Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "qwen3"
GGUF_READS = ("attention.sliding_window",)


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = qwen2.DEFAULTS | {"head_dim": 128} | dict(hf)
    fields.check(hf, own=("attention_bias", *qwen2.OWN))
    common = fields.sizes(hf)
    bias = hf.get("attention_bias", False)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=fields.windows(hf, common["layers"]),
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    norms = {
        f"{LAYERS}.*.self_attn.{name}.weight": ((c.head_width,), ("head_width",))
        for name in ("q_norm", "k_norm")
    }
    return llama.weights(c) | norms


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
    norms = lambda x, name: llama.unit(c, a[name], x)
    mix = lambda y: llama.attention(c, a, y, by["all"], attend, window, norms=norms)
    return llama.pre_normed(c, w, x, mix, mlp)


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    bias = llama.from_gguf(values, names, rope)["attention_bias"]
    return qwen2.from_gguf(values, names, rope) | {"attention_bias": bias}
