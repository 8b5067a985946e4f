"""Gemma 2: norms before and after, soft-caps, windows on every other layer (arXiv:2408.00118)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unsloth_jax.dims import Params, Scores
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, gemma, llama
from unsloth_jax.models.gemma import embed as embed
from unsloth_jax.models.gemma import norm as norm
from unsloth_jax.models.gemma import to_gguf as to_gguf
from unsloth_jax.models.gemma import unit
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds

GGUF_ARCH = "gemma2"
GGUF_READS = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

NORMS = (*llama.NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
OWN = (
    "attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window",
    "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip


@dataclass(frozen=True)
class Config(llama.Config):
    scale: float = 1.0  # of the products of queries and keys
    logit_cap: float | None = None


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    caps = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    hf = caps | {"max_position_embeddings": 8192} | dict(hf)
    common = read(hf, OWN)
    window = hf.get("sliding_window", 4096)
    sliding = fields.sliding_layers(hf, common["layers"], 2)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        windows=tuple(window if one else None for one in sliding),
    )


def read(hf: Mapping[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """The fields of `Config` that Gemma 2 and 3 name alike."""
    act = hf.get("hidden_activation") or gemma.DEFAULTS["hidden_act"]
    # Names that transformers reads nothing of, beside those it reads.
    same = {"hidden_act": (act,), "sliding_window_size": (hf.get("sliding_window", 4096),)}
    hf = gemma.DEFAULTS | dict(hidden_act=act, num_key_value_heads=4) | dict(hf)
    fields.check(hf, own, same)
    bias = hf.get("attention_bias", False)
    return fields.sizes(hf) | dict(
        tied=hf["tie_word_embeddings"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=hf.get("attn_logit_softcapping"),
        logit_cap=hf.get("final_logit_softcapping"),
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    return llama.weights(c, norms=NORMS)


def scores(c: Config) -> Scores:
    """What is done to the head's scores."""
    return Scores(cap=c.logit_cap)


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
    return between_norms(c, w, x, mix, mlp)


def between_norms(
    c: Config,
    w: Params,
    x: Float[Array, "B T D"],
    mix: Callable[[Array], tuple[Array, Any]],
    mlp: Mlp,
):
    """A layer that normalizes what attention and MLP read and give; `mix` as `pre_normed`'s."""
    y, kept = mix(unit(c, w["input_layernorm"], x))
    x = checkpoint_name(x + unit(c, w["post_attention_layernorm"], y), "mid")
    y = mlp(w["mlp"], unit(c, w["pre_feedforward_layernorm"], x), c.activation)
    return x + unit(c, w["post_feedforward_layernorm"], y), kept


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
        "sliding_window": c.windows[0],
    }


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    capped = c.attention_cap is not None and c.logit_cap is not None
    return {"scores' scale": (c.scale, llama_cpp_scale(c, 46)), "both soft-caps": (capped, True)}


def llama_cpp_scale(c: Config, largest: int) -> float:
    """llama.cpp knows the largest model, whose scale is another, by its number of layers."""
    return (c.width // c.heads if c.layers == largest else c.head_width) ** -0.5


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return shared_from_gguf(values, 46) | {
        "attn_logit_softcapping": values.get("attn_logit_softcapping"),
        "final_logit_softcapping": values.get("final_logit_softcapping"),
    }


def shared_from_gguf(values: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """What Gemma 2 and 3 read alike; `largest` as `llama_cpp_scale`'s."""
    heads, width = values["attention.head_count"], values["embedding_length"]
    own = values.get("attention.key_length", width // heads)
    return {
        "hidden_activation": gemma.DEFAULTS["hidden_act"],
        "query_pre_attn_scalar": width // heads if values["block_count"] == largest else own,
        "sliding_window": values["attention.sliding_window"],
    }
