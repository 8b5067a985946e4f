"""StarCoder2: layer norms, biases everywhere, an MLP without a gate (arXiv:2402.19173)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from unsloth_jax.dims import Params
from unsloth_jax.layers import Attend, Mlp, feed_forward, layer_norm
from unsloth_jax.models import fields, llama
from unsloth_jax.models.llama import LAYERS as LAYERS
from unsloth_jax.models.llama import Config
from unsloth_jax.models.llama import angles as angles
from unsloth_jax.models.llama import embed as embed
from unsloth_jax.models.llama import head as head
from unsloth_jax.models.llama import kinds as kinds
from unsloth_jax.models.llama import scores as scores

GGUF_ARCH = "starcoder2"
GGUF_READS = ()

OWN = (
    "use_bias", "norm_epsilon", "sliding_window",
    # Published checkpoints say 0.1 for pretraining; fine-tuning leaves dropout to adapters.
    "attention_dropout", "residual_dropout", "embedding_dropout",
)  # fmt: skip
DEFAULTS = dict(
    num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", max_position_embeddings=4096,
    tie_word_embeddings=True,
)  # fmt: skip
ONLY = {
    "norm_type": ("layer_norm",),
    "mlp_type": ("default",),
    "attention_softmax_in_fp32": (True,),
    "scale_attention_softmax_in_fp32": (True,),
    "scale_attn_weights": (True,),
}


def config(hf: Mapping[str, Any]) -> Config:
    """Raises ValueError for a field or value that is not understood."""
    hf = DEFAULTS | dict(hf)
    eps = hf.get("norm_epsilon", 1e-5)
    fields.check(hf, OWN, ONLY | {"layer_norm_epsilon": (eps,)})
    common = fields.sizes(hf)
    bias = hf.get("use_bias", True)
    return Config(
        **common | {"eps": eps},
        rope=fields.rope(hf, common["head_width"]),
        tied=hf["tie_word_embeddings"],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        windows=(hf.get("sliding_window"),) * common["layers"],
    )


def weights(c: Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Hugging Face name (`*` for the layer) -> (shape, logical axes) of each weight."""
    D, F = c.width, c.mlp_width
    inner = {name: m for name, m in llama.matrices(c).items() if name.startswith("self_attn")}
    inner |= {
        "mlp.c_fc": ((F, D), ("mlp", "width"), c.mlp_bias),
        "mlp.c_proj": ((D, F), ("width", "mlp"), c.mlp_bias),
    }
    out = llama.weights(c, inner)
    norms = [path for path in out if path.endswith("norm.weight")]
    return out | {path.replace(".weight", ".bias"): out[path] for path in norms}


def unit(c: Config, node: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Layer norm by the node's weight and bias."""
    return layer_norm(node, x, c.eps)


def norm(c: Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return unit(c, params["model"]["norm"], x)


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
    return llama.pre_normed(c, w, x, mix, mlp, unit)


def gguf_fixed(c: Config) -> dict[str, tuple[Any, Any]]:
    """What llama.cpp has one value for: (this model's, that one)."""
    return {"use_bias": (c.qkv_bias, True)}


def from_gguf(values: Mapping[str, Any], names: set[str], rope: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields of a file with these keys and weights, beyond those of all families."""
    return {"norm_epsilon": values["attention.layer_norm_epsilon"], "use_bias": True}
