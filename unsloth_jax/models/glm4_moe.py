"""GLM-4.5, 4.5-Air and 4.6: half of each head turns, experts by groups and one for all tokens.

arXiv:2508.06471; the mixture is DeepSeek-V3's (arXiv:2412.19437).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.experts import gated, mixture, router_scores, sigmoid_route
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, glm4, llama, qwen3, qwen3_moe
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.qwen3_moe import DENSE, NAMES

GGUF_ARCH = "glm4moe"
GGUF_READS = (
    "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count",
    "expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count",
    "expert_gating_func", "expert_weights_scale", "expert_weights_norm", "rope.dimension_count",
)  # fmt: skip
SIGMOID = 2  # llama.cpp's number of this way to weigh experts

DEFAULTS = dict(
    moe_intermediate_size=1408, num_experts_per_tok=8, n_routed_experts=128,
    num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072,
)  # fmt: skip
OWN = (
    "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace",
    "routed_scaling_factor", "norm_topk_prob", "num_experts_per_tok", "moe_intermediate_size",
    "output_router_logits",
)  # fmt: skip
# Layers after the last one predict further tokens in other programs; transformers drops them too.
ONLY = {"num_nextn_predict_layers": (0, 1, None), "num_mtp_layers": (0, 1, None)}


@dataclass(frozen=True)
class Mixed(qwen3_moe.Config):
    """What DeepSeek-V3 and its followers have in common."""

    shared: int = 1  # experts' widths that all tokens pass through
    groups: int = 1
    kept_groups: int = 1  # groups that a token's experts are chosen from
    route_scale: float = 1.0


@dataclass(frozen=True)
class Config(Mixed):
    qk_norm: bool = False


def given(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those that are null, for families where that means the default."""
    return {name: value for name, value in hf.items() if value is not None}


def mixed(hf: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """DeepSeek-V3's kind of mixture in the core's words.

    Raises ValueError where a token can't go to so many experts of so many groups.
    """
    E, groups, kept = hf["n_routed_experts"], hf.get("n_group", 1), hf.get("topk_group", 1)
    chosen, first = hf["num_experts_per_tok"], hf.get("first_k_dense_replace", 1)
    if E % groups or E < 2 * groups or kept > groups or chosen > kept * (E // groups):
        raise ValueError(
            f"n_routed_experts={E} in n_group={groups}, topk_group={kept}, num_experts_per_tok="
            f"{chosen}: expected equal groups of 2 or more, and room in a token's groups"
        )
    if isinstance(first, bool) or not isinstance(first, Integral) or first < 0:
        raise ValueError(f"first_k_dense_replace={first!r}, expected a whole number from 0 on")
    return dict(
        experts=E,
        chosen=chosen,
        expert_width=hf["moe_intermediate_size"],
        renormalized=hf.get("norm_topk_prob", True),
        sparse=tuple(i >= first for i in range(layers)),
        shared=hf.get("n_shared_experts", 1),
        groups=groups,
        kept_groups=kept,
        route_scale=float(hf.get("routed_scaling_factor", 1.0)),
    )


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | given(hf)
    if "partial_rotary_factor" not in (hf.get("rope_parameters") or {}):
        hf = {"partial_rotary_factor": 0.5} | hf
    own = ("attention_bias", "use_qk_norm", "partial_rotary_factor", *OWN)
    fields.check(hf, own, ONLY)
    common = fields.sizes(hf)
    return Config(
        **common,
        **mixed(hf, common["layers"]),
        rope=fields.rope(hf, common["head_width"], partial=True),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=hf.get("attention_bias", False),
        o_bias=False,
        mlp_bias=False,
        windows=(None,) * common["layers"],
        qk_norm=hf.get("use_qk_norm", False),
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    attention = {n: m for n, m in llama.matrices(c).items() if n.startswith("self_attn")}
    norms = {
        p: w for p, w in qwen3.weights(c).items() if p.endswith(("q_norm.weight", "k_norm.weight"))
    }
    return llama.weights(c, attention | mlps(c)) | (norms if c.qk_norm else {}) | experts_of(c)


def mlps(c: Mixed) -> llama.Matrices:
    """The MLPs of dense layers, and those that all tokens of a mixture pass through."""
    dense = {} if all(c.sparse) else {name: llama.matrices(c)[name] for name in DENSE}
    every = llama.matrices(replace(c, mlp_width=c.shared * c.expert_width))
    shared = {n.replace("mlp.", "mlp.shared_experts."): every[n] for n in DENSE if any(c.sparse)}
    return dense | shared


def experts_of(c: Mixed) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """The router and the experts, with the correction that balances them."""
    out = qwen3_moe.of_experts(c, f"{LAYERS}.*.mlp")
    correction = {f"{LAYERS}.*.mlp.gate.e_score_correction_bias": ((c.experts,), ("experts",))}
    return out | (correction if any(c.sparse) else {})


def layers_of(c: Mixed, path: str) -> tuple[int, ...]:
    """Numbers of the layers that have this weight."""
    if ".mlp." not in path:
        return tuple(range(c.layers))
    dense = path.endswith(tuple(f".{name}.weight" for name in DENSE))
    return tuple(i for i, sparse in enumerate(c.sparse) if sparse != dense)


def unused(c: Mixed) -> str:
    """Names of files that belong to the layers behind the last one."""
    return rf"model\.layers\.{c.layers}\..*"


def kinds(c: Mixed) -> tuple[bool, ...]:
    """What is static about each layer: whether it is a mixture."""
    return c.sparse


def moe(c: Mixed, node: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The mixture that stands in the MLP's place, and the MLP of all tokens."""
    flat, gate = x.reshape(-1, x.shape[-1]), node["gate"]
    route = sigmoid_route(
        router_scores(gate, flat), gate["e_score_correction_bias"], c.chosen, c.renormalized,
        c.groups, c.kept_groups, c.route_scale,
    )  # fmt: skip
    inner = partial(gated, c.activation)
    y = mixture(node["experts"]["*"], flat, route, NAMES[:2], NAMES[2], inner)
    return y.reshape(x.shape) + feed_forward(node["shared_experts"], x, c.activation)


def by_kind(c: Mixed, sparse: bool, mlp: Mlp) -> Mlp:
    """`mlp`, of a mixture where the layer is one."""
    return (lambda node, y, _: mlp(node, y, partial(moe, c))) if sparse else mlp


def block(
    c: Config,
    sparse: bool,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    a = w["self_attn"]
    norms = (lambda x, name: llama.unit(c, a[name], x)) if c.qk_norm else None
    mix = lambda y: llama.attention(c, a, y, by["all"], attend, None, norms=norms)
    return llama.pre_normed(c, w, x, mix, by_kind(c, sparse, mlp))


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {
        "rope_dimension_count": c.rope.width,
        "expert_feed_forward_length": c.expert_width,
        "expert_shared_count": c.shared,
        "leading_dense_block_count": c.sparse.count(False),
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": c.route_scale,
        "expert_weights_norm": c.renormalized,
        "nextn_predict_layers": 0,
    }


def gguf_fixed(c: Mixed) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    # It stops at several groups of which none is left out.
    kept = c.kept_groups < c.groups or c.groups == 1
    return {"mixtures of experts": (any(c.sparse), True), "groups left out": (kept, True)}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return (
        mixture_of(values)
        | glm4.from_gguf(values, names, rope)
        | {
            "use_qk_norm": f"{LAYERS}.0.self_attn.q_norm.weight" in names,
        }
    )


def mixture_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's fields of DeepSeek-V3's kind of mixture."""
    if values.get("expert_gating_func", SIGMOID) != SIGMOID:
        raise ValueError(
            f"expert_gating_func is {values['expert_gating_func']!r}; only {SIGMOID} is supported"
        )
    return {
        "n_routed_experts": values["expert_count"],
        "num_experts_per_tok": values["expert_used_count"],
        "n_group": values.get("expert_group_count", 1),
        "topk_group": values.get("expert_group_used_count", 1),
        "moe_intermediate_size": values["expert_feed_forward_length"],
        "n_shared_experts": values["expert_shared_count"],
        "first_k_dense_replace": values["leading_dense_block_count"],
        "routed_scaling_factor": values["expert_weights_scale"],
        "norm_topk_prob": values["expert_weights_norm"],
    }
