"""Qwen3-Next: three gated delta nets to one gated attention, mixtures with a gated shared expert.

transformers `modeling_qwen3_next`; the layers are those of Qwen3.5, their projections joined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unsloth_jax.dims import Params, Parts
from unsloth_jax.layers import Holds, Mixers, Mlp, feed_forward
from unsloth_jax.leaves import linear, linears
from unsloth_jax.models import fields, gemma, glm4, llama, qwen3_5_text, qwen3_moe
from unsloth_jax.models.gemma import norm as norm
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.qwen3_5_text import gguf_shape as gguf_shape
from unsloth_jax.models.qwen3_moe import routed as routed

GGUF_ARCH = "qwen3next"
GGUF_READS = (
    "expert_count", "expert_used_count", "expert_feed_forward_length",
    "expert_shared_feed_forward_length", "ssm.inner_size", qwen3_5_text.TURNED,
    *qwen3_5_text.SIZES.values(),
)  # fmt: skip
to_gguf = qwen3_5_text.factors
MLP, DELTA = f"{LAYERS}.*.mlp", f"{LAYERS}.*.linear_attn"
SHARED, GATE = "shared_expert", "shared_expert_gate"
OWN = (
    "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "shared_expert_intermediate_size",
    *qwen3_5_text.OWN, *fields.EXPERTS,
)  # fmt: skip
ONLY = {"use_sliding_window": (False, None), "sliding_window": (None,)}
COUNTS = dict(
    num_key_value_heads=2, num_experts_per_tok=10, moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)  # fmt: skip
UNREAD = (r"mtp\..*",)  # heads that guess further tokens


@dataclass(frozen=True)
class Config(qwen3_5_text.Config, qwen3_moe.Config):
    shared_width: int = 1  # of the expert that every token goes to


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = qwen3_5_text.DEFAULTS | COUNTS | dict(hf)
    fields.check(hf, OWN, ONLY)
    fields.counts(hf, COUNTS)
    common, bias = fields.sizes(hf), hf.get("attention_bias", False)
    return Config(
        **common,
        rope=qwen3_5_text.quarter(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=(None,) * common["layers"],
        **qwen3_5_text.of_delta_nets(hf),
        **fields.experts(hf, 512),
        expert_width=hf["moe_intermediate_size"],
        shared_width=hf["shared_expert_intermediate_size"],
        renormalized=hf.get("norm_topk_prob", True),
        sparse=qwen3_moe.sparse(hf),
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    D, keys, values = c.width, c.key_heads * c.key_width, c.value_heads * c.value_width
    out = qwen3_5_text.weights(c)
    dense = [f"{LAYERS}.*.{name}.weight" for name in qwen3_moe.DENSE] if all(c.sparse) else []
    apart = [f"{DELTA}.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")]
    out = {path: entry for path, entry in out.items() if path not in (*dense, *apart)}
    out |= {
        f"{DELTA}.in_proj_qkvz.weight": ((2 * keys + 2 * values, D), ("heads", "width")),
        f"{DELTA}.in_proj_ba.weight": ((2 * c.value_heads, D), ("heads", "width")),
    }
    return out | (_of_mixtures(c) if any(c.sparse) else {})


def _of_mixtures(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    D, F = c.width, c.shared_width
    return qwen3_moe.of_experts(c, MLP) | {
        f"{MLP}.{SHARED}.gate_proj.weight": ((F, D), ("mlp", "width")),
        f"{MLP}.{SHARED}.up_proj.weight": ((F, D), ("mlp", "width")),
        f"{MLP}.{SHARED}.down_proj.weight": ((D, F), ("width", "mlp")),
        f"{MLP}.{GATE}.weight": ((1, D), ("one", "width")),
    }


def layers_of(c: Config, path: str) -> tuple[int, ...]:
    """Numbers of the layers that have this weight."""
    if not path.startswith(f"{MLP}."):
        return qwen3_5_text.layers_of(c, path)
    name = path.removeprefix(f"{MLP}.").split(".")[0]
    mixed = name in ("gate", "experts", SHARED, GATE)
    return tuple(i for i, sparse in enumerate(c.sparse) if sparse == mixed)


def kinds(c: Config) -> tuple[tuple[bool, bool], ...]:
    """What is static about each layer: whether it is a delta net, whether it is a mixture."""
    return tuple(zip(c.delta, c.sparse, strict=True))


def holds(c: Config, kind: tuple[bool, bool]) -> Holds:
    """What a cache holds of a layer."""
    return qwen3_5_text.holds(c, kind[0])


def projected(c: Config, a: Params, y: Float[Array, "B T D"]) -> list[Array]:
    """Queries, keys and values side by side, their gate, b and a: [B, T, -1] each.

    Each of the two projections has a key head's parts together, then those of the next.
    """
    each = c.value_heads // c.key_heads
    by_head = lambda x: x.reshape(*y.shape[:2], c.key_heads, -1)
    qkvz, ba = map(by_head, linears((a["in_proj_qkvz"], a["in_proj_ba"]), y))
    ends = (c.key_width, 2 * c.key_width, 2 * c.key_width + each * c.value_width)
    parts = [*jnp.split(qkvz, ends, axis=-1), *jnp.split(ba, 2, axis=-1)]
    q, k, v, z, b, a_ = (x.reshape(*y.shape[:2], -1) for x in parts)
    return [jnp.concatenate((q, k, v), axis=-1), z, b, a_]


def moe(c: Config, node: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The experts that the router chose and the shared one, as much of it as its gate lets."""
    routed = qwen3_moe.moe(c, qwen3_moe.NAMES, node, x)
    return routed + jax.nn.sigmoid(linear(node[GATE], x)) * feed_forward(
        node[SHARED], x, c.activation
    )


def block(
    c: Config,
    kind: tuple[bool, bool],
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Mixers,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    delta, sparse = kind
    if delta:
        mix = lambda y: qwen3_5_text.delta_net(c, w["linear_attn"], y, attend, projected)
    else:
        mix = lambda y: qwen3_5_text.gated_attention(c, w["self_attn"], y, by["all"], attend)
    mixed = (lambda node, y, _: mlp(node, y, partial(moe, c))) if sparse else mlp
    return llama.pre_normed(c, w, x, mix, mixed, gemma.unit)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {
        "expert_feed_forward_length": c.expert_width,
        "expert_shared_feed_forward_length": c.shared_width,
    } | qwen3_5_text.delta_keys(c)


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return qwen3_5_text.delta_fixed(c) | qwen3_moe.gguf_fixed(c)


def gguf_parts(c: Config, name: str, shape: tuple[int, ...]) -> Parts:
    """Queries, keys and values in one tensor, their gate in another: name -> (shape, its rows)."""
    if not name.endswith(".in_proj_qkvz.weight"):
        return {}
    values = c.value_heads // c.key_heads * c.value_width
    ends = np.cumsum([c.key_width, c.key_width, values])

    def cut(w: np.ndarray) -> list[np.ndarray]:
        each = np.split(w.reshape(c.key_heads, -1, c.width), ends, axis=1)
        return [rows.reshape(-1, c.width) for rows in each]

    return {
        name.replace("qkvz", "qkv"): ((c.channels, c.width), lambda w: np.concatenate(cut(w)[:3])),
        name.replace("qkvz", "z"): ((c.value_heads * c.value_width, c.width), lambda w: cut(w)[3]),
    }


def from_gguf_parts(c: Config, name: str, parts: list[np.ndarray]) -> np.ndarray:
    """`in_proj_qkvz` of its two parts."""
    by_head = lambda w: w.reshape(c.key_heads, -1, c.width)
    keys = c.key_heads * c.key_width
    each = [*np.split(parts[0], (keys, 2 * keys)), parts[1]]
    return np.concatenate([by_head(w) for w in each], axis=1).reshape(-1, c.width)


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    experts, chosen, width, shared, inner = (values[key] for key in GGUF_READS[:5])
    sizes = {name: values[key] for name, key in qwen3_5_text.SIZES.items()}
    return (
        glm4.from_gguf(values, names, rope)
        | sizes
        | {
            "linear_value_head_dim": inner // max(1, sizes["linear_num_value_heads"]),
            "num_experts": experts,
            "num_experts_per_tok": chosen,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": shared,
            "norm_topk_prob": True,
        }
    )
