"""What a caller gives a model to answer: token ids, their mask and generation settings, checked."""

from typing import Any

import numpy as np

from unsloth_jax.sample import Sampling
from workflows.keywords import say

GENERATE_IGNORED = {
    "use_cache": "keys and values are always cached",
    "pad_token_id": "answers are padded with the tokenizer's pad or end token",
    "return_dict_in_generate": "token ids are returned",
    "return_tensors": "token ids are NumPy arrays",
    "token_type_ids": "these families have none",
    "cache_implementation": "there is one cache",
}
GENERATE_LATER = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "length_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "penalty_alpha": (None,),
    "typical_p": (1.0, None),
    "logits_processor": (None,),
    "stopping_criteria": (None,),
    "assistant_model": (None,),
}


def integers(values: Any, name: str = "input_ids") -> np.ndarray:
    """int32 [B, T] of lists, NumPy, JAX or CPU torch arrays; one row may lack its batch axis.

    Raises ValueError for ragged rows, which need padding and an attention mask, and TypeError for
    numbers that are no integers.
    """
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else x
    rows = [plain(row) for row in plain(values)]
    rows = rows if rows and isinstance(rows[0], list | tuple) else [rows]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths == [0]:
        raise ValueError(
            f"{name}: expected rows of one length over 0, got lengths {lengths}; pad them and "
            "give attention_mask"
        )
    array = np.asarray(rows)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise TypeError(f"{name}: expected integers [B, T], got {array.dtype} {array.shape}")
    return array.astype(np.int32)


def masked(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask of 0 and 1), int32 [B, T]. Raises ValueError where their shapes differ."""
    tokens = integers(input_ids)
    if attention_mask is None:
        return tokens, np.ones_like(tokens)
    mask = integers(attention_mask, "attention_mask")
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, input_ids {tokens.shape}")
    return tokens, (mask != 0).astype(np.int32)


def sampling(config: dict[str, Any], do_sample: bool | None, given: dict[str, Any]) -> Sampling:
    """transformers' reading of generation settings: greedy unless sampling is asked for."""
    asked = {k: v if v is not None else config.get(k) for k, v in given.items()}
    penalty = asked["repetition_penalty"] or 1.0
    if do_sample is None:
        do_sample = config.get("do_sample", False)
        if not do_sample and any(
            given[k] is not None for k in ("temperature", "top_k", "top_p", "min_p")
        ):
            say(
                "temperature, top_k, top_p and min_p act only with do_sample=True; this answer is greedy"
            )
    if not do_sample:
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    pick = lambda name, default: default if asked[name] is None else asked[name]
    return Sampling(
        pick("temperature", 1.0),
        max(pick("top_k", 50), 0),
        pick("top_p", 1.0),
        pick("min_p", 0.0),
        penalty,
    )
