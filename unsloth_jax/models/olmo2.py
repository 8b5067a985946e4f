"""OLMo 2: norms behind attention and MLP, and over all queries and keys (arXiv:2501.00656)."""

from collections.abc import Mapping
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "olmo2"
GGUF_READS = ()

NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"rms_norm_eps": 1e-5} | dict(hf)
    fields.check(hf, own=("attention_bias",))
    common = fields.sizes(hf)
    bias = hf.get("attention_bias", False)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=(None,) * common["layers"],
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    norms = {
        f"{LAYERS}.*.self_attn.{name}.weight": ((heads * c.head_width,), (axis,))
        for name, heads, axis in (("q_norm", c.heads, "heads"), ("k_norm", c.kv_heads, "kv_heads"))
    }
    return llama.weights(c, norms=NORMS) | norms


def unit(c: Config, node: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """RMSNorm by the node's weight, multiplied in float32."""
    return rms_norm(node["weight"], x, c.eps, 0.0)


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
    a = w["self_attn"]
    across = lambda x, name: unit(c, a[name], x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    mixed = llama.attention(c, a, x, by["all"], attend, window, norms=across)
    return post_normed(c, w, x, mixed, mlp, unit)


def post_normed(
    c: Any,
    w: Params,
    x: Float[Array, "B T D"],
    mixed: tuple[Array, Any],
    mlp: Mlp,
    unit: llama.Unit,
):
    """A layer that normalizes what attention and MLP give.

    `mixed` is attention of x, with what it kept; `unit` as `llama.pre_normed`'s.
    """
    y, kept = mixed
    x = checkpoint_name(x + unit(c, w["post_attention_layernorm"], y), "mid")
    return x + unit(c, w["post_feedforward_layernorm"], mlp(w["mlp"], x, c.activation)), kept


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return {"attention_bias": llama.from_gguf(values, names, rope)["attention_bias"]}
