"""Llama 4's text model: chunked attention, layers without positions, one shared expert a layer.

transformers `modeling_llama4`; queries that grow with their position: arXiv:2501.19399.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unsloth_jax import rope
from unsloth_jax.dims import Params
from unsloth_jax.experts import Route, gated, mixture, router_scores
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm
from unsloth_jax.models import fields, llama, smollm3
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "llama4"
GGUF_READS = (
    "expert_count", "expert_used_count", "interleave_moe_layer_step", "expert_feed_forward_length"
)  # fmt: skip
LARGEST = 128  # experts of the model whose queries and keys llama.cpp does not norm
MLP = f"{LAYERS}.*.feed_forward"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
TRANSPOSED = tuple(f"{MLP}.experts.{name}" for name in (GATE_UP, DOWN))
OWN = (
    "attention_bias", "attention_chunk_size", "attn_scale", "attn_temperature_tuning",
    "floor_scale", "interleave_moe_layer_step", "intermediate_size_mlp", "layer_types",
    "moe_layers", "no_rope_layer_interval", "no_rope_layers", "num_experts_per_tok",
    "num_local_experts", "use_qk_norm",
    # For losses and samplers; the noise on routers is nowhere drawn.
    "cache_implementation", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
)  # fmt: skip
ONLY = {"for_llm_compressor": (False, None)}
DEFAULTS = dict(
    num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=4096 * 32,
    num_experts_per_tok=1, intermediate_size_mlp=16384, attention_chunk_size=8192,
    attn_temperature_tuning=True, floor_scale=8192, attn_scale=0.1, use_qk_norm=True,
)  # fmt: skip


class Kind(NamedTuple):
    """What is static about a layer."""

    turned: bool  # has rope; else its queries grow
    chunked: bool
    sparse: bool  # is a mixture


@dataclass(frozen=True)
class Config(llama.Config):
    experts: int = 1
    chosen: int = 1  # experts of a token
    dense_width: int = 1  # of the MLP in layers that are no mixture
    normed: bool = True  # whether queries and keys are, where they have rope
    growth: float | None = None  # of queries without rope, by the logarithm of their position
    floor: int | None = None  # tokens to each step of that growth
    turned: tuple[bool, ...] = ()
    chunked: tuple[bool, ...] = ()
    sparse: tuple[bool, ...] = ()


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    if "rope_theta" not in (hf.get("rope_parameters") or {}):
        hf = {"rope_theta": 5e5} | hf
    fields.check(hf, OWN, ONLY)
    common = fields.sizes(hf)
    turned = smollm3.turned(hf | {"no_rope_layers": hf.get("no_rope_layers") or None})
    chunked = _chunked(hf, turned)
    bias = hf.get("attention_bias", False)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=(None,) * common["layers"],
        chunk=hf["attention_chunk_size"] if any(chunked) else None,
        **fields.experts(hf, 16),
        dense_width=hf["intermediate_size_mlp"],
        normed=hf["use_qk_norm"],
        growth=float(hf["attn_scale"]) if hf["attn_temperature_tuning"] else None,
        floor=hf["floor_scale"] if hf["attn_temperature_tuning"] else None,
        turned=turned,
        chunked=chunked,
        sparse=_sparse(hf),
    )


def _chunked(hf: Mapping[str, Any], turned: tuple[bool, ...]) -> tuple[bool, ...]:
    """Whether each layer's attention is: by `layer_types`, or where it has rope."""
    known = ("chunked_attention", "full_attention")
    kinds = hf.get("layer_types")
    kinds = [known[0] if on else known[1] for on in turned] if kinds is None else kinds
    if len(kinds) != len(turned) or not set(kinds) <= set(known):
        raise ValueError(f"layer_types must be {len(turned)} of {known}, got {kinds}")
    if known[0] in kinds and hf["attention_chunk_size"] is None:
        raise ValueError(
            f"attention_chunk_size=None with layer_types {kinds}: expected a whole number over 0"
        )
    return tuple(kind == known[0] for kind in kinds)


def _sparse(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer is a mixture: those in `moe_layers`, or each so many-th."""
    layers, given = range(hf["num_hidden_layers"]), hf.get("moe_layers")
    if given is None:
        step = hf.get("interleave_moe_layer_step", 1)
        return tuple((i + 1) % step == 0 for i in layers)
    if not isinstance(given, list | tuple) or not set(given) <= set(layers):
        raise ValueError(f"moe_layers={given!r}, expected numbers of the {len(layers)} layers")
    return tuple(i in given for i in layers)


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    inner = {n: m for n, m in llama.matrices(c).items() if n.startswith("self_attn")}
    if not all(c.sparse):
        inner |= _mlp("feed_forward", c.width, c.dense_width)
    if any(c.sparse):
        inner |= _mlp("feed_forward.shared_expert", c.width, c.mlp_width)
    return llama.weights(c, inner) | (_of_experts(c) if any(c.sparse) else {})


def _mlp(node: str, D: int, F: int) -> llama.Matrices:
    up, down = ((F, D), ("mlp", "width"), False), ((D, F), ("width", "mlp"), False)
    return {f"{node}.gate_proj": up, f"{node}.up_proj": up, f"{node}.down_proj": down}


def _of_experts(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    E, D, F = c.experts, c.width, c.mlp_width
    return {
        f"{MLP}.router.weight": ((E, D), ("experts", "width")),
        f"{MLP}.experts.{GATE_UP}": ((E, 2 * F, D), ("experts", "mlp", "width")),
        f"{MLP}.experts.{DOWN}": ((E, D, F), ("experts", "width", "mlp")),
    }


def layers_of(c: Config, path: str) -> tuple[int, ...]:
    """Numbers of the layers that have this weight."""
    if not path.startswith(MLP):
        return tuple(range(c.layers))
    mixed = path.removeprefix(f"{MLP}.").split(".")[0] in ("router", "experts", "shared_expert")
    return tuple(i for i, sparse in enumerate(c.sparse) if sparse == mixed)


def kinds(c: Config) -> tuple[Kind, ...]:
    """What is static about each layer."""
    return tuple(map(Kind, c.turned, c.chunked, c.sparse))


def angles(c: Config, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> dict[str, Any]:
    """cos and sin, and the factor of queries without them, float32 [B, T, 1, 1] or None."""
    turns = llama.angles(c, positions, lengths)
    if c.growth is None:
        return turns | {"queries": None}
    steps = ((positions + 1) // c.floor).astype(jnp.float32)
    return turns | {"queries": (1 + c.growth * jnp.log1p(steps))[..., None, None]}


def attention(
    c: Config, kind: Kind, a: Params, y: Float[Array, "B T D"], by: dict[str, Any], attend: Attend
):
    """A layer's attention of y, and what `attend` kept."""
    attend = partial(attend, chunk=c.chunk) if kind.chunked else attend
    if not kind.turned:
        return llama.attention(c, a, y, None, attend, None, query_scale=by["queries"])
    if not c.normed:
        return llama.attention(c, a, y, by["all"], attend, None, turn=rope.rotate_pairs)
    ones = jnp.ones(c.head_width, y.dtype)
    turn = lambda x, by: rms_norm(ones, rope.rotate_pairs(x, by), c.eps)
    # Of no weight and after the rotation; named, so that what it takes is kept and not its result.
    as_it_is = lambda x, name: x
    return llama.attention(c, a, y, by["all"], attend, None, norms=as_it_is, turn=turn)


def moe(c: Config, node: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The shared expert and those chosen by the router, which sees a sigmoid of its own scores.

    The weight multiplies what an expert takes, not what it gives.
    """
    flat = x.reshape(-1, x.shape[-1])
    best, chosen = jax.lax.top_k(router_scores(node["router"], flat), c.chosen)
    route = Route(chosen, jax.nn.sigmoid(best))
    own = {name: {"weight": w} for name, w in node["experts"].items()}
    inner = lambda both: gated(c.activation, jnp.split(both[0], 2, axis=-1))
    routed = mixture(own, flat, route, (GATE_UP,), DOWN, inner, weigh_inputs=True)
    return feed_forward(node["shared_expert"], x, c.activation) + routed.reshape(x.shape)


def block(
    c: Config,
    kind: Kind,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    mix = lambda y: attention(c, kind, w["self_attn"], y, by, attend)
    mixed = (lambda node, y, _: mlp(node, y, partial(moe, c))) if kind.sparse else mlp
    return llama.pre_normed(c, w | {"mlp": w["feed_forward"]}, x, mix, mixed)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    own = {"interleave_moe_layer_step": _step(c), "expert_feed_forward_length": c.mlp_width}
    return llama.gguf_keys(c) | own


def _step(c: Config) -> int:
    """Each so many-th layer is a mixture, by the first of them."""
    return c.sparse.index(True) + 1 if any(c.sparse) else 1


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    each = lambda step: tuple((i + 1) % step == 0 for i in range(c.layers))
    by_four = tuple(not full for full in each(4))
    return {
        "layers with rope": (c.turned, by_four),
        # Only such layers use what queries are scaled by; unused, it has no memory to be put in.
        "a layer without rope": (not all(c.turned), True),
        "layers with chunks": (c.chunked, by_four),
        "attention_chunk_size": (c.chunk, 8192),
        "attn_scale and floor_scale": ((c.growth, c.floor), (0.1, 8192)),
        "use_qk_norm": (c.normed, c.experts != LARGEST),
        "mixtures of experts": (c.sparse, each(_step(c))),
    }


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    experts, chosen, step, width = (values[key] for key in GGUF_READS)
    # What no key says is as llama.cpp has it: see `gguf_fixed`.
    return {
        "attention_bias": llama.from_gguf(values, names, rope)["attention_bias"],
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "interleave_moe_layer_step": step,
        "intermediate_size": width,
        "intermediate_size_mlp": values["feed_forward_length"],
        "use_qk_norm": experts != LARGEST,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
    }
