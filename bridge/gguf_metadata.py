"""A model's configuration -> the keys of a GGUF file, those of llama.cpp's converter."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np

from bridge.gguf_architectures import ARCHITECTURES, differences
from bridge.gguf_tokens import END

# Names in generation_config.json and in gguf's writer.
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}
# Keys whose values have a type in gguf.
ENUMERATED = {
    "rope_scaling_type": gguf.RopeScalingType,
    "expert_gating_func": gguf.ExpertGatingFuncType,
}
CONTEXTS = ("max_position_embeddings",)
# Whose class in transformers doesn't fill head_dim in, where its architecture's other models do.
WITHOUT_HEAD_DIM = ("mixtral",)
# Of a model whose name has it, llama.cpp expects these tokens: it ends where one is missing.
PHI3_NAME, PHI3_TOKENS = re.compile("phi-?3", re.IGNORECASE), ("</s>", "<unk>", "<s>", END)
# The converter holds this one for what Command R was trained on.
COHERE_CONTEXTS = ("model_max_length", *CONTEXTS)


def refuse_unspeakable(model: ModuleType, c: Any, config: Mapping[str, Any]) -> list[str]:
    """Raises ValueError for what llama.cpp would compute differently; returns what to be told."""
    arch, r = model.GGUF_ARCH, c.rope
    notes = getattr(model, "gguf_told", lambda c: [])(c)
    wrong = next(differences(arch, c, _declared(model, "gguf_fixed", c)), None)
    if wrong:
        raise ValueError(f"this model can't be a GGUF file of architecture {arch!r}: it {wrong}")
    if r.kind == "dynamic":
        notes.append(f"GGUF has no dynamic rope: llama.cpp does not rescale beyond {r.context}")
    if r.kind == "longrope":
        notes.append(
            f"llama.cpp chooses longrope's factors by its own context: up to {r.context} tokens "
            "the short ones, beyond that the long ones for texts of any length"
        )
    longest = context(config)
    window = min((w for w in c.windows if w is not None), default=longest)
    if window < longest and not _has_windows(model, c):
        notes.append(f"llama.cpp has no sliding window for {arch!r}: tokens see beyond {window}")
    return notes


def _has_windows(model: ModuleType, c: Any) -> bool:
    return "sliding windows" in _declared(model, "gguf_fixed", c) or bool(
        ARCHITECTURES[model.GGUF_ARCH].period
    )


def context(config: Mapping[str, Any]) -> int:
    """The longest text, in tokens; raises ValueError where the config doesn't say."""
    names = COHERE_CONTEXTS if config["model_type"] == "cohere" else CONTEXTS
    found = [config[name] for name in names if config.get(name) is not None]
    if not found:
        raise ValueError(f"config.json lacks {names[-1]}, which a GGUF file states")
    return found[0]


def rope_attention(out: gguf.GGUFWriter, c: Any) -> None:
    """What longrope multiplies cos and sin by; the converter writes it before all else."""
    if c.rope.kind == "longrope":
        out.add_rope_scaling_attn_factors(c.rope.attention_factor)


def loadable_name(name: str, texts: Iterable[str]) -> tuple[str, list[str]]:
    """The name, changed where llama.cpp would look for Phi-3's tokens in vain, and what to tell."""
    lacking = [text for text in PHI3_TOKENS if text not in set(texts)]
    if not lacking or not PHI3_NAME.search(name):
        return name, []
    changed = PHI3_NAME.sub("phi_3", name)
    return changed, [
        f"general.name is {changed!r}, not {name!r}: llama.cpp does not load a model of that name "
        f"without the tokens {lacking}"
    ]


def general(out: gguf.GGUFWriter, folder: str | Path, name: str, size_label: str) -> None:
    """What the file is called, and the sampling settings of generation_config.json."""
    out.add_type(gguf.GGUFType.MODEL)
    file = Path(folder) / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for theirs, ours in SAMPLING.items():
        if settings.get(theirs) is not None:
            getattr(out, f"add_sampling_{ours}")(settings[theirs])
    out.add_name(name)
    out.add_size_label(size_label)


def architecture(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    """Sizes, norms and rope; `c` is the family's reading of `config`."""
    for step in ARCHITECTURES[out.arch].keys:
        STEPS[step](out, c, config)


def family_keys(out: gguf.GGUFWriter, model: ModuleType, c: Any) -> None:
    """What the family adds, after the file type."""
    for name, value in _declared(model, "gguf_keys", c).items():
        getattr(out, f"add_{name}")(ENUMERATED.get(name, lambda value: value)(value))


def _declared(model: ModuleType, name: str, c: Any) -> dict[str, Any]:
    return getattr(model, name)(c) if hasattr(model, name) else {}


def _eps(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    layer_norm = ARCHITECTURES[out.arch].layer_norm
    (out.add_layer_norm_eps if layer_norm else out.add_layer_norm_rms_eps)(c.eps)


def _experts(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    """How many experts there are and how many a token goes to, of a mixture."""
    if getattr(c, "experts", None):
        out.add_expert_count(c.experts)
        out.add_expert_used_count(c.chosen)
    if getattr(c, "groups", None):
        out.add_expert_group_count(c.groups)
        out.add_expert_group_used_count(c.kept_groups)


def _head_lengths(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    writes = ARCHITECTURES[out.arch].head_lengths
    if hasattr(c, "latent"):
        out.add_key_length(c.latent + c.rope.width)
        out.add_value_length(c.latent)
        return
    if config["model_type"] in WITHOUT_HEAD_DIM:
        writes = None
    if writes or (writes is None and config.get("head_dim")):
        out.add_key_length(c.head_width)
        out.add_value_length(c.head_width)


def _rope_freq_base(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    """Of full layers, and of those with a window where they have one of their own."""
    out.add_rope_freq_base(c.rope.theta)
    local = getattr(c, "local_rope", None)
    if local is not None:
        out.add_rope_freq_base_swa(local.theta)


def _rope_context(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    stated = config.get("original_max_position_embeddings")
    out.add_rope_scaling_orig_ctx_len(c.rope.context or stated or context(config))


def _rope_scaling(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    """Linear and yarn scaling; of yarn's options those that the config states."""
    r, stated = c.rope, config.get("rope_scaling") or config.get("rope_parameters") or {}
    if r.kind not in ("linear", "yarn"):
        return
    out.add_rope_scaling_type(gguf.RopeScalingType(r.kind))
    out.add_rope_scaling_factor(r.factor)
    if r.kind == "linear":
        return
    out.add_rope_scaling_orig_ctx_len(r.context)
    if stated.get("attention_factor") is not None:
        out.add_rope_scaling_yarn_attn_factor(r.attention_factor)
    if stated.get("beta_fast") is not None:
        out.add_rope_scaling_yarn_beta_fast(r.beta_fast)
    if stated.get("beta_slow") is not None:
        out.add_rope_scaling_yarn_beta_slow(r.beta_slow)
    if not ARCHITECTURES[out.arch].scales_yarn:
        _yarn_attention(out, r)


def _yarn_attention(out: gguf.GGUFWriter, r: Any) -> None:
    """llama.cpp scales by 1 + 0.1 ln(factor) whatever yarn's keys say, and by this one besides."""
    own = 1.0 + 0.1 * math.log(r.factor)
    if not math.isclose(r.attention_factor, own, rel_tol=1e-6):
        out.add_rope_scaling_attn_factors(r.attention_factor / own)


def _ssm(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    """Sizes of Mamba-2's layers; the time step's rank counts its heads."""
    out.add_ssm_conv_kernel(c.taps)
    out.add_ssm_inner_size(c.ssm_width)
    out.add_ssm_state_size(c.state)
    out.add_ssm_time_step_rank(c.ssm_heads)
    out.add_ssm_group_count(c.groups)


STEPS = {
    "block_count": lambda out, c, config: out.add_block_count(c.layers),
    "context_length": lambda out, c, config: out.add_context_length(context(config)),
    "embedding_length": lambda out, c, config: out.add_embedding_length(c.width),
    "feed_forward_length": lambda out, c, config: out.add_feed_forward_length(
        getattr(c, "dense_width", c.mlp_width)
    ),
    "head_count": lambda out, c, config: out.add_head_count(c.heads),
    # To llama.cpp a latent vector is one head of keys and values.
    "head_count_kv": lambda out, c, config: out.add_head_count_kv(
        1 if hasattr(c, "latent") else c.kv_heads
    ),
    "rope_scaling": _rope_scaling,
    "rope_freq_base": _rope_freq_base,
    "rope_context": _rope_context,
    "rope_dimensions": lambda out, c, config: out.add_rope_dimension_count(c.rope.width),
    "eps": _eps,
    "experts": _experts,
    "sigmoid": lambda out, c, config: out.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
    "ssm": _ssm,
    "rope_sections": lambda out, c, config: (
        out.add_rope_dimension_sections(c.sections) if c.sections else None
    ),
    "head_lengths": _head_lengths,
}


def rope_factors(r: Any) -> dict[str, np.ndarray]:
    """Tensors that rope's frequencies are divided by, float32 [h/2], by their GGUF names."""
    if r.kind == "longrope":
        lists = {"long": r.long, "short": r.short}
        return {f"rope_factors_{k}.weight": np.asarray(v, np.float32) for k, v in lists.items()}
    return {"rope_freqs.weight": _llama3(r)} if r.kind == "llama3" else {}


def _llama3(r: Any) -> np.ndarray:
    """What Llama 3.1 divides each rope frequency by."""
    one, each = np.float32(1), np.arange(0, r.width, 2, dtype=np.float32) / np.float32(r.width)
    length = np.float32(2 * math.pi) / (one / np.float32(r.theta) ** each)
    # Llama 4's ramp has no length: no frequency lies on it.
    ramp = np.float32(max(r.high - r.low, 1e-6))
    smooth = (np.float32(r.context) / length - np.float32(r.low)) / ramp
    between = one / ((one - smooth) / np.float32(r.factor) + smooth)
    slow = np.where(length > r.context / r.low, np.float32(r.factor), between)
    return np.where(length < r.context / r.high, one, slow).astype(np.float32)
