"""Model families, by the `model_type` of a Hugging Face config.

A family is a module with:
    config(hf) -> Config             frozen and hashable, made from config.json
    weights(c)                       every weight's Hugging Face name -> (shape, logical axes)
    LAYERS                           the path under which the stacked layers lie
    kinds(c)                         what is static about each layer, one hashable value a layer
    angles(c, positions, lengths)    {kind: (cos, sin)}
    embed(c, params, ids), norm(c, params, x), head(c, params)
    block(c, kind, w, x, angles, attend) -> (x, what attend kept)
    GGUF_ARCH, to_gguf(c, path, w)   the GGUF name; optional: weights stored in another order
"""

from types import ModuleType

from unsloth_jax.models import llama, mistral, qwen2, qwen3

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def family(model_type: str) -> ModuleType:
    """The module of a family; raises ValueError naming the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type]
