"""Gemma 3's text model: normed queries and keys, five windowed layers to one (arXiv:2503.19786)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Int

from unsloth_jax import rope
from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, gemma2, llama
from unsloth_jax.models.gemma import embed as embed
from unsloth_jax.models.gemma import norm as norm
from unsloth_jax.models.gemma import to_gguf as to_gguf
from unsloth_jax.models.gemma import unit
from unsloth_jax.models.gemma2 import scores as scores
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import head as head

GGUF_ARCH = "gemma3"
GGUF_READS = ("attention.sliding_window", "rope.freq_base_swa", "final_logit_softcapping")

OWN = (*gemma2.OWN, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern")
KINDS, THETAS = ("full_attention", "sliding_attention"), (1e6, 1e4)


@dataclass(frozen=True)
class Config(gemma2.Config):
    local_rope: rope.Rope | None = None  # of layers with a window
    sliding: tuple[bool, ...] = ()


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"max_position_embeddings": 131072} | dict(hf)
    common = gemma2.read(hf, OWN)
    if common["attention_cap"] is not None:
        # transformers has the field and its attention doesn't cap.
        raise ValueError(
            f"gemma3_text has no attn_logit_softcapping but None, got {common['attention_cap']}"
        )
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    sliding = fields.sliding_layers(hf, common["layers"], pattern)
    window = hf.get("sliding_window", 4096)
    full, local = (fields.rope(one, common["head_width"]) for one in _ropes(hf))
    return Config(
        **common,
        rope=full,
        local_rope=local,
        sliding=sliding,
        windows=tuple(window if one else None for one in sliding),
    )


def _ropes(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as full and as windowed layers read it: two ropes (transformers 5), or one (4)."""
    new = hf.get("rope_parameters") or {}
    plain = {k: v for k, v in hf.items() if k not in ("rope_parameters", "rope_scaling")}
    if not any(kind in new for kind in KINDS):
        theta = hf.get("rope_local_base_freq", THETAS[1])
        return {"rope_theta": THETAS[0]} | dict(hf), plain | {"rope_theta": theta}
    if unknown := sorted(set(new) - set(KINDS)):
        raise ValueError(f"rope_parameters has {unknown}, expected {list(KINDS)} alone")
    plain.pop("rope_theta", None)
    full, local = (
        plain | {"rope_parameters": {"rope_theta": theta} | dict(new.get(kind) or {})}
        for kind, theta in zip(KINDS, THETAS, strict=True)
    )
    return full, local


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    norms = {
        f"{LAYERS}.*.self_attn.{name}.weight": ((c.head_width,), ("head_width",))
        for name in ("q_norm", "k_norm")
    }
    return gemma2.weights(c) | norms


def kinds(c: Config) -> tuple[tuple[bool, int | None], ...]:
    """What is static about each layer: whether it slides, and its window in tokens."""
    return tuple(zip(c.sliding, c.windows, strict=True))


def angles(
    c: Config, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]
) -> dict[str, rope.Angles]:
    """cos and sin by kind of layer."""
    both = {"full": c.rope, "local": c.local_rope}
    return {kind: rope.angles(r, positions, lengths) for kind, r in both.items()}


def block(
    c: Config,
    kind: tuple[bool, int | None],
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    (sliding, window), a = kind, w["self_attn"]
    norms, by = lambda x, name: unit(c, a[name], x), by["local" if sliding else "full"]
    mix = lambda y: llama.attention(c, a, y, by, attend, window, norms=norms, scale=c.scale)
    return gemma2.between_norms(c, w, x, mix, mlp)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    cap = {} if c.logit_cap is None else {"final_logit_softcapping": c.logit_cap}
    return cap | {"sliding_window": c.windows[0]}


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return {
        "scores' scale": (c.scale, gemma2.llama_cpp_scale(c, 62)),
        "rope of layers with a window": (c.local_rope.kind, "default"),
    }


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    local = {"rope_type": "default", "rope_theta": values.get("rope.freq_base_swa", THETAS[1])}
    return gemma2.shared_from_gguf(values, 62) | {
        "final_logit_softcapping": values.get("final_logit_softcapping"),
        "rope_parameters": dict(zip(KINDS, (rope, local), strict=True)),
    }
