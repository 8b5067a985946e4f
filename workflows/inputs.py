"""What a caller gives a model to answer: token ids, their mask and generation settings, checked."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from unsloth_jax.sample import Sampling
from workflows.keywords import neutral, ranged, say, shown, typed

GENERATE_USED = (
    "input_ids", "attention_mask", "inputs", "max_new_tokens", "max_length", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "stop_strings",
    "tokenizer", "streamer", "seed", "weights",
)  # fmt: skip
GENERATE_IGNORED = {
    "use_cache": "keys and values are always cached",
    "pad_token_id": "answers are padded with the tokenizer's pad or end token",
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
    "return_dict_in_generate": (False, None),
    "output_scores": (False, None),
    "output_logits": (False, None),
}

# Fields of generation_config.json: those read, those of other decoding with their neutral values
# (FILE_SAMPLED act on draws alone), and those that change no answer here.
FILE_READ = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "eos_token_id",
}  # fmt: skip
FILE_LATER = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,), "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "sequence_bias": ({}, []),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "guidance_scale": (1,),
    "exponential_decay_length_penalty": (), "watermarking_config": (), "stop_strings": ([],),
    "dola_layers": (), "token_healing": (False,), "max_time": (), "remove_invalid_values": (False,),
}  # fmt: skip
FILE_SAMPLED = {"typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": ()}
FILE_IGNORED = {
    *GENERATE_IGNORED, "bos_token_id", "decoder_start_token_id", "transformers_version",
    "length_penalty", "early_stopping", "diversity_penalty", "renormalize_logits", "low_memory",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "is_assistant",
    "cache_config", "max_cache_len", "disable_compile", "compile_config", "prefill_chunk_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "return_legacy_cache",
}  # fmt: skip
FILE = "generation_config.json"
CLASS_LENGTH = 20  # transformers' max_length where nobody set one

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
LENGTHS = {name: SETTINGS[name] for name in ("max_new_tokens", "max_length")}
SEEDS = {"seed": (-(2**63), 2**63 - 1)}
IDS = 2**31  # ids are int32


def check_settings(where: str, given: Mapping[str, Any]) -> None:
    """Raises TypeError for another kind than SETTINGS has, ValueError for a bad seed."""
    typed(where, given, {name: kind for name, kind in SETTINGS.items() if name in given})
    ranged(where, given, {name: span for name, span in SEEDS.items() if name in given})


def check_file(config: Mapping[str, Any], do_sample: bool) -> None:
    """Raises ValueError where generation_config.json asks for decoding that is not supported.

    Fields that nobody here knows are named in one line.
    """
    later = FILE_LATER | FILE_SAMPLED if do_sample else FILE_LATER
    for name in later.keys() & config.keys():
        neutral(FILE, name, config[name], (None, *later[name]))
    known = FILE_READ | FILE_IGNORED | FILE_LATER.keys() | FILE_SAMPLED.keys()
    other = sorted(n for n in config.keys() - known if config[n] is not None and n[0] != "_")
    if other:
        say(f"{FILE}: {other} have no effect here")


def room(
    config: Mapping[str, Any], longest: int, limit: int, new: int | None, total: int | None
) -> int:
    """Tokens that may follow a prompt of `longest`: `new`, or up to `total` with the prompt.

    Without either generation_config.json's max_new_tokens or max_length, cut to `limit`, and
    without these up to `limit`. Raises ValueError where nothing may follow or `limit` is passed.
    """
    where, asked = "generate", (new, total) != (None, None)
    if not asked:
        where, new, total = FILE, config.get("max_new_tokens"), config.get("max_length")
        total = None if total == CLASS_LENGTH else total
        typed(where, {"max_new_tokens": new, "max_length": total}, LENGTHS)
    if new is not None:
        ranged(where, {"max_new_tokens": new}, {"max_new_tokens": (1, None)})
    elif total is not None and total <= longest:
        raise ValueError(
            f"{where}: max_length={total} leaves no room for an answer to {longest} tokens of "
            "prompt; give max_new_tokens"
        )
    if longest >= limit:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in max_seq_length={limit}")
    wanted = new if new is not None else (total or limit) - longest
    if asked and longest + wanted > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {wanted} new ones pass max_seq_length={limit}"
        )
    return int(min(wanted, limit - longest))


def check_objects(streamer: Any, tokenizer: Any) -> None:
    """Raises TypeError for a streamer that takes no tokens, or a tokenizer that gives no text."""
    for name, value, methods in (
        ("streamer", streamer, ("put", "end")),
        ("tokenizer", tokenizer, ("decode",)),
    ):
        missing = [m for m in methods if not callable(getattr(value, m, None))]
        if value is not None and missing:
            raise TypeError(
                f"generate: {name} must have {' and '.join(methods)}, got {shown(value)}"
            )


def stops(eos_token_id: Any) -> list[int]:
    """The ids of one id or several, as a list.

    Raises TypeError for what is no whole number, ValueError for one that is no id.
    """
    plain = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = [plain] if isinstance(plain, Integral) else plain
    whole = lambda x: isinstance(x, Integral) and not isinstance(x, bool)
    if not isinstance(ids, Sequence) or not all(map(whole, ids)):
        raise TypeError(f"eos_token_id: expected a token id or a list of them, got {plain!r}")
    if not all(0 <= x < IDS for x in ids):
        raise ValueError(f"eos_token_id: expected ids from 0 to {IDS - 1}, got {plain!r}")
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
    numbers that are no integers. Only masks may be bool.
    """
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else x
    if isinstance(values, Mapping):
        raise TypeError(
            f"{name}: expected integers [B, T], got {type(values).__name__}; give a tokenizer's "
            "answer as keywords: generate(**inputs)"
        )
    found = plain(values)
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise TypeError(f"{name}: expected integers [B, T], got {shown(values)}")
    rows = [plain(row) for row in found]
    many = lambda x: isinstance(x, Sequence) and not isinstance(x, str | bytes)
    rows = rows if any(map(many, rows)) else [rows]
    if not all(map(many, rows)) or any(many(x) for row in rows for x in row):
        raise TypeError(f"{name}: expected integers [B, T], got {shown(found)}")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths == [0]:
        raise ValueError(
            f"{name}: expected rows of one length over 0, got lengths {lengths}; pad them and "
            "give attention_mask"
        )
    array = np.asarray(rows)
    kinds = "iu" if name == "input_ids" else "iub"
    if array.ndim != 2 or array.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected integers [B, T], got {array.dtype} {array.shape}")
    if array.min() < -IDS or array.max() >= IDS:
        raise ValueError(f"{name} lie in {array.min()} to {array.max()}, expected 32-bit integers")
    return array.astype(np.int32)


def masked(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask of 0 and 1), int32 [B, T]. Raises ValueError where their shapes differ."""
    tokens = integers(input_ids)
    if attention_mask is None:
        return tokens, np.ones_like(tokens)
    mask = integers(attention_mask, "attention_mask")
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, input_ids {tokens.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"attention_mask must be 0 and 1, got {mask.min()} to {mask.max()}")
    return tokens, mask


def padded_last(
    tokens: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows with what counts in front, and each column's new number; None where all stay."""
    order = np.argsort(mask == 0, axis=1, kind="stable")
    if (order == np.arange(order.shape[1])).all():
        return tokens, mask, None
    front = lambda x: np.take_along_axis(x, order, axis=1)
    return front(tokens), front(mask), np.argsort(order, axis=1)


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

    Raises TypeError for a value of another kind, given or found in `config`, ValueError for a
    field of `config` that asks for other decoding.
    """
    pick = lambda name, given, default: next(
        x for x in (given, config.get(name), default) if x is not None
    )
    penalty = pick("repetition_penalty", repetition_penalty, 1.0)
    if do_sample is None:
        do_sample = False if config.get("do_sample") is None else config["do_sample"]
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
    check_file(config, do_sample)
    if not do_sample:
        return Sampling(temperature=0.0, repetition_penalty=penalty)
    del chosen["do_sample"]
    return Sampling(**chosen | {"top_k": min(max(chosen["top_k"], 0), IDS - 1)})
