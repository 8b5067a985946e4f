"""EXAONE 4: norms behind, normed heads, full layers without positions (arXiv:2507.11407)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.olmo2 import NORMS as NORMS
from unsloth_jax.models.olmo2 import post_normed
from unsloth_jax.models.smollm3 import Config
from unsloth_jax.models.smollm3 import kinds as kinds

GGUF_ARCH = "exaone4"
GGUF_READS = ("attention.sliding_window", "attention.sliding_window_pattern")

OWN = ("sliding_window", "sliding_window_pattern", "layer_types")


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = dict(num_key_value_heads=32, rms_norm_eps=1e-5, sliding_window=4096) | dict(hf)
    fields.check(hf, own=OWN)
    common, window = fields.sizes(hf), hf["sliding_window"]
    sliding = (False,) * common["layers"] if window is None else _sliding(hf, common["layers"])
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows=tuple(window if one else None for one in sliding),
        turned=tuple(window is None or one for one in sliding),
    )


def _sliding(hf: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Whether each layer has a window; a pattern is a number or letters such as "LLLG"."""
    pattern = hf.get("sliding_window_pattern") or 4
    if hf.get("layer_types") is not None:
        return fields.sliding_layers(hf, layers, 0)
    if isinstance(pattern, str):
        if not pattern or set(pattern) - set("LG"):
            raise ValueError(f"sliding_window_pattern={pattern!r}, expected letters L and G")
        return tuple(pattern[i % len(pattern)] == "L" for i in range(layers))
    return fields.sliding_layers(hf, layers, pattern)


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    norms = {
        f"{LAYERS}.*.self_attn.{name}.weight": ((c.head_width,), ("head_width",))
        for name in ("q_norm", "k_norm")
    }
    return llama.weights(c, norms=NORMS) | norms


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
    (turned, window), a = kind, w["self_attn"]
    norms = lambda x, name: llama.unit(c, a[name], x)
    by = by["all"] if turned else None
    mixed = llama.attention(c, a, x, by, attend, window, norms=norms)
    return post_normed(c, w, x, mixed, mlp, llama.unit)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    window = next(filter(None, c.windows), None)
    pattern = [one is not None for one in c.windows]
    windows = {"sliding_window": window, "sliding_window_pattern": pattern}
    return {"vocab_size": c.vocab} | (windows if window else {})


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    sliding = tuple(c.layers == 64 and (i + 1) % 4 != 0 for i in range(c.layers))
    has_rope = sliding if any(sliding) else (True,) * c.layers
    return {
        "sliding windows": (tuple(w is not None for w in c.windows), sliding),
        "layers with rope": (c.turned, has_rope),
    }


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    window, sliding = (values.get(key) for key in GGUF_READS)
    if window is None:
        return {"sliding_window": None, "layer_types": ["full_attention"] * values["block_count"]}
    kinds = ["sliding_attention" if one else "full_attention" for one in sliding or ()]
    return {"sliding_window": window, "layer_types": kinds}
