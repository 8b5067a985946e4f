"""Qwen3.5's text model: three gated delta nets to one gated attention (arXiv:2412.06464).

The delta net is Qwen3-Next's with its projections apart; transformers `modeling_qwen3_5`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from unsloth_jax import rope
from unsloth_jax.dims import Params
from unsloth_jax.layers import ACTIVATIONS, Holds, Mixers, Mlp, feed_forward, rms_norm
from unsloth_jax.leaves import linear, linears
from unsloth_jax.models import fields, gemma, glm4, llama
from unsloth_jax.models.gemma import norm as norm
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "qwen35"
# Config's field -> the file's key.
SIZES = dict(
    linear_conv_kernel_dim="ssm.conv_kernel", linear_key_head_dim="ssm.state_size",
    linear_num_key_heads="ssm.group_count", linear_num_value_heads="ssm.time_step_rank",
    full_attention_interval="full_attention_interval",
)  # fmt: skip
SECTIONS_KEY, TURNED = "rope.dimension_sections", "rope.dimension_count"
GGUF_READS = (*SIZES.values(), "ssm.inner_size", TURNED, SECTIONS_KEY)
SECTIONS = (11, 11, 10, 0)  # the converter's, where a config has none
# What the name of a weight in the layers of one kind begins with.
DELTA, ATTENTION = "linear_attn.", "self_attn."
KINDS = ("full_attention", "linear_attention")
OWN = """attention_bias layer_types full_attention_interval partial_rotary_factor
linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
linear_num_value_heads""".split()
DEFAULTS = dict(
    head_dim=256, max_position_embeddings=32768, linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
    linear_num_value_heads=32,
)  # fmt: skip
# What files say of it and transformers does not read: heads that guess further tokens, and values
# that are the only ones there is code for.
OF_GUESSES = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
ONLY = {
    "attn_output_gate": (True,), "output_gate_type": ("swish",), "mamba_ssm_dtype": ("float32",),
    "mlp_only_layers": ([], None),
}  # fmt: skip
SCALARS = ("A_log", "dt_bias")  # one number for each of a delta net's value heads
UNIT_EPS = 1e-6  # under the root of queries' and keys' lengths
# Positions of images; those of text are alike on all three axes, so that neither matters.
OF_IMAGES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Config(llama.Config):
    delta: tuple[bool, ...] = ()  # whether each layer is a delta net
    taps: int = 4
    key_heads: int = 16
    value_heads: int = 32
    key_width: int = 128  # of a delta net's head
    value_width: int = 128
    sections: tuple[int, ...] = ()  # of images' positions, for GGUF alone; empty: not stated

    @property
    def channels(self) -> int:
        """What the convolution sees: queries, keys and values."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"num_key_value_heads": 4} | DEFAULTS | dict(hf)
    fields.check(hf, (*OWN, *OF_GUESSES), ONLY)
    common, bias = fields.sizes(hf), hf.get("attention_bias", False)
    return Config(
        **common,
        rope=_rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        windows=(None,) * common["layers"],
        **of_delta_nets(hf),
    )


def of_delta_nets(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers are delta nets and how wide these are, of a config with DEFAULTS."""
    fields.counts(hf, DEFAULTS)
    if hf["linear_num_value_heads"] % hf["linear_num_key_heads"]:
        raise ValueError(
            f"linear_num_value_heads={hf['linear_num_value_heads']} is no multiple of "
            f"linear_num_key_heads={hf['linear_num_key_heads']}: expected as many values for each"
        )
    return dict(
        delta=_delta(hf, hf["num_hidden_layers"]),
        taps=hf["linear_conv_kernel_dim"],
        key_heads=hf["linear_num_key_heads"],
        value_heads=hf["linear_num_value_heads"],
        key_width=hf["linear_key_head_dim"],
        value_width=hf["linear_value_head_dim"],
        sections=_sections(hf),
    )


def _rope(hf: Mapping[str, Any], width: int) -> rope.Rope:
    given = {name: hf.get(name) for name in ("rope_parameters", "rope_scaling")}
    given = {name: _of_text(r) for name, r in given.items() if isinstance(r, Mapping)}
    return quarter(dict(hf) | given, width)


def quarter(hf: Mapping[str, Any], width: int) -> rope.Rope:
    """Rope of a quarter of each head, unless the config says another share."""
    given = [hf.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    known = any("partial_rotary_factor" in r for r in (hf, *given))
    share = {} if known else {"partial_rotary_factor": 0.25}
    return fields.rope(share | dict(hf), width, partial=True)


def _of_text(r: Mapping[str, Any]) -> dict[str, Any]:
    section = r.get("mrope_section")
    if section is not None and not (isinstance(section, list | tuple) and len(section) == 3):
        raise ValueError(f"rope key mrope_section={section!r}, expected three numbers")
    return {name: value for name, value in r.items() if name not in OF_IMAGES}


def _sections(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """What llama.cpp is told of images' positions, which has a fourth axis."""
    stated = (hf.get("rope_parameters") or hf.get("rope_scaling") or {}).get("mrope_section")
    return (*stated, 0) if stated else ()


def _delta(hf: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    kinds, every = hf.get("layer_types"), hf.get("full_attention_interval") or 4
    if kinds is None:
        kinds = [KINDS[bool((i + 1) % every)] for i in range(layers)]
    wrong = sorted(set(kinds) - set(KINDS))
    if wrong or len(kinds) != layers or KINDS[0] not in kinds:
        raise ValueError(
            f"layer_types must be {layers} of {list(KINDS)}, with a full_attention among them; "
            f"got {len(kinds)} with {wrong or sorted(set(kinds))}"
        )
    return tuple(kind == KINDS[1] for kind in kinds)


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    D, H, values, C = c.width, c.value_heads, c.value_heads * c.value_width, c.channels
    inner = llama.matrices(c)
    # Each head's query is followed by its gate.
    query = ((2 * c.heads * c.head_width, D), ("heads", "width"), c.qkv_bias)
    out = llama.weights(c, inner | {"self_attn.q_proj": query})
    within = {
        f"{ATTENTION}q_norm.weight": ((c.head_width,), ("head_width",)),
        f"{ATTENTION}k_norm.weight": ((c.head_width,), ("head_width",)),
        f"{DELTA}in_proj_qkv.weight": ((C, D), ("heads", "width")),
        f"{DELTA}in_proj_z.weight": ((values, D), ("heads", "width")),
        f"{DELTA}in_proj_b.weight": ((H, D), ("heads", "width")),
        f"{DELTA}in_proj_a.weight": ((H, D), ("heads", "width")),
        f"{DELTA}out_proj.weight": ((D, values), ("width", "heads")),
        f"{DELTA}conv1d.weight": ((C, 1, c.taps), ("heads", "one", "taps")),
        f"{DELTA}norm.weight": ((c.value_width,), ("head_width",)),
        f"{DELTA}A_log": ((H,), ("heads",)),
        f"{DELTA}dt_bias": ((H,), ("heads",)),
    }
    return out | {f"{LAYERS}.*.{name}": entry for name, entry in within.items()}


def layers_of(c: Config, path: str) -> tuple[int, ...]:
    """Numbers of the layers that have a weight."""
    name = path.removeprefix(f"{LAYERS}.*.")
    has = lambda delta: not name.startswith(ATTENTION if delta else DELTA)
    return tuple(i for i, delta in enumerate(c.delta) if has(delta))


def unused(c: Config) -> str:
    """Names of heads that guess further tokens, and of the tower for images."""
    return r"mtp\..*|model\.visual\..*"


def kinds(c: Config) -> tuple[bool, ...]:
    """What is static about each layer: whether it is a delta net."""
    return c.delta


def holds(c: Config, delta: bool) -> Holds:
    """What a cache holds of a layer."""
    if not delta:
        return Holds()
    return Holds(False, (c.taps - 1, c.channels), (c.value_heads, c.key_width, c.value_width))


def block(
    c: Config,
    delta: bool,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Mixers,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    if delta:
        mix = lambda y: delta_net(c, w["linear_attn"], y, attend)
    else:
        mix = lambda y: gated_attention(c, w["self_attn"], y, by["all"], attend)
    return llama.pre_normed(c, w, x, mix, mlp, gemma.unit)


def gated_attention(c, a: Params, y: Float[Array, "B T D"], by: rope.Angles, attend: Mixers):
    """Attention whose values pass a gate; the query projection makes both, head by head."""
    heads = lambda x: x.reshape(*y.shape[:2], -1, c.head_width)
    q, k, v = linears((a["q_proj"], a["k_proj"], a["v_proj"]), y)
    q, gate = jnp.split(q.reshape(*y.shape[:2], c.heads, -1), 2, axis=-1)
    given = zip((q, heads(k), heads(v)), "qkv", strict=True)
    q, k, v = (checkpoint_name(x, name) for x, name in given)
    q, k = gemma.unit(c, a["q_norm"], q), gemma.unit(c, a["k_norm"], k)
    q, k, scale = rope.rotate(q, by), rope.rotate(k, by), c.head_width**-0.5
    x, kept = attend(q, k, v, scale=scale, window=None, cap=c.attention_cap)
    return linear(a["o_proj"], x * jax.nn.sigmoid(gate.reshape(x.shape))), kept


def projected(c: Config, a: Params, y: Float[Array, "B T D"]) -> list[Array]:
    """Queries, keys and values side by side, their gate, b and a: [B, T, -1] each."""
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    return linears([a[name] for name in names], y)


def delta_net(
    c: Config,
    a: Params,
    y: Float[Array, "B T D"],
    attend: Mixers,
    project: Callable[[Config, Params, Array], list[Array]] = projected,
):
    """A gated delta net of y [B, T, D], and what `attend` kept.

    decay = -e^A_log softplus(a + dt_bias), beta = sigmoid(b); queries and keys have length 1.
    """
    qkv, z, b, a_ = project(c, a, y)
    qkv, tail = attend.convolve(qkv, a["conv1d"]["weight"], None)
    keys = c.key_heads * c.key_width
    parts = jnp.split(ACTIVATIONS[c.activation](qkv), (keys, 2 * keys), axis=-1)
    widths = (c.key_width, c.key_width, c.value_width)
    q, k, v = (x.reshape(*y.shape[:2], -1, h) for x, h in zip(parts, widths, strict=True))
    whole = lambda x: x.astype(jnp.float32)[None, None]
    decay = -jnp.exp(whole(a["A_log"])) * jax.nn.softplus(
        a_.astype(jnp.float32) + whole(a["dt_bias"])
    )
    beta = jax.nn.sigmoid(b).astype(jnp.float32)
    x, state = attend.recur(_unit(q) * c.key_width**-0.5, _unit(k), v, decay, beta)
    x = gated_norm(c, a["norm"]["weight"], x, z.reshape(x.shape))
    return linear(a["out_proj"], x.reshape(*y.shape[:2], -1)), tail | state


def _unit(x):
    """Each head over its length, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + UNIT_EPS)


def gated_norm(
    c: Config, w: Float[Array, " h"], x: Float[Array, "B T H h"], gate: Float[Array, "B T H h"]
) -> Float[Array, "B T H h"]:
    """RMSNorm of each head, times silu(gate) in float32."""
    x = rms_norm(w, x, c.eps).astype(jnp.float32)
    return (x * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return delta_keys(c) | ({} if c.sections else {"rope_dimension_sections": SECTIONS})


def delta_keys(c: Config) -> dict[str, Any]:
    """Keys of the delta nets and of rope's share of a head."""
    return {
        "ssm_conv_kernel": c.taps,
        "ssm_state_size": c.key_width,
        "ssm_group_count": c.key_heads,
        "ssm_time_step_rank": c.value_heads,
        "ssm_inner_size": c.value_heads * c.value_width,
        "full_attention_interval": c.delta.index(False) + 1,
        "rope_dimension_count": c.rope.width,
    }


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    sections = c.sections or SECTIONS
    # A frequency that no section has is not turned at all.
    turned = [i < 3 * sections[i % 3] for i in range(c.rope.width // 2)]
    return delta_fixed(c) | {
        "frequencies beyond mrope_section": (turned.count(False), 0),
        # ggml aborts where they are more than a head has numbers.
        "frequencies in mrope_section beyond head_dim": (max(0, sum(sections) - c.head_width), 0),
    }


def delta_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp's delta nets have one value for: (this model's, that one)."""
    every = c.delta.index(False) + 1
    return {
        "linear_value_head_dim": (c.value_width, c.key_width),
        "delta nets in layers": (c.delta, tuple(bool((i + 1) % every) for i in range(c.layers))),
    }


def gguf_shape(c: Config, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight in a GGUF file."""
    return (shape[0], shape[2]) if path.endswith("conv1d.weight") else shape


def to_gguf(c: Config, path: str, w: np.ndarray) -> np.ndarray:
    """As `factors`, and value heads with those of one key apart, not together."""
    w = factors(c, path, w)
    module = path.split(f".{DELTA}")[-1].removesuffix(".weight")
    if module == "out_proj" and DELTA in path:
        return np.ascontiguousarray(_apart(c, w.T).T)
    if module in ("in_proj_qkv", "conv1d"):
        keys = 2 * c.key_heads * c.key_width
        return np.concatenate([w[:keys], _apart(c, w[keys:])])
    return _apart(c, w) if module in ("in_proj_z", "in_proj_b", "in_proj_a", *SCALARS) else w


def factors(c: Config, path: str, w: np.ndarray) -> np.ndarray:
    """Norms' factors, A = -e^A_log, the convolution's taps without their axis of one."""
    if path.endswith("norm.weight") and not path.endswith("linear_attn.norm.weight"):
        return w + np.float32(gemma.OFFSET)
    if path.endswith("A_log"):
        w = np.float32(-np.exp(np.float64(w)))
    return w.reshape(gguf_shape(c, path, w.shape))


def _apart(c: Config, w: np.ndarray) -> np.ndarray:
    """Rows of value heads [key, value of it, ...] -> [value of it, key, ...]."""
    each = c.value_heads // c.key_heads
    return w.reshape(c.key_heads, each, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    turned = glm4.from_gguf(values, names, rope | {"mrope_section": values[SECTIONS_KEY][:3]})
    value_width = values["ssm.inner_size"] // max(1, values["ssm.time_step_rank"])
    sizes = {name: values[key] for name, key in SIZES.items()}
    return turned | sizes | {"linear_value_head_dim": value_width}
