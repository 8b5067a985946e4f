"""Qwen3-MoE: Qwen3's attention, a mixture of experts in the MLP's place (arXiv:2505.09388)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.experts import Spread, gated, mixture, router_scores, softmax_route, spread
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, llama, qwen2, qwen3
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "qwen3moe"
GGUF_READS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
Names = tuple[str, str, str]
NAMES: Names = ("gate_proj", "up_proj", "down_proj")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OWN = (
    "attention_bias", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", *qwen2.OWN,
    *fields.EXPERTS,
)  # fmt: skip
DEFAULTS = dict(moe_intermediate_size=768, num_experts_per_tok=8, sliding_window=4096)


@dataclass(frozen=True)
class Config(llama.Config):
    experts: int = 1
    chosen: int = 1  # experts of a token
    expert_width: int = 1
    renormalized: bool = True  # whether a token's weights have a sum of 1
    sparse: tuple[bool, ...] = ()  # whether each layer is a mixture


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    fields.check(hf, own=OWN)
    common = fields.sizes(hf)
    bias = hf.get("attention_bias", False)
    return Config(
        **common,
        rope=fields.rope({"max_position_embeddings": 32768} | dict(hf), common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=windows(hf, common["layers"]),
        **fields.experts(hf, 128),
        expert_width=hf["moe_intermediate_size"],
        renormalized=hf.get("norm_topk_prob", False),
        sparse=sparse(hf),
    )


def windows(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """One window for all layers or none: transformers' `qwen3_moe` reads no max_window_layers.

    Raises ValueError for layer_types that say otherwise.
    """
    window = hf["sliding_window"] if hf.get("use_sliding_window") else None
    alike = (window is not None,) * layers
    if hf.get("layer_types") is not None and fields.sliding_layers(hf, layers, 0) != alike:
        raise ValueError(
            f"layer_types={hf['layer_types']} with a window of {window}: expected all layers alike"
        )
    return (window,) * layers


def sparse(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer is a mixture: each so many-th, but for those that are named.

    Raises ValueError where these are no numbers.
    """
    step, only = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
    if not all(type(i) is int for i in only):
        raise ValueError(f"mlp_only_layers={only!r}, expected a list of layers' numbers")
    return tuple(i not in only and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"]))


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    dense = {} if all(c.sparse) else {name: llama.matrices(c)[name] for name in DENSE}
    attention = {n: m for n, m in llama.matrices(c).items() if n.startswith("self_attn")}
    norms = {
        f"{LAYERS}.*.self_attn.{name}.weight": ((c.head_width,), ("head_width",))
        for name in ("q_norm", "k_norm")
    }
    return llama.weights(c, attention | dense) | norms | of_experts(c, f"{LAYERS}.*.mlp")


def of_experts(
    c: Config, mlp: str, names: Names = NAMES
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Weights of the router and the experts under the path `mlp`, for `weights`."""
    E, D, F = c.experts, c.width, c.expert_width
    out = {f"{mlp}.gate.weight": ((E, D), ("experts", "width"))} if any(c.sparse) else {}
    for name in names if any(c.sparse) else ():
        down = name == names[2]
        shape, axes = ((E, D, F), ("width", "mlp")) if down else ((E, F, D), ("mlp", "width"))
        out[f"{mlp}.experts.*.{name}.weight"] = (shape, ("experts", *axes))
    return out


def layers_of(c: Config, path: str) -> tuple[int, ...]:
    """Numbers of the layers that have this weight."""
    if ".mlp." not in path:
        return tuple(range(c.layers))
    mixed = ".mlp.gate." in path or ".mlp.experts." in path
    return tuple(i for i, sparse in enumerate(c.sparse) if sparse == mixed)


def kinds(c: Config) -> tuple[tuple[int | None, bool], ...]:
    """What is static about each layer: its sliding window in tokens, whether it is a mixture."""
    return tuple(zip(c.windows, c.sparse, strict=True))


def moe(c: Config, names: Names, node: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The mixture that stands in the MLP's place; `names` are those of gate, up and down."""
    flat = x.reshape(-1, x.shape[-1])
    route = softmax_route(router_scores(node["gate"], flat), c.chosen, c.renormalized)
    experts, inner = node["experts"]["*"], partial(gated, c.activation)
    return mixture(experts, flat, route, names[:2], names[2], inner).reshape(x.shape)


def routed(c: Config, node: Params, x: Float[Array, "B T D"], real: Float[Array, "B T"]) -> Spread:
    """How a mixture spreads the tokens that are `real`."""
    scores = router_scores(node["gate"], x.reshape(-1, x.shape[-1]))
    return spread(scores, softmax_route(scores, c.chosen, True).experts, real.reshape(-1))


def block(
    c: Config,
    kind: tuple[int | None, bool],
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    window, sparse = kind
    c_mlp = (lambda node, y, _: mlp(node, y, partial(moe, c, NAMES))) if sparse else mlp
    return qwen3.block(c, window, w, x, by, attend, c_mlp)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {"expert_feed_forward_length": c.expert_width}


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return {
        "norm_topk_prob": (c.renormalized, True),
        "mixtures of experts": (c.sparse, (True,) * c.layers),
    }


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    experts, chosen, width = (values[key] for key in GGUF_READS)
    return {
        "attention_bias": llama.from_gguf(values, names, rope)["attention_bias"],
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }
