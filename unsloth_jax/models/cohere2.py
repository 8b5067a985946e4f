"""Command R7B and A: Cohere's layer, windows and rope on three layers of four (transformers)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward
from unsloth_jax.models import cohere, fields
from unsloth_jax.models.cohere import NORMS as NORMS
from unsloth_jax.models.cohere import Config, beside
from unsloth_jax.models.cohere import norm as norm
from unsloth_jax.models.cohere import scores as scores
from unsloth_jax.models.cohere import weights as weights
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds

GGUF_ARCH = "cohere2"
GGUF_READS = ("logit_scale", "attention.sliding_window")

OWN = ("sliding_window", "layer_types", "sliding_window_pattern")
# Of the first checkpoints' own code: what transformers' does, whatever they say.
ONLY = {
    "layer_switch": (4,),
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (True, False),  # how it was spread over devices
    "use_qk_norm": (False, None),
}


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"max_position_embeddings": 8192, "sliding_window": 4096} | dict(hf)
    common = cohere.read(hf, OWN, ONLY)
    pattern = hf.get("sliding_window_pattern") or 4
    sliding = fields.sliding_layers(hf, common["layers"], pattern)
    if hf["sliding_window"] is None:
        raise ValueError("cohere2 needs a sliding_window, got None")
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        windows=tuple(hf["sliding_window"] if one else None for one in sliding),
    )


def block(
    c: Config,
    window: int | None,
    w: Params,
    x: Float[Array, "B T D"],
    by,
    attend: Attend,
    mlp: Mlp = feed_forward,
):
    """One layer: without a window it knows no positions."""
    return beside(c, window, w, x, None if window is None else by["all"], attend, mlp)


def gguf_keys(c: Config) -> dict[str, Any]:
    """Keys that llama.cpp's converter adds for this family, by gguf's names."""
    return {
        "logit_scale": c.logit_scale,
        "sliding_window": c.windows[0],
        "vocab_size": c.vocab,
        "rope_dimension_count": c.rope.width,
        "rope_scaling_type": "none",
    }


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return cohere.from_gguf(values, names, rope) | {
        "sliding_window": values["attention.sliding_window"]
    }
