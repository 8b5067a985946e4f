"""Llama 2 and 3, SmolLM2, TinyLlama, Yi: dense decoder with grouped-query attention.

Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783); transformers `modeling_llama`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from unsloth_jax import leaves, rope
from unsloth_jax.dims import Params, Scores
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm, scaled
from unsloth_jax.leaves import linear, linears
from unsloth_jax.models import fields

GGUF_ARCH = "llama"
GGUF_READS = ()
LAYERS = "model.layers"
NORMS = ("input_layernorm", "post_attention_layernorm")
Unit = Callable[[Any, Params, Array], Array]
Matrices = Mapping[str, tuple[tuple[int, ...], tuple[str, ...], bool]]


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
    attention_cap: float | None = None
    chunk: int | None = None  # tokens, where a family's layers have chunks

    @property
    def v_width(self) -> int:
        """Of a head's values, where a family gives them no width of their own."""
        return self.head_width


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


def matrices(c: Config) -> Matrices:
    """Name within a layer -> (shape, logical axes, whether it has a bias)."""
    q, kv, D, F = c.heads * c.head_width, c.kv_heads * c.head_width, c.width, c.mlp_width
    return {
        "self_attn.q_proj": ((q, D), ("heads", "width"), c.qkv_bias),
        "self_attn.k_proj": ((kv, D), ("kv_heads", "width"), c.qkv_bias),
        "self_attn.v_proj": ((kv, D), ("kv_heads", "width"), c.qkv_bias),
        "self_attn.o_proj": ((D, q), ("width", "heads"), c.o_bias),
        "mlp.gate_proj": ((F, D), ("mlp", "width"), c.mlp_bias),
        "mlp.up_proj": ((F, D), ("mlp", "width"), c.mlp_bias),
        "mlp.down_proj": ((D, F), ("width", "mlp"), c.mlp_bias),
    }


def weights(
    c: Config, inner: Matrices | None = None, norms: Sequence[str] = NORMS
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight.

    `inner` are a layer's matrices, `norms` its norms of the model's width.
    """
    D = c.width
    out = {"model.embed_tokens.weight": ((c.vocab, D), ("vocab", "width"))}
    for name, (shape, axes, bias) in (inner or matrices(c)).items():
        out[f"{LAYERS}.*.{name}.weight"] = (shape, axes)
        if bias:
            out[f"{LAYERS}.*.{name}.bias"] = (shape[:1], axes[:1])
    for name in norms:
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


def embed(
    c: Config, params: Params, ids: Int[Array, "B T"], rows: Float[Array, "B T D"] | None = None
) -> Float[Array, "B T D"]:
    """What the first layer takes; `rows` of the table where they are known already."""
    return leaves.embed(params["model"]["embed_tokens"], ids) if rows is None else rows


def unit(c: Config, node: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """RMSNorm by the node's weight."""
    return rms_norm(node["weight"], x, c.eps)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return unit(c, params["model"]["norm"], x)


def head(c: Config, params: Params) -> Params:
    """The node whose `linear` turns hidden states into logits."""
    return params["model"]["embed_tokens"] if c.tied else params["lm_head"]


def scores(c: Config) -> Scores:
    """What is done to the head's scores: here nothing."""
    return Scores()


def attention(
    c: Config,
    a: Params,
    y: Float[Array, "B T D"],
    by: rope.Angles | None,
    attend: Attend,
    window: int | None,
    *,
    norms: Callable[[Array, str], Array] | None = None,
    turn: Callable[[Array, rope.Angles], Array] = rope.rotate,
    scale: float | None = None,
    query_scale: Float[Array, "B T 1 1"] | None = None,
):
    """A layer's attention of y [B, T, D], and what `attend` kept.

    `norms(x, name)` normalizes queries and keys [B, T, n, h] by the weight of that name; `by` None
    leaves them unturned. Projections may be one, `qkv_proj`.
    """
    heads = lambda x: x.reshape(*y.shape[:2], -1, c.head_width)
    q, k, v = map(heads, _projected(c, a, y))
    if norms is not None:
        # Before their norms, which need their inputs to be differentiated.
        q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), "qkv", strict=True))
        q, k = norms(q, "q_norm"), norms(k, "k_norm")
    if by is not None:
        q, k = turn(q, by), turn(k, by)
    if query_scale is not None:
        q = q * query_scale.astype(q.dtype)
    if norms is None:
        q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), "qkv", strict=True))
    scale = c.head_width**-0.5 if scale is None else scale
    y, kept = attend(q, k, v, scale=scale, window=window, cap=c.attention_cap)
    return linear(a["o_proj"], y), kept


def _projected(c: Config, a: Params, y: Array) -> list[Array]:
    if "qkv_proj" not in a:
        return linears((a["q_proj"], a["k_proj"], a["v_proj"]), y)
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    return jnp.split(linear(a["qkv_proj"], y), (q, q + kv), axis=-1)


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
    mix = lambda y: attention(c, w["self_attn"], y, by["all"], attend, window)
    return pre_normed(c, w, x, mix, mlp)


def pre_normed(
    c: Config,
    w: Params,
    x: Float[Array, "B T D"],
    mix: Callable[[Array], tuple[Array, Any]],
    mlp: Mlp,
    unit: Unit = unit,
    scale: float = 1.0,
):
    """A layer that normalizes what attention and MLP read; what they give is times `scale`.

    `mix` is attention, with what it kept; `unit(c, node, x)` the norm by a node's weights.
    """
    y, kept = mix(unit(c, w["input_layernorm"], x))
    x = checkpoint_name(x + scaled(y, scale), "mid")
    y = unit(c, w["post_attention_layernorm"], x)
    return x + scaled(mlp(w["mlp"], y, c.activation), scale), kept


def to_gguf(c: Config, path: str, w: np.ndarray) -> np.ndarray:
    """llama.cpp turns neighbouring rows of q and k, so each head's halves are interleaved."""
    heads = {"q_proj": c.heads, "k_proj": c.kv_heads}.get(path.split(".")[-2])
    if heads is None:
        return w
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {"vocab_size": c.vocab, "rope_dimension_count": c.head_width}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    layer = f"{LAYERS}.0."
    return {
        "attention_bias": f"{layer}self_attn.q_proj.bias" in names,
        "mlp_bias": f"{layer}mlp.down_proj.bias" in names,
    }
