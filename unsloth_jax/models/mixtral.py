"""Mixtral: Mistral's attention, a mixture of experts in every layer (arXiv:2401.04088)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import GGUF_ARCH as GGUF_ARCH
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import gguf_keys as gguf_keys
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.llama import to_gguf as to_gguf
from unsloth_jax.models.qwen3_moe import Config, moe, of_experts
from unsloth_jax.models.qwen3_moe import routed as routed

GGUF_READS = ("expert_count", "expert_used_count")
NAMES = "w1", "w3", "w2"  # gate, up, down
# Noise on what routers read, which transformers adds in training alone.
ONLY = {"router_jitter_noise": (0, 0.0, None)}


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5} | dict(hf)
    fields.check(hf, ("sliding_window", *fields.EXPERTS), ONLY)
    common = fields.sizes({"num_key_value_heads": 8} | hf)
    own = {"max_position_embeddings": 4096 * 32, "rope_theta": 1e6}
    return Config(
        **common,
        rope=fields.rope(own | hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows=(hf.get("sliding_window"),) * common["layers"],
        **fields.experts(hf, 8),
        expert_width=common["mlp_width"],
        sparse=(True,) * common["layers"],
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    attention = {n: m for n, m in llama.matrices(c).items() if n.startswith("self_attn")}
    return llama.weights(c, attention) | of_experts(c, f"{LAYERS}.*.block_sparse_moe", NAMES)


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
    mix = lambda y: llama.attention(c, w["self_attn"], y, by["all"], attend, window)
    mixed = lambda node, y, _: mlp(node, y, partial(moe, c, NAMES))
    return llama.pre_normed(c, w | {"mlp": w["block_sparse_moe"]}, x, mix, mixed)


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    experts, chosen = (values[key] for key in GGUF_READS)
    return {"num_local_experts": experts, "num_experts_per_tok": chosen, "sliding_window": None}
