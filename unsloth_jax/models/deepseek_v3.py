"""DeepSeek-V3, V3.1, R1 and Moonlight: keys and values from a latent vector (arXiv:2412.19437).

Multi-head latent attention is DeepSeek-V2's (arXiv:2405.04434); transformers
`modeling_deepseek_v3`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unsloth_jax import rope
from unsloth_jax.dims import Params, Parts
from unsloth_jax.layers import Attend, Mlp, feed_forward, rms_norm
from unsloth_jax.leaves import linear, linears
from unsloth_jax.models import fields, glm4_moe, llama
from unsloth_jax.models.glm4_moe import ONLY, Mixed, by_kind, experts_of, given, mixed, mlps
from unsloth_jax.models.glm4_moe import kinds as kinds
from unsloth_jax.models.glm4_moe import layers_of as layers_of
from unsloth_jax.models.glm4_moe import unused as unused
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "deepseek2"
LOG_MUL, ATTENTION = "rope.scaling.yarn_log_multiplier", "rope.scaling.attn_factor"
# Config's field -> the file's key.
SIZES = dict(
    kv_lora_rank="attention.kv_lora_rank", qk_rope_head_dim="rope.dimension_count",
    v_head_dim="attention.value_length_mla",
)  # fmt: skip
GGUF_READS = (
    *(key for key in glm4_moe.GGUF_READS if not key.startswith("rope.")), *SIZES.values(),
    "attention.key_length", "attention.value_length", "attention.key_length_mla",
    "attention.q_lora_rank", LOG_MUL, ATTENTION,
)  # fmt: skip
DEFAULTS = dict(
    moe_intermediate_size=2048, num_experts_per_tok=8, n_routed_experts=256, n_group=8,
    topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5, kv_lora_rank=512,
    qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=4096,
)  # fmt: skip
OWN = (
    "attention_bias", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
    "v_head_dim", "qk_head_dim", "rope_interleave",
    # How experts are spread over devices and balanced in training, in DeepSeek's own programs.
    "ep_size", "aux_loss_alpha", "seq_aux",
)  # fmt: skip
KNOWN = ONLY | {
    "moe_layer_freq": (1, None),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
}
EPS = 1e-6  # of the latent vectors' norms, whatever the config says


@dataclass(frozen=True)
class Config(Mixed):
    query_rank: int | None = None  # width of the vector that queries are made of, if there is one
    latent: int = 1  # width of the vector that keys and values are made of
    v_width: int = 1
    pairs: bool = True  # whether neighbouring elements turn, and not halves
    score_scale: float = 1.0  # of queries times keys

    @property
    def plain(self) -> int:
        """The width of a head's part that is not turned, its first one."""
        return self.head_width - self.rope.width


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    rank = hf.get("q_lora_rank", 1536)
    hf = DEFAULTS | given(hf)
    turned, width = hf["qk_rope_head_dim"], hf["qk_rope_head_dim"] + hf["qk_nope_head_dim"]
    hf = {"head_dim": turned, "qk_head_dim": width} | hf
    fields.check(hf, (*OWN, *glm4_moe.OWN), KNOWN)
    common = fields.sizes(hf)
    _heads(hf, common)
    bias, turns = hf.get("attention_bias", False), fields.rope(hf, turned)
    return Config(
        **common | dict(head_width=width),
        **mixed(hf, common["layers"]),
        rope=turns,
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=(None,) * common["layers"],
        query_rank=rank,
        latent=hf["kv_lora_rank"],
        v_width=hf["v_head_dim"],
        pairs=hf.get("rope_interleave", True),
        score_scale=width**-0.5 * fields.yarn_growth(hf, turns.factor) ** 2,
    )


def _heads(hf: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    turned, plain = hf["qk_rope_head_dim"], hf["qk_nope_head_dim"]
    if common["heads"] != common["kv_heads"]:
        raise ValueError(
            f"num_key_value_heads={common['kv_heads']} with num_attention_heads={common['heads']}: "
            "expected as many, since each head's keys are made of the latent vector"
        )
    if (hf["head_dim"], hf["qk_head_dim"]) != (turned, turned + plain):
        raise ValueError(
            f"head_dim={hf['head_dim']} and qk_head_dim={hf['qk_head_dim']}: expected "
            f"qk_rope_head_dim={turned}, and that plus qk_nope_head_dim={plain}"
        )


def matrices(c: Config) -> llama.Matrices:
    """Name within a layer's attention -> (shape, logical axes, whether it has a bias)."""
    D, H, K, R = c.width, c.heads, c.kv_heads, c.query_rank
    both = K * (c.plain + c.v_width)
    queries: dict = {"q_proj": ((H * c.head_width, D), ("heads", "width"), False)}
    if R is not None:
        queries = {
            "q_a_proj": ((R, D), ("latent", "width"), c.qkv_bias),
            "q_b_proj": ((H * c.head_width, R), ("heads", "latent"), False),
        }
    own = queries | {
        "kv_a_proj_with_mqa": ((c.latent + c.rope.width, D), ("latent", "width"), c.qkv_bias),
        "kv_b_proj": ((both, c.latent), ("kv_heads", "latent"), False),
        "o_proj": ((D, H * c.v_width), ("width", "heads"), c.o_bias),
    }
    return {f"self_attn.{name}": matrix for name, matrix in own.items()}


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    widths = {"kv_a_layernorm": c.latent} | (
        {"q_a_layernorm": c.query_rank} if c.query_rank else {}
    )
    norms = {f"{LAYERS}.*.self_attn.{n}.weight": ((w,), ("latent",)) for n, w in widths.items()}
    return llama.weights(c, matrices(c) | mlps(c)) | norms | experts_of(c)


def attention(c: Config, a: Params, y: Float[Array, "B T D"], by: rope.Angles, attend: Attend):
    """A layer's attention of y [B, T, D], and what `attend` kept.

    The last part of a head is turned; of keys it is one for all heads.
    """
    heads = lambda x: x.reshape(*y.shape[:2], c.heads, -1)
    unit = lambda name, x: rms_norm(a[name]["weight"], x, EPS)
    turn = lambda x: (rope.rotate_pairs if c.pairs else rope.rotate)(x, by)
    first = "q_proj" if c.query_rank is None else "q_a_proj"
    q, low = linears((a[first], a["kv_a_proj_with_mqa"]), y)
    if c.query_rank is not None:
        q = linear(a["q_b_proj"], unit("q_a_layernorm", q))
    q_plain, q_turned = jnp.split(heads(q), [c.plain], axis=-1)
    latent, k_turned = jnp.split(low, [c.latent], axis=-1)
    k_plain, v = jnp.split(
        heads(linear(a["kv_b_proj"], unit("kv_a_layernorm", latent))), [c.plain], axis=-1
    )
    k_turned = turn(k_turned[:, :, None])
    q = jnp.concatenate([q_plain, turn(q_turned)], -1)
    k = jnp.concatenate([k_plain, jnp.broadcast_to(k_turned, q_turned.shape)], -1)
    q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), "qkv", strict=True))
    y, kept = attend(q, k, v, scale=c.score_scale, window=None)
    return linear(a["o_proj"], y), kept


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
    mix = lambda y: attention(c, w["self_attn"], y, by["all"], attend)
    return llama.pre_normed(c, w, x, mix, by_kind(c, sparse, mlp))


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    rank = {} if c.query_rank is None else {"q_lora_rank": c.query_rank}
    return {
        "leading_dense_block_count": c.sparse.count(False),
        "vocab_size": c.vocab,
        **rank,
        "kv_lora_rank": c.latent,
        "key_length_mla": c.head_width,
        "value_length_mla": c.v_width,
        "expert_feed_forward_length": c.expert_width,
        "expert_shared_count": c.shared,
        "expert_weights_scale": c.route_scale,
        **({"expert_weights_norm": True} if c.renormalized else {}),
        "rope_dimension_count": c.rope.width,
    } | _yarn_keys(c)


def _yarn_keys(c: Config) -> dict[str, float]:
    """What makes llama.cpp's yarn turn and scale as this model's does.

    It multiplies cos and sin by `rope_scaling_attn_factors` (times 1 + 0.1 ln factor where the
    other key is missing or 0), and scores by that and 1 + ln factor times the other key, squared.
    """
    if c.rope.kind != "yarn":
        return {}
    growth, attention = 0.1 * math.log(c.rope.factor), c.rope.attention_factor
    own = math.sqrt(c.score_scale * math.sqrt(c.head_width)) / attention
    if math.isclose(own, 1.0, rel_tol=1e-9):
        keys, turned = {}, 1 + growth
    else:
        keys, turned = {"rope_scaling_yarn_log_mul": 0.1 * (own - 1) / growth}, 1.0
    if math.isclose(attention, turned, rel_tol=1e-6):
        return keys
    return keys | {"rope_scaling_attn_factors": attention / turned}


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    # It knows models whose queries have no vector of their own by these.
    lite = c.layers in (26, 27) or (c.layers, c.vocab) == (48, 128256)
    scaled = c.rope.kind == "yarn" or c.score_scale == c.head_width**-0.5
    return {
        "rope_interleave": (c.pairs, True),
        f"{c.layers} layers and q_lora_rank null": (c.query_rank is None, lite),
        "a factor of yarn beyond 1": (c.rope.kind != "yarn" or c.rope.factor > 1, True),
        "mscale_all_dim without yarn": (not scaled, False),
        "a shared expert": (c.shared > 0, True),
    } | glm4_moe.gguf_fixed(c)


def gguf_told(c: Config) -> list[str]:
    """What a file's user should know."""
    if c.eps == EPS:
        return []
    return [
        f"llama.cpp norms the latent vectors with rms_norm_eps={c.eps}, transformers with {EPS}"
    ]


def gguf_parts(c: Config, name: str, shape: tuple[int, ...]) -> Parts:
    """Keys' and values' part of `kv_b_proj`: [H, latent, plain] and [H, value, latent]."""
    if not name.endswith(".kv_b_proj.weight"):
        return {}
    H, R, plain = c.kv_heads, c.latent, c.plain
    heads = lambda w: w.reshape(H, -1, R)
    named = lambda new: name.replace("kv_b_proj", new)
    return {
        named("k_b_proj"): ((H, R, plain), lambda w: heads(w)[:, :plain].swapaxes(1, 2)),
        named("v_b_proj"): ((H, c.v_width, R), lambda w: heads(w)[:, plain:]),
    }


def from_gguf_parts(c: Config, name: str, parts: list[np.ndarray]) -> np.ndarray:
    """`kv_b_proj` of the keys' part and the values'."""
    keys, values = parts
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, c.latent)


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    sizes = {name: values[key] for name, key in SIZES.items()}
    turned = sizes["qk_rope_head_dim"]
    # llama.cpp takes a file without this one for DeepSeek-V2's, which scores by softmax.
    scored = {"expert_gating_func": values["expert_gating_func"]}
    stated = {"expert_weights_norm": False} | dict(values) | scored
    return (
        glm4_moe.mixture_of(stated)
        | sizes
        | {
            "attention_bias": False,
            "head_dim": turned,
            "qk_nope_head_dim": values["attention.key_length_mla"] - turned,
            "num_key_value_heads": values["attention.head_count"],
            "q_lora_rank": values.get("attention.q_lora_rank"),
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "rope_parameters": rope | (_yarn_fields(values, rope) if "factor" in rope else {}),
        }
    )


def _yarn_fields(values: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, float]:
    """What `_yarn_keys` made these keys of."""
    if rope["rope_type"] != "yarn":
        return {}
    growth = 0.1 * math.log(rope["factor"])
    turned, by = values.get(ATTENTION, 1.0), values.get(LOG_MUL, 0.0) / 0.1
    if by and turned == 1:
        return {"mscale": by, "mscale_all_dim": by}
    attention = turned if by else turned * (1 + growth)
    own = (1 + by * growth) * attention
    scores = {} if math.isclose(own, 1.0, rel_tol=1e-6) else {"mscale_all_dim": (own - 1) / growth}
    return {"attention_factor": attention} | scores
