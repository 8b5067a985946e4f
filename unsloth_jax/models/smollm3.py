"""SmolLM3: Llama's layer, every fourth without positions (Hugging Face; arXiv:2501.18795)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import gguf_keys as gguf_keys
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.llama import to_gguf as to_gguf
from unsloth_jax.models.llama import weights as weights

GGUF_ARCH = "smollm3"
GGUF_READS = ()

OWN = (
    "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "layer_types",
    "no_rope_layers", "no_rope_layer_interval", "max_window_layers",
)  # fmt: skip
DEFAULTS = dict(num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=True)


@dataclass(frozen=True)
class Config(llama.Config):
    turned: tuple[bool, ...] = ()  # whether each layer has rope


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    if "rope_theta" not in (hf.get("rope_parameters") or {}):
        hf = {"rope_theta": 2e6} | hf
    fields.check(hf, own=OWN)
    common = fields.sizes(hf)
    on = turned(hf)
    bias = hf.get("attention_bias", False)
    sliding = hf.get("use_sliding_window") and hf.get("sliding_window") is not None
    kinds = {} if hf.get("layer_types") else {"max_window_layers": 0 if sliding else 28}
    windows = fields.windows(hf | kinds, common["layers"])
    if not hf.get("layer_types"):
        windows = tuple(None if has else one for one, has in zip(windows, on, strict=True))
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf["tie_word_embeddings"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        windows=windows,
        turned=on,
    )


def turned(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer has rope: `no_rope_layers` has a 1 for those that do."""
    layers, given = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if given is None:
        every = hf.get("no_rope_layer_interval", 4)
        return tuple((i + 1) % every != 0 for i in range(layers))
    if len(given) != layers or not set(given) <= {0, 1}:
        raise ValueError(f"no_rope_layers must be {layers} of 0 and 1, got {given}")
    return tuple(map(bool, given))


def kinds(c: Config) -> tuple[tuple[bool, int | None], ...]:
    """What is static about each layer: whether it has rope, and its window in tokens."""
    return tuple(zip(c.turned, c.windows, strict=True))


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
    turned, window = kind
    return llama.block(c, window, w, x, by if turned else {"all": None}, attend, mlp)


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return {"layers with rope": (c.turned, tuple((i + 1) % 4 != 0 for i in range(c.layers)))}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return llama.from_gguf(values, names, rope)
