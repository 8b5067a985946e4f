"""Model families, by the `model_type` of a Hugging Face config.

A family is a module with:
    config(hf) -> Config             frozen and hashable, made from config.json
    weights(c)                       every weight's Hugging Face name -> (shape, logical axes);
                                     with a second `*` the shape's first axis counts its experts
    LAYERS                           the path under which the stacked layers lie
    kinds(c)                         what is static about each layer, one hashable value a layer
    angles(c, positions, lengths)    {kind: (cos, sin)}
    embed(c, params, ids, rows)      what the first layer takes, of the table's rows if given
    norm(c, params, x), head(c, params), scores(c)
    block(c, kind, w, x, angles, attend, mlp) -> (x, what attend kept)
    holds(c, kind)                   what a cache holds of such a layer (optional)
where not all layers have all weights, or files hold some the other way round,
    layers_of(c, path)               numbers of the layers that have a weight (optional)
    unused(c)                        a pattern of names that transformers leaves alone (optional)
    TRANSPOSED                       paths of which files hold the last two axes swapped (optional)
where tokens go to experts that transformers balances,
    routed(c, node, x, real)         how a mixture spreads its tokens (`experts.Spread`)
and, where llama.cpp has the family,
    GGUF_ARCH, to_gguf(c, path, w)   its name there, and weights that it stores otherwise (optional)
    gguf_shape(c, path, shape)       theirs, where it has them in other shapes (optional)
    gguf_parts(c, name, shape)       the tensors that are one of its weights there: name -> (shape,
                                     what makes it of the weight), or none (optional)
    from_gguf_parts(c, name, parts)  the weight of those tensors, where files are read
    gguf_keys(c)                     keys of its own, by the names of gguf's writer (optional)
    gguf_fixed(c)                    {what: (this model's, the only one of llama.cpp)} (optional)
    gguf_told(c)                     what a file's user should know, as sentences (optional)
    GGUF_READS                       the architecture's keys that this family alone reads, and
    from_gguf(values, names, rope)   config.json's own fields of a file that has these values of
                                     keys, Hugging Face names of weights and rope_parameters
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.layers import Holds
from unsloth_jax.leaves import Stacks
from unsloth_jax.models import (
    cohere,
    cohere2,
    deepseek_v3,
    exaone4,
    falcon_h1,
    gemma,
    gemma2,
    gemma3_text,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    llama4_text,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    smollm3,
    starcoder2,
)

FAMILIES: dict[str, ModuleType] = {
    "cohere": cohere,
    "cohere2": cohere2,
    "deepseek_v3": deepseek_v3,
    "exaone4": exaone4,
    "falcon_h1": falcon_h1,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "glm4": glm4,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "llama": llama,
    "llama4_text": llama4_text,
    "ministral3": ministral3,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "smollm3": smollm3,
    "starcoder2": starcoder2,
}


def family(model_type: str) -> ModuleType:
    """The module of a family; raises ValueError naming the supported ones."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}; what a "
            'new one takes: docs/families.md, "A new family"'
        )
    return FAMILIES[model_type]


def family_of(fields: Mapping[str, Any]) -> ModuleType:
    """The family of config.json's fields; raises ValueError where there is none.

    A model around a supported text model, as for images, is refused with the text model's name.
    """
    if "model_type" not in fields:
        raise ValueError(f"config.json names no model_type; it has {sorted(fields)}")
    name, text = fields["model_type"], fields.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    if name not in FAMILIES and inner in FAMILIES:
        raise ValueError(
            f"model_type {name!r} is more than text, which is not supported yet; its text model, "
            f'{inner!r}, is supported by itself: docs/families.md, "Text models inside others", '
            "says how to save it"
        )
    return family(name)


def layers_of(model: ModuleType, c: Any, path: str) -> tuple[int, ...]:
    """Numbers of the layers that have this weight of `weights(c)`, () for one in no layer."""
    if ".*." not in path:
        return ()
    own = getattr(model, "layers_of", None)
    return tuple(range(c.layers)) if own is None else own(c, path)


def tree_of(model: ModuleType, c: Any, make: Callable[[str, tuple[int, ...]], Any]) -> Params:
    """A parameter tree of `make(path, shape)`, the shapes with their layers."""
    flat = {}
    for path, (shape, _) in model.weights(c).items():
        ids = layers_of(model, c, path)
        leaf = make(path, (len(ids), *shape) if ids else shape)
        whole = ids in ((), tuple(range(c.layers)))
        flat[path] = leaf if whole else Stacks((leaf,), (ids,))
    return tree.unflatten(flat)


def holds(model: ModuleType, c: Any) -> tuple[Holds, ...]:
    """What a cache holds of each layer: keys and values, unless the family says otherwise."""
    own = getattr(model, "holds", None)
    return tuple(Holds() if own is None else own(c, kind) for kind in model.kinds(c))
