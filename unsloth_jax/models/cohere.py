"""Command R: attention and MLP side by side behind one layer norm (Cohere; transformers)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax import rope
from unsloth_jax.dims import Params, Scores
from unsloth_jax.layers import Attend, Mlp, feed_forward, layer_norm
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds

GGUF_ARCH = "command-r"
GGUF_READS = ("logit_scale",)

NORMS = ("input_layernorm",)


@dataclass(frozen=True)
class Config(llama.Config):
    logit_scale: float = 1.0
    qk_norm: bool = False


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"rope_theta": 5e5, "max_position_embeddings": 8192} | _without_theta(hf)
    common = read(hf, ("use_qk_norm",), {})
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        windows=(None,) * common["layers"],
        qk_norm=hf.get("use_qk_norm", False),
    )


def _without_theta(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` that names a theta decides alone."""
    theta = (hf.get("rope_parameters") or {}).get("rope_theta")
    return dict(hf) | ({} if theta is None else {"rope_theta": theta})


def read(hf: Mapping[str, Any], own: tuple[str, ...], only: dict[str, tuple]) -> dict[str, Any]:
    """The fields of `Config` that Cohere's models name alike; `own`, `only` as `fields.check`'s."""
    fields.check(hf, ("attention_bias", "layer_norm_eps", "logit_scale", *own), only)
    bias = hf.get("attention_bias", False)
    return fields.sizes(hf) | dict(
        eps=hf.get("layer_norm_eps", 1e-5),
        tied=hf.get("tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        logit_scale=hf.get("logit_scale", 0.0625),
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    out = llama.weights(c, norms=NORMS)
    for name, heads in (("q_norm", c.heads), ("k_norm", c.kv_heads)) if c.qk_norm else ():
        shape, axes = (heads, c.head_width), ("heads", "head_width")
        out[f"{LAYERS}.*.self_attn.{name}.weight"] = (shape, axes)
    return out


def scores(c: Config) -> Scores:
    """What is done to the head's scores."""
    return Scores(scale=c.logit_scale)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return layer_norm(params["model"]["norm"], x, c.eps)


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
    return beside(c, window, w, x, by["all"], attend, mlp)


def beside(
    c: Config,
    window: int | None,
    w: Params,
    x: Float[Array, "B T D"],
    by: rope.Angles | None,
    attend: Attend,
    mlp: Mlp,
):
    """`block` under the angles `by`, or under none."""
    a = w["self_attn"]
    norms = (lambda x, name: layer_norm(a[name], x, c.eps)) if c.qk_norm else None

    y = layer_norm(w["input_layernorm"], x, c.eps)
    mixed, kept = llama.attention(c, a, y, by, attend, window, norms=norms, turn=rope.rotate_pairs)
    return x + mixed + mlp(w["mlp"], y, c.activation), kept


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {"logit_scale": c.logit_scale, "rope_scaling_type": "none"}


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return {f"use_qk_norm of {c.layers} layers": (c.qk_norm, c.layers >= 64)}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return {
        "attention_bias": llama.from_gguf(values, names, rope)["attention_bias"],
        "layer_norm_eps": values["attention.layer_norm_epsilon"],
        "logit_scale": values["logit_scale"],
        "use_qk_norm": f"{LAYERS}.0.self_attn.q_norm.weight" in names,
    }
