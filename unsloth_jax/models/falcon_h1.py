"""Falcon-H1: attention and Mamba-2 side by side in every layer (arXiv:2507.22448).

Everything has a factor of its own (muP). Mamba-2: arXiv:2405.21060; transformers
`modeling_falcon_h1`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from unsloth_jax.dims import Params, Scores
from unsloth_jax.layers import ACTIVATIONS, Holds, Mixers, Mlp, feed_forward, scaled
from unsloth_jax.leaves import linear, linears
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds

GGUF_ARCH = "falcon-h1"
GGUF_READS = (
    "ssm.time_step_rank", "ssm.inner_size", "ssm.group_count", "ssm.state_size", "ssm.conv_kernel"
)  # fmt: skip
NORMS = ("input_layernorm", "pre_ff_layernorm")
FINAL = "model.final_layernorm.weight"
# Config's field -> the file's; those of lists are named by what they multiply.
SCALES = dict(
    embedding_scale="embedding_multiplier", logit_scale="lm_head_multiplier",
    key_scale="key_multiplier", attention_in="attention_in_multiplier",
    attention_out="attention_out_multiplier", ssm_in="ssm_in_multiplier",
    ssm_out="ssm_out_multiplier",
)  # fmt: skip
LISTS = dict(
    mlp_multipliers=("mlp_gate_scale", "mlp_down_scale"),
    ssm_multipliers=("z_scale", "x_scale", "b_scale", "c_scale", "dt_scale"),
)
COUNTS = ("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
SWITCHES = (
    "mamba_conv_bias", "mamba_proj_bias", "projectors_bias", "mamba_rms_norm",
    "mamba_norm_before_gate",
)  # fmt: skip
DEFAULTS = dict(
    num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=8192, mamba_d_ssm=1024,
    mamba_n_heads=128, mamba_d_head="auto", mamba_n_groups=1, mamba_d_state=256, mamba_d_conv=4,
    mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False, projectors_bias=False,
    mamba_rms_norm=False, mamba_norm_before_gate=True,
)  # fmt: skip
# How scores and chunks are cut up, and what transformers reads nothing from.
HARMLESS = ("num_logits_to_keep", "mamba_chunk_size", "mlp_expansion_factor")
# transformers applies a limit to prompts alone, so that none but the neutral one is defined.
ONLY = dict(
    time_step_limit=((0.0, math.inf), [0.0, math.inf], [0.0, {"__float__": "Infinity"}]),
    attn_layer_indices=(None,),
    mamba_use_mlp=(True,),
)


@dataclass(frozen=True)
class Config(llama.Config):
    ssm_heads: int = 128
    ssm_head_width: int = 8
    groups: int = 1
    state: int = 256
    taps: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    norm_first: bool | None = None  # whether the gate comes after the norm; None without a norm
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    key_scale: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    mlp_gate_scale: float = 1.0
    mlp_down_scale: float = 1.0
    z_scale: float = 1.0
    x_scale: float = 1.0
    b_scale: float = 1.0
    c_scale: float = 1.0
    dt_scale: float = 1.0

    @property
    def ssm_width(self) -> int:
        return self.ssm_heads * self.ssm_head_width

    @property
    def channels(self) -> int:
        """What the convolution sees: x, B and C."""
        return self.ssm_width + 2 * self.groups * self.state


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    own = {*DEFAULTS, *SCALES.values(), *LISTS, *HARMLESS, "attention_bias", "mlp_bias"}
    fields.check(hf, own=own | {"layer_types", "layers_block_type"}, only=ONLY)
    common, bias = fields.sizes(hf), hf.get("attention_bias", False)
    for name in ("layer_types", "layers_block_type"):
        if hf.get(name) not in (None, ["hybrid"] * common["layers"]):
            raise ValueError(f"{name}={hf[name]!r}, expected 'hybrid' for each layer")
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        windows=(None,) * common["layers"],
        **_mamba(hf),
        **_scales(hf),
    )


def _mamba(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields.counts(hf, COUNTS)
    wrong = {name: hf[name] for name in SWITCHES if not isinstance(hf[name], bool)}
    if wrong:
        raise ValueError(f"config has {wrong}, expected true or false")
    width, heads = hf["mamba_d_ssm"], hf["mamba_n_heads"]
    width = hf["mamba_expand"] * hf["hidden_size"] if width is None else width
    each = width // heads if hf["mamba_d_head"] == "auto" else hf["mamba_d_head"]
    if each * heads != width or heads % hf["mamba_n_groups"]:
        raise ValueError(
            f"mamba_n_heads={heads} of mamba_d_head={hf['mamba_d_head']!r} must make up "
            f"mamba_d_ssm={width} and be a multiple of mamba_n_groups={hf['mamba_n_groups']}"
        )
    return dict(
        ssm_heads=heads,
        ssm_head_width=each,
        groups=hf["mamba_n_groups"],
        state=hf["mamba_d_state"],
        taps=hf["mamba_d_conv"],
        conv_bias=hf["mamba_conv_bias"],
        in_bias=hf["mamba_proj_bias"],
        out_bias=hf["projectors_bias"],
        norm_first=hf["mamba_norm_before_gate"] if hf["mamba_rms_norm"] else None,
    )


def _scales(hf: Mapping[str, Any]) -> dict[str, float]:
    """Every factor, 1 where the file has none."""
    out = {ours: 1.0 if hf.get(name) is None else hf[name] for ours, name in SCALES.items()}
    for name, ours in LISTS.items():
        given = [1.0] * len(ours) if hf.get(name) is None else hf[name]
        if not isinstance(given, list | tuple) or len(given) != len(ours):
            raise ValueError(f"{name}={given!r}, expected {len(ours)} numbers")
        out |= zip(ours, given, strict=True)
    wrong = {n: x for n, x in out.items() if not isinstance(x, int | float) or not math.isfinite(x)}
    if wrong:
        raise ValueError(f"multipliers {wrong} are no numbers")
    return {name: float(x) for name, x in out.items()}


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    D, C, H = c.width, c.channels, c.ssm_heads
    rows = c.ssm_width + C + H
    inner = {n.replace("mlp.", "feed_forward."): m for n, m in llama.matrices(c).items()}
    inner |= {
        "mamba.in_proj": ((rows, D), ("heads", "width"), c.in_bias),
        "mamba.out_proj": ((D, c.ssm_width), ("width", "heads"), c.out_bias),
        "mamba.conv1d": ((C, 1, c.taps), ("heads", "one", "taps"), c.conv_bias),
    }
    out = llama.weights(c, inner, NORMS)
    out[FINAL] = out.pop("model.norm.weight")
    for name in ("A_log", "D", "dt_bias"):
        out[f"{LAYERS}.*.mamba.{name}"] = ((H,), ("heads",))
    if c.norm_first is not None:
        out[f"{LAYERS}.*.mamba.norm.weight"] = ((c.ssm_width,), ("heads",))
    return out


def holds(c: Config, kind: Any) -> Holds:
    """What a cache holds of a layer: all there is."""
    state = c.ssm_heads, c.state, c.ssm_head_width
    return Holds(True, (c.taps - 1, c.channels), state)


def embed(
    c: Config, params: Params, ids: Int[Array, "B T"], rows: Float[Array, "B T D"] | None = None
) -> Float[Array, "B T D"]:
    """Rows of the table, scaled."""
    return scaled(llama.embed(c, params, ids, rows), c.embedding_scale)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return llama.unit(c, params["model"]["final_layernorm"], x)


def scores(c: Config) -> Scores:
    """What is done to the head's scores."""
    return Scores(scale=c.logit_scale)


def block(
    c: Config,
    window: int | None,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Mixers,
    mlp: Mlp = feed_forward,
):
    """One layer. `attend` owns masks and caches; its second result is passed through."""
    y = llama.unit(c, w["input_layernorm"], x)
    mixed, kept = mamba(c, w["mamba"], scaled(y, c.ssm_in), attend)
    # Between projections and rotation, where other families have their norms.
    keys = lambda x, name: scaled(x, c.key_scale) if name == "k_norm" else x
    z, pairs = llama.attention(
        c, w["self_attn"], scaled(y, c.attention_in), by["all"], attend, window, norms=keys
    )
    mixed = scaled(mixed, c.ssm_out) + scaled(z, c.attention_out)
    x = checkpoint_name(x + mixed, "mid")
    y = llama.unit(c, w["pre_ff_layernorm"], x)
    return x + mlp(w["feed_forward"], y, partial(_mlp, c)), kept | pairs


def _mlp(c: Config, node: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    gate, up = linears((node["gate_proj"], node["up_proj"]), x)
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    y = linear(node["down_proj"], ACTIVATIONS[c.activation](scaled(gate, c.mlp_gate_scale)) * up)
    return scaled(y, c.mlp_down_scale)


def mamba(c: Config, a: Params, y: Float[Array, "B T D"], attend: Mixers):
    """Mamba-2 of y [B, T, D], and what `attend` kept.

    dt = softplus(. + dt_bias), decay = -e^A_log dt; the state takes dt x in, D x goes by it.
    """
    sizes = _sizes(c)
    each = (c.z_scale, c.x_scale, c.b_scale, c.c_scale, c.dt_scale)
    row = jnp.asarray(np.repeat(np.float32(each), sizes))[None, None]
    z = linear(a["in_proj"], y)
    z = (z.astype(jnp.float32) * row).astype(y.dtype) if set(each) != {1.0} else z
    gate, x, dt = jnp.split(z, (c.ssm_width, c.ssm_width + c.channels), axis=-1)
    x, tail = attend.convolve(x, a["conv1d"]["weight"], a["conv1d"].get("bias"))
    x = ACTIVATIONS[c.activation](x)
    x, keys, queries = jnp.split(x, (c.ssm_width, c.ssm_width + sizes[2]), axis=-1)
    heads = lambda x, n: x.astype(jnp.float32).reshape(*y.shape[:2], n, -1)
    x = heads(x, c.ssm_heads)
    whole = lambda x: x.astype(jnp.float32)[None, None]
    dt = jax.nn.softplus(dt.astype(jnp.float32) + whole(a["dt_bias"]))
    decay = -jnp.exp(whole(a["A_log"])) * dt
    groups = partial(heads, n=c.groups)
    read, state = attend.recur(groups(queries), groups(keys), x * dt[..., None], decay)
    out = read + x * whole(a["D"])[..., None]
    out = gated(c, a, out.reshape(*y.shape[:2], -1), gate).astype(y.dtype)
    return linear(a["out_proj"], out), tail | state


def _sizes(c: Config) -> tuple[int, ...]:
    """Outputs of in_proj: gate, x, B, C and dt."""
    return c.ssm_width, c.ssm_width, c.groups * c.state, c.groups * c.state, c.ssm_heads


def gated(
    c: Config, a: Params, x: Float[Array, "B T I"], gate: Float[Array, "B T I"]
) -> Float[Array, "B T I"]:
    """x silu(gate), float32; where there is a norm, one over each group, before or after it."""
    gate = jax.nn.silu(gate.astype(jnp.float32))
    if c.norm_first is None:
        return x * gate
    x = x if c.norm_first else x * gate
    parts = x.reshape(*x.shape[:2], c.groups, -1)
    parts = parts * jax.lax.rsqrt((parts * parts).mean(-1, keepdims=True) + c.eps)
    x = parts.reshape(x.shape) * a["norm"]["weight"].astype(jnp.float32)[None, None]
    return x * gate if c.norm_first else x


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {
        "vocab_size": c.vocab,
        "head_count_kv": c.kv_heads,
        "key_length": c.head_width,
        "value_length": c.head_width,
        "rope_freq_base": c.rope.theta,
    }


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    fixed = {"mamba_conv_bias": (c.conv_bias, True)}
    if c.norm_first is not None:
        fixed["mamba_norm_before_gate"] = c.norm_first, False
    if c.tied:  # the embedding's rows, scaled in the file, are the head's
        fixed["lm_head_multiplier"] = c.logit_scale, c.embedding_scale
    return fixed


def gguf_shape(c: Config, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight in a GGUF file."""
    if path.endswith((".A_log", ".D")):
        return (*shape, 1)
    if path.endswith("conv1d.weight"):
        return shape[0], shape[2]
    return (c.groups, c.ssm_width // c.groups) if path.endswith("mamba.norm.weight") else shape


def to_gguf(c: Config, path: str, w: np.ndarray) -> np.ndarray:
    """llama.cpp has no factors: they are multiplied into the weights. Its A is -e^A_log."""
    if path.endswith("A_log"):
        w = np.float32(-np.exp(np.float64(w)))
    for factor in _gguf_factors(c, path):
        w = w * np.float32(factor)
    if path.endswith("in_proj.weight"):
        each = (c.z_scale, c.x_scale, c.b_scale, c.c_scale, c.dt_scale)
        w = w * np.repeat(np.float32(each), _sizes(c))[:, None]
    return w.reshape(gguf_shape(c, path, w.shape))


def _gguf_factors(c: Config, path: str) -> tuple[float, ...]:
    """What a weight is multiplied with, in the converter's order: each product is rounded."""
    owner = path.split(".")[-2]
    return {
        "embed_tokens": (c.embedding_scale,),
        "lm_head": (c.logit_scale,),
        "q_proj": (c.attention_in,),
        "k_proj": (c.key_scale, c.attention_in),
        "v_proj": (c.attention_in,),
        "o_proj": (c.attention_out,),
        "in_proj": (c.ssm_in,),
        "out_proj": (c.ssm_out,),
        "gate_proj": (c.mlp_gate_scale,),
        "down_proj": (c.mlp_down_scale,),
    }.get(owner, ())


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    has = lambda name: f"{LAYERS}.0.{name}" in names
    sizes = ("mamba_n_heads", "mamba_d_ssm", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    return dict(zip(sizes, (values[key] for key in GGUF_READS), strict=True)) | {
        "mlp_bias": has("feed_forward.down_proj.bias"),
        "mamba_conv_bias": has("mamba.conv1d.bias"),
        "mamba_rms_norm": has("mamba.norm.weight"),
        "mamba_norm_before_gate": False,
    }
