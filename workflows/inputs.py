"""What a caller gives a model to answer: token ids, their mask and generation settings, checked."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from unsloth_jax.sample import Sampling
from workflows.keywords import ranged, say, typed

GENERATE_USED = (
    "input_ids", "attention_mask", "inputs", "max_new_tokens", "max_length", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "stop_strings",
    "tokenizer", "streamer", "seed", "weights",
)  # fmt: skip
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

# What `generate` takes beside prompts; of floats the meaning is checked where they are used.
SETTINGS = {
    "max_new_tokens": int | None,
    "max_length": int | None,
    "do_sample": bool | None,
    "temperature": float | None,
    "top_k": float | None,
    "top_p": float | None,
    "min_p": float | None,
    "repetition_penalty": float | None,
    "seed": int,
}
SEEDS = {"seed": (-(2**63), 2**63 - 1)}


def check_settings(where: str, given: Mapping[str, Any]) -> None:
    """Raises TypeError for another kind than SETTINGS has, ValueError for a bad seed."""
    typed(where, given, {name: kind for name, kind in SETTINGS.items() if name in given})
    ranged(where, given, {name: span for name, span in SEEDS.items() if name in given})


def stops(eos_token_id: Any) -> list[int]:
    """The ids of one id or several, as a list. Raises TypeError for what is no id."""
    plain = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = [plain] if isinstance(plain, Integral) else plain
    whole = lambda x: isinstance(x, Integral) and not isinstance(x, bool)
    if not isinstance(ids, Sequence) or not all(map(whole, ids)):
        raise TypeError(f"eos_token_id: expected a token id or a list of them, got {plain!r}")
    return [int(x) for x in ids]


def stop_texts(stop_strings: Any) -> list[str]:
    """One text or several as a list. Raises TypeError for what is no text, ValueError for ""."""
    texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    texts = [] if texts is None else texts
    if not isinstance(texts, Sequence) or not all(isinstance(x, str) for x in texts):
        raise TypeError(f"stop_strings: expected a text or a list of texts, got {stop_strings!r}")
    if "" in texts:
        raise ValueError(
            f"stop_strings: expected texts of at least one character, got {stop_strings!r}"
        )
    return list(texts)


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


def sampling(
    config: Mapping[str, Any],
    do_sample: bool | None,
    temperature: float | int | None,
    top_k: int | None,
    top_p: float | int | None,
    min_p: float | int | None,
    repetition_penalty: float | int | None,
) -> Sampling:
    """transformers' reading of generation settings: greedy unless sampling is asked for.

    Raises TypeError for a value of another kind, given or found in `config`.
    """
    pick = lambda name, given, default: next(
        x for x in (given, config.get(name), default) if x is not None
    )
    penalty = pick("repetition_penalty", repetition_penalty, 1.0)
    if do_sample is None:
        do_sample = config.get("do_sample", False)
        if not do_sample and any(x is not None for x in (temperature, top_k, top_p, min_p)):
            say(
                "temperature, top_k, top_p and min_p act only with do_sample=True; "
                "this answer is greedy"
            )
    chosen = dict(
        do_sample=do_sample,
        temperature=pick("temperature", temperature, 1.0),
        top_k=pick("top_k", top_k, 50),
        top_p=pick("top_p", top_p, 1.0),
        min_p=pick("min_p", min_p, 0.0),
        repetition_penalty=penalty,
    )
    check_settings("generate or generation_config.json", chosen)
    if not do_sample:
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    del chosen["do_sample"]
    return Sampling(**chosen | {"top_k": max(chosen["top_k"], 0)})
