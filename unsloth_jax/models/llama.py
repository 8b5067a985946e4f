"""Llama 2 and 3, SmolLM2, TinyLlama, Yi: dense decoder with grouped-query attention.

Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783); transformers `modeling_llama`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from unsloth_jax import leaves, rope
from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, gated_mlp, rms_norm
from unsloth_jax.leaves import linear, linears
from unsloth_jax.models import fields

GGUF_ARCH = "llama"
LAYERS = "model.layers"


@dataclass(frozen=True)
class Config:
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    eps: float
    activation: str
    rope: rope.Rope
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    fields.check(hf, own=("attention_bias", "mlp_bias"))
    common = fields.sizes(hf)
    bias = hf.get("attention_bias", False)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        windows=(None,) * common["layers"],
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    q, kv, D, F = c.heads * c.head_width, c.kv_heads * c.head_width, c.width, c.mlp_width
    matrices = {
        "self_attn.q_proj": ((q, D), ("heads", "width"), c.qkv_bias),
        "self_attn.k_proj": ((kv, D), ("kv_heads", "width"), c.qkv_bias),
        "self_attn.v_proj": ((kv, D), ("kv_heads", "width"), c.qkv_bias),
        "self_attn.o_proj": ((D, q), ("width", "heads"), c.o_bias),
        "mlp.gate_proj": ((F, D), ("mlp", "width"), c.mlp_bias),
        "mlp.up_proj": ((F, D), ("mlp", "width"), c.mlp_bias),
        "mlp.down_proj": ((D, F), ("width", "mlp"), c.mlp_bias),
    }
    out = {"model.embed_tokens.weight": ((c.vocab, D), ("vocab", "width"))}
    for name, (shape, axes, bias) in matrices.items():
        out[f"{LAYERS}.*.{name}.weight"] = (shape, axes)
        if bias:
            out[f"{LAYERS}.*.{name}.bias"] = (shape[:1], axes[:1])
    for name in ("input_layernorm", "post_attention_layernorm"):
        out[f"{LAYERS}.*.{name}.weight"] = ((D,), ("width",))
    out["model.norm.weight"] = ((D,), ("width",))
    return out if c.tied else out | {"lm_head.weight": ((c.vocab, D), ("vocab", "width"))}


def kinds(c: Config) -> tuple[int | None, ...]:
    """What is static about each layer: its sliding window in tokens."""
    return c.windows


def angles(
    c: Config, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
) -> dict[str, rope.Angles]:
    """cos and sin by kind of layer; this family has one kind."""
    return {"all": rope.angles(c.rope, positions, lengths)}


def embed(c: Config, params: Params, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return leaves.embed(params["model"]["embed_tokens"], ids)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return rms_norm(params["model"]["norm"]["weight"], x, c.eps)


def head(c: Config, params: Params) -> Params:
    """The node whose `linear` turns hidden states into logits."""
    return params["model"]["embed_tokens"] if c.tied else params["lm_head"]


def block(
    c: Config,
    window: int | None,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = gated_mlp,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    a = w["self_attn"]
    heads = lambda y: y.reshape(*x.shape[:2], -1, c.head_width)

    y = rms_norm(w["input_layernorm"]["weight"], x, c.eps)
    q, k, v = map(heads, linears((a["q_proj"], a["k_proj"], a["v_proj"]), y))
    q, k = (checkpoint_name(rope.rotate(x, by["all"]), n) for x, n in ((q, "q"), (k, "k")))
    v = checkpoint_name(v, "v")
    y, kept = attend(q, k, v, scale=c.head_width**-0.5, window=window)
    x = checkpoint_name(x + linear(a["o_proj"], y), "mid")

    y = rms_norm(w["post_attention_layernorm"]["weight"], x, c.eps)
    return x + mlp(w["mlp"], y, c.activation), kept


def to_gguf(c: Config, path: str, w: np.ndarray) -> np.ndarray:
    """llama.cpp turns neighbouring rows of q and k, so each head's halves are interleaved."""
    heads = {"q_proj": c.heads, "k_proj": c.kv_heads}.get(path.split(".")[-2])
    if heads is None:
        return w
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
