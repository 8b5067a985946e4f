"""gpt-oss: attention with sinks, windows on every other layer, clamped gates (arXiv:2508.10925)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from unsloth_jax import rope
from unsloth_jax.dims import Params, Parts
from unsloth_jax.experts import (
    Spread,
    chosen_route,
    clamped,
    mixture,
    router_scores,
    spread,
)
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "gpt-oss"
GGUF_READS = (
    "expert_count", "expert_used_count", "expert_feed_forward_length", "attention.sliding_window"
)  # fmt: skip
EXPERTS = f"{LAYERS}.*.mlp.experts"
MATRICES = ("gate_up_proj", "down_proj")
TRANSPOSED = tuple(f"{EXPERTS}.{name}" for name in MATRICES)
OWN = (
    "attention_bias", "sliding_window", "layer_types", "swiglu_alpha", "swiglu_limit",
    "initial_context_length", "experts_per_token", *fields.EXPERTS,
)  # fmt: skip
# Experts have their own gate, whatever this says.
ONLY = {"hidden_act": ("silu",)}
DEFAULTS = dict(
    num_key_value_heads=8, head_dim=64, sliding_window=128, max_position_embeddings=131072,
    rms_norm_eps=1e-5, num_experts_per_tok=4, swiglu_alpha=1.702, swiglu_limit=7.0,
    attention_bias=True,
)  # fmt: skip
ABSENT = ("num_experts_per_tok", "swiglu_alpha", "swiglu_limit", "attention_bias")  # where null
ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=4096,
)  # fmt: skip


@dataclass(frozen=True)
class Config(llama.Config):
    experts: int = 1
    chosen: int = 1  # experts of a token
    gain: float = 1.702  # of the gate's sigmoid
    limit: float = 7.0  # of what an expert's gate and up may be


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | {k: v for k, v in hf.items() if v is not None or k not in ABSENT}
    fields.check(hf, OWN, ONLY)
    common = fields.sizes(hf)
    sliding, window = fields.sliding_layers(hf, common["layers"], 2), hf["sliding_window"]
    if window is None and any(sliding):
        raise ValueError("layer_types has sliding_attention, but sliding_window is null")
    return Config(
        **common,
        rope=_rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf["attention_bias"],
        o_bias=hf["attention_bias"],
        mlp_bias=False,
        windows=tuple(window if one else None for one in sliding),
        **_experts(hf),
        gain=hf["swiglu_alpha"],
        limit=hf["swiglu_limit"],
    )


def _rope(hf: Mapping[str, Any], width: int) -> rope.Rope:
    """Raises ValueError where `initial_context_length` is not the context that scaling is from."""
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or ROPE
    hf = hf | {"rope_scaling": ROPE} if given is ROPE else hf
    own = isinstance(given, Mapping) and given.get("rope_theta") or hf.get("rope_theta")
    turned = fields.rope(hf if own else hf | {"rope_theta": 150000.0}, width)
    first = hf.get("initial_context_length")
    if turned.kind == "yarn" and first not in (None, turned.context):
        raise ValueError(
            f"initial_context_length={first}, but rope has original_max_position_embeddings="
            f"{turned.context}: expected the same"
        )
    return turned


def _experts(hf: Mapping[str, Any]) -> dict[str, int]:
    """Raises ValueError where `experts_per_token` is another number."""
    found = fields.experts(hf, 128)
    if hf.get("experts_per_token") not in (None, found["chosen"]):
        raise ValueError(
            f"experts_per_token={hf['experts_per_token']}, but num_experts_per_tok="
            f"{found['chosen']}: expected the same"
        )
    return found


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    E, D, F = c.experts, c.width, c.mlp_width
    attention = {n: m for n, m in llama.matrices(c).items() if n.startswith("self_attn")}
    router = {"mlp.router": ((E, D), ("experts", "width"), True)}
    return llama.weights(c, attention | router) | {
        f"{LAYERS}.*.self_attn.sinks": ((c.heads,), ("heads",)),
        f"{EXPERTS}.gate_up_proj": ((E, 2 * F, D), ("experts", "mlp", "width")),
        f"{EXPERTS}.gate_up_proj_bias": ((E, 2 * F), ("experts", "mlp")),
        f"{EXPERTS}.down_proj": ((E, D, F), ("experts", "width", "mlp")),
        f"{EXPERTS}.down_proj_bias": ((E, D), ("experts", "width")),
    }


def unit(c: Config, node: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """RMSNorm whose product with the weight is in float32 too."""
    return rms_norm(node["weight"], x, c.eps, offset=0.0)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return unit(c, params["model"]["norm"], x)


def routed(c: Config, node: Params, x: Float[Array, "B T D"], real: Float[Array, "B T"]) -> Spread:
    """How a mixture spreads the tokens that are `real`."""
    scores = router_scores(node["router"], x.reshape(-1, x.shape[-1]))
    return spread(scores, chosen_route(scores, c.chosen).experts, real.reshape(-1))


def moe(c: Config, node: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The mixture that stands in the MLP's place; a file's neighbours are gate and up."""
    flat, own = x.reshape(-1, x.shape[-1]), node["experts"]
    route = chosen_route(router_scores(node["router"], flat), c.chosen)
    named = {name: {"weight": own[name], "bias": own[f"{name}_bias"]} for name in MATRICES}
    inner = partial(clamped, c.gain, c.limit)
    return mixture(named, flat, route, MATRICES[:1], MATRICES[1], inner).reshape(x.shape)


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
    sinking = partial(attend, sinks=w["self_attn"]["sinks"])
    mix = lambda y: llama.attention(c, w["self_attn"], y, by["all"], sinking, window)
    mixed = lambda node, y, _: mlp(node, y, partial(moe, c))
    return llama.pre_normed(c, w, x, mix, mixed, unit)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {
        "sliding_window": next(filter(None, c.windows)),
        "expert_feed_forward_length": c.mlp_width,
    }


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return {
        "attention_bias": (c.qkv_bias, True),
        "swiglu_alpha": (c.gain, DEFAULTS["swiglu_alpha"]),
        "swiglu_limit": (c.limit, DEFAULTS["swiglu_limit"]),
    }


def gguf_told(c: Config) -> list[str]:
    """What a file's user should know."""
    if c.rope.kind != "yarn" or c.rope.truncate:
        return []
    rounded = rope.frequencies(replace(c.rope, truncate=True))
    off = np.abs(rope.frequencies(c.rope) - rounded).max()
    return [
        "GGUF has no key for yarn's truncate=False: llama.cpp rounds the ends of its ramp to whole "
        f"dimensions, so that angles are up to {off:.1e} radians a token off"
    ]


def gguf_parts(c: Config, name: str, shape: tuple[int, ...]) -> Parts:
    """Experts' gate and up apart, [E, out, in] each, their biases, and sinks under their name."""
    owner, _, last = name.rpartition(".")
    if last == "sinks":
        return {f"{name}.weight": (shape, lambda w: w)}
    own = last.removesuffix("_bias")
    if own not in MATRICES:
        return {}
    if last != own:
        kind, turned, (E, O, *I) = "bias", lambda w: w, shape
    else:
        kind, turned, (E, *I, O) = "weight", lambda w: w.swapaxes(1, 2), shape
    if own == MATRICES[1]:
        return {f"{owner}.{own}.{kind}": ((E, O, *I), turned)}
    gate_and_up = enumerate(("gate_proj", "up_proj"))
    return {
        f"{owner}.{n}.{kind}": ((E, O // 2, *I), lambda w, i=i: turned(w)[:, i::2])
        for i, n in gate_and_up
    }


def from_gguf_parts(c: Config, name: str, parts: list[np.ndarray]) -> np.ndarray:
    """A weight of its parts: gate and up take turns."""
    E, _, *inputs = parts[0].shape if len(parts) > 1 else (0, 0)
    w = np.stack(parts, axis=2).reshape(E, -1, *inputs) if E else parts[0]
    return w.swapaxes(1, 2) if name.endswith(MATRICES) else w


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    experts, chosen, width, window = (values[key] for key in GGUF_READS)
    # What no key says is as llama.cpp has it: see `gguf_fixed`.
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "intermediate_size": width,
        "sliding_window": window,
        "attention_bias": True,
    }
