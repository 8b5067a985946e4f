"""A model's configuration -> the keys of a GGUF file, those of llama.cpp's converter."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Names in generation_config.json and in gguf's writer.
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}

# Built into llama.cpp: for these families it reads neither of the keys that would change them.
LLAMA_CPP_YARN = (32.0, 1.0, True)


def refuse_unspeakable(arch: str, c: Any, config: Mapping[str, Any]) -> list[str]:
    """Raises ValueError for what llama.cpp would compute differently; returns what to be told."""
    r, longest, notes = c.rope, config["max_position_embeddings"], []
    wrong = None
    if c.activation != "silu":
        wrong = f"has the activation {c.activation!r} where llama.cpp has silu"
    elif r.kind == "llama3" and arch != "llama":
        wrong = "has rope type 'llama3', whose factors llama.cpp reads for llama only"
    elif r.kind == "yarn" and (r.beta_fast, r.beta_slow, r.truncate) != LLAMA_CPP_YARN:
        wrong = f"has yarn with other beta_fast, beta_slow, truncate than {LLAMA_CPP_YARN}"
    if wrong:
        raise ValueError(f"this model can't be a GGUF file of architecture {arch!r}: it {wrong}")
    if r.kind == "dynamic":
        notes.append(f"GGUF has no dynamic rope: llama.cpp does not rescale beyond {r.context}")
    window = min((w for w in c.windows if w is not None), default=longest)
    if window < longest:
        notes.append(f"llama.cpp has no sliding window for {arch!r}: tokens see beyond {window}")
    return notes


def general(out: gguf.GGUFWriter, folder: str | Path, name: str, parameters: int) -> None:
    """What the file is called, and the sampling settings of generation_config.json."""
    out.add_type(gguf.GGUFType.MODEL)
    file = Path(folder) / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for theirs, ours in SAMPLING.items():
        if settings.get(theirs) is not None:
            getattr(out, f"add_sampling_{ours}")(settings[theirs])
    out.add_name(name)
    out.add_size_label(gguf.size_label(parameters, parameters, 0, 0))


def architecture(out: gguf.GGUFWriter, c: Any, config: Mapping[str, Any]) -> None:
    """Sizes, norms and rope; `c` is the family's reading of `config`."""
    out.add_block_count(c.layers)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(c.width)
    out.add_feed_forward_length(c.mlp_width)
    out.add_head_count(c.heads)
    out.add_head_count_kv(c.kv_heads)
    _rope(out, c.rope, config.get("rope_scaling") or config.get("rope_parameters") or {})
    out.add_rope_freq_base(c.rope.theta)
    out.add_layer_norm_rms_eps(c.eps)
    if out.arch != "qwen2" or config.get("head_dim"):
        out.add_key_length(c.head_width)
        out.add_value_length(c.head_width)


def llama_only(out: gguf.GGUFWriter, c: Any) -> None:
    """Two keys that the converter writes for this architecture, after the file type."""
    if out.arch == "llama":
        out.add_vocab_size(c.vocab)
        out.add_rope_dimension_count(c.head_width)


def _rope(out: gguf.GGUFWriter, r: Any, stated: Mapping[str, Any]) -> None:
    """Linear and yarn scaling; of yarn's options those that the config states."""
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
    # llama.cpp scales by 1 + 0.1 ln(factor) whatever the keys above say, and by this one besides.
    own = 1.0 + 0.1 * math.log(r.factor)
    if not math.isclose(r.attention_factor, own, rel_tol=1e-6):
        out.add_rope_scaling_attn_factors(r.attention_factor / own)


def rope_factors(r: Any) -> np.ndarray | None:
    """What Llama 3.1 divides each rope frequency by, float32 [h/2]; None for other kinds."""
    if r.kind != "llama3":
        return None
    one, each = np.float32(1), np.arange(0, r.width, 2, dtype=np.float32) / np.float32(r.width)
    length = np.float32(2 * math.pi) / (one / np.float32(r.theta) ** each)
    smooth = (np.float32(r.context) / length - np.float32(r.low)) / np.float32(r.high - r.low)
    between = one / ((one - smooth) / np.float32(r.factor) + smooth)
    slow = np.where(length > r.context / r.low, np.float32(r.factor), between)
    return np.where(length < r.context / r.high, one, slow).astype(np.float32)
