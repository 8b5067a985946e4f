"""Gemma and CodeGemma: scaled embeddings, norms around 1, a gate by GELU (arXiv:2403.08295)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.llama import weights as weights

GGUF_ARCH = "gemma"
GGUF_READS = ()

DEFAULTS = dict(head_dim=256, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
# The first checkpoints name the exact GELU and were trained with the approximation.
LEGACY = {"gelu": "gelu_pytorch_tanh"}
OFFSET = 1.0  # norms store how far their factors are from it


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(num_key_value_heads=16, max_position_embeddings=8192) | dict(hf)
    hf["hidden_act"] = LEGACY.get(hf["hidden_act"], hf["hidden_act"])
    fields.check(hf, own=("attention_bias", "hidden_activation"))
    if hf.get("hidden_activation") not in (None, hf["hidden_act"]):
        raise ValueError(
            f"config has hidden_activation={hf['hidden_activation']!r} and "
            f"hidden_act={hf['hidden_act']!r}; expected the same"
        )
    common = fields.sizes(hf)
    bias = hf.get("attention_bias", False)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf["tie_word_embeddings"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=(None,) * common["layers"],
    )


def embed(
    c: Config, params: Params, ids: Int[Array, "B T"], rows: Float[Array, "B T D"] | None = None
) -> Float[Array, "B T D"]:
    """Rows of the table times sqrt(D), which is rounded to their dtype first."""
    rows = llama.embed(c, params, ids, rows)
    return rows * jnp.asarray(c.width**0.5, rows.dtype)


def unit(c: Config, node: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """RMSNorm by the node's weight."""
    return rms_norm(node["weight"], x, c.eps, OFFSET)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return unit(c, params["model"]["norm"], x)


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
    mix = lambda y: llama.attention(c, w["self_attn"], y, by["all"], attend, window)
    return llama.pre_normed(c, w, x, mix, mlp, unit)


def to_gguf(c: Config, path: str, w: np.ndarray) -> np.ndarray:
    """llama.cpp's norms multiply by the factors themselves."""
    return w + np.float32(OFFSET) if path.endswith("norm.weight") else w


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return {"attention_bias": llama.from_gguf(values, names, rope)["attention_bias"]}
