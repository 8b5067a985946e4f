"""Mistral: Llama's layer with a sliding window on every layer (arXiv:2310.06825)."""

from collections.abc import Mapping
from typing import Any

from unsloth_jax.models import fields
from unsloth_jax.models.llama import GGUF_ARCH as GGUF_ARCH
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import block as block
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import gguf_keys as gguf_keys
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import norm as norm
from unsloth_jax.models.llama import scores as scores
from unsloth_jax.models.llama import to_gguf as to_gguf
from unsloth_jax.models.llama import weights as weights

GGUF_READS = ("attention.sliding_window",)


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32} | dict(hf)
    fields.check(hf, own=("sliding_window",))
    common = fields.sizes(hf)
    return Config(
        **common,
        rope=fields.rope(hf, common["head_width"]),
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        windows=(hf.get("sliding_window", 4096),) * common["layers"],
    )


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return {"sliding_window": values["attention.sliding_window"]}
