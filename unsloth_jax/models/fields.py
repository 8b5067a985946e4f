"""Reading a Hugging Face config.json: every field is used, known to be harmless, or refused."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import NoneType
from typing import Any

from unsloth_jax.layers import ACTIVATIONS
from unsloth_jax.rope import Rope

# Fields that name, initialise, train or sample, and never change a forward pass.
HARMLESS = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled
    _name_or_path attn_implementation gradient_checkpointing
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_range is_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length min_length model_max_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    quantization_config remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache""".split()
)
# Fields that would change the result: only these values are understood.
FIXED: dict[str, tuple] = {
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
    "resid_pdrop": (0, None),
    "embd_pdrop": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
DENSE = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings original_max_position_embeddings
    rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters""".split()
)
# What mixtures of experts have: their number under either name, and how losses treat their routes.
EXPERTS = (
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
)  # fmt: skip
COUNTS = (
    *REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings",
    "original_max_position_embeddings", "sliding_window", "num_experts", "num_local_experts",
    "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "attention_chunk_size",
    "floor_scale", "interleave_moe_layer_step", "intermediate_size_mlp", "no_rope_layer_interval",
    "initial_context_length", "experts_per_token", "n_routed_experts", "n_shared_experts",
    "n_group", "topk_group", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim",
)  # fmt: skip
SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bias",
    "use_qk_norm", "norm_topk_prob", "output_router_logits", "attn_temperature_tuning",
    "rope_interleave",
)  # fmt: skip
NUMBERS = (
    "rms_norm_eps", "norm_epsilon", "layer_norm_eps", "query_pre_attn_scalar", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "embedding_multiplier",
    "attention_multiplier", "residual_multiplier", "logits_scaling", "attn_scale",
    "swiglu_alpha", "swiglu_limit", "routed_scaling_factor",
)  # fmt: skip
LISTS = ("layer_types", "mlp_only_layers", "no_rope_layers", "moe_layers")
ROPE_ANY = frozenset("rope_type type rope_theta partial_rotary_factor".split())
ROPE_WORDS = frozenset("rope_type type truncate finetuned".split())
ROPE_LISTS = ("short_factor", "long_factor")
OLD_ROPE_TYPES = {"su": "longrope"}
# A zero stands for the default in transformers.
ROPE_NULL = frozenset("beta_fast beta_slow mscale mscale_all_dim".split())
# Rope type -> (keys that it needs, keys that it may have); a null counts as absent.
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        tuple(
            """original_max_position_embeddings attention_factor beta_fast beta_slow mscale
            mscale_all_dim truncate finetuned""".split()
        ),
    ),
    "longrope": (
        ROPE_LISTS,
        ("factor", "attention_factor", "original_max_position_embeddings"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
}


def check(
    hf: Mapping[str, Any], own: Iterable[str] = (), only: dict[str, tuple] | None = None
) -> None:
    """Raises ValueError for a field that is unknown here or missing, or a value not honoured.

    `own` are fields that the family reads itself, whatever their value; of those in `only` it
    knows these values.
    """
    own, only = set(own), only or {}
    fixed = {name: values for name, values in FIXED.items() if name not in own} | only
    own |= set(only)
    known = HARMLESS | DENSE | set(FIXED) | own
    # Private names and token ids say how a file came about and what a sampler does.
    unknown = [
        k for k in sorted(set(hf) - known) if not (k.startswith("_") or k.endswith("_token_id"))
    ]
    if unknown:
        raise ValueError(
            f"config of {hf.get('model_type')!r} has fields that are not understood: "
            + ", ".join(f"{k}={hf[k]!r}" for k in unknown)
            + f"; understood: {sorted(DENSE | own)}"
        )
    missing = [name for name in REQUIRED if hf.get(name) is None]
    if missing:
        raise ValueError(f"config of {hf.get('model_type')!r} lacks {missing}, got {sorted(hf)}")
    for name, values in fixed.items():
        if name in hf and hf[name] not in values:
            raise ValueError(
                f"config field {name}={hf[name]!r} is not supported; supported: {values}"
            )
    activation(hf)
    _kinds(hf)
    _heads(hf)


def _number(value: Any) -> bool:
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and math.isfinite(value) and value > 0


def _kinds(hf: Mapping[str, Any]) -> None:
    """Raises ValueError with every count, number and switch that is none; null means absent."""
    wrong = [
        f"{name}={hf[name]!r}, expected a whole number over 0"
        for name in COUNTS
        if hf.get(name) is not None and not _whole(hf[name])
    ]
    wrong += [
        f"{name}={hf[name]!r}, expected true or false"
        for name in SWITCHES
        if not isinstance(hf.get(name, False), bool | NoneType)
    ]
    wrong += [
        f"{name}={hf[name]!r}, expected a number over 0"
        for name in NUMBERS
        if hf.get(name) is not None and not _number(hf[name])
    ]
    wrong += [
        f"{name}={hf[name]!r}, expected a list"
        for name in LISTS
        if not isinstance(hf.get(name), list | tuple | NoneType)
    ]
    if "rms_norm_eps" in hf and hf["rms_norm_eps"] is None:
        wrong.append("rms_norm_eps=None, expected a number over 0")
    if wrong:
        raise ValueError(f"config of {hf.get('model_type')!r} has " + "; ".join(wrong))


def counts(hf: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError with every field of these that is no whole number over 0."""
    wrong = [f"{n}={hf[n]!r}" for n in names if not _whole(hf[n])]
    if wrong:
        raise ValueError(
            f"config of {hf.get('model_type')!r} has {', '.join(wrong)}; expected whole numbers "
            "over 0"
        )


def _whole(value: Any) -> bool:
    return _number(value) and isinstance(value, Integral)


def _heads(hf: Mapping[str, Any]) -> None:
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}: "
            "expected as many queries for each"
        )
    if hf.get("head_dim") is None and width % heads:
        raise ValueError(
            f"hidden_size={width} is no multiple of num_attention_heads={heads}: expected one, "
            "or a head_dim"
        )


def activation(hf: Mapping[str, Any]) -> str:
    """The name of the gate's activation; raises ValueError for one that is not in the table."""
    name = hf.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not supported; supported: {sorted(ACTIVATIONS)}")
    return name


def sizes(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every dense decoder shares, in the core's words."""
    heads = hf["num_attention_heads"]
    return dict(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_width=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_width=hf["intermediate_size"],
        eps=hf.get("rms_norm_eps", 1e-6),
        activation=activation(hf),
    )


def experts(hf: Mapping[str, Any], default: int) -> dict[str, int]:
    """How many experts there are and how many a token goes to, in the core's words.

    Raises ValueError where both names of their number are there and differ, or a token can't go
    to so many.
    """
    found = {hf[name] for name in EXPERTS[:2] if hf.get(name) is not None} or {default}
    chosen = hf["num_experts_per_tok"]
    if len(found) > 1 or chosen > min(found):
        raise ValueError(
            f"num_experts={hf.get('num_experts')!r}, num_local_experts="
            f"{hf.get('num_local_experts')!r}, num_experts_per_tok={chosen}: expected one number "
            "of experts, and no more for each token"
        )
    return dict(experts=found.pop(), chosen=chosen)


def rope(hf: Mapping[str, Any], width: int, partial: bool = False) -> Rope:
    """Rotary settings from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` (4).

    `width` is a head's; with `partial` the config may have a share of it turn. Raises ValueError
    for an unknown type or key, or a missing one. Source: transformers `modeling_rope_utils`.
    """
    r, context = _rope_fields(hf)
    share = r.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1
    if share != 1 and not (partial and 0 < share < 1):
        raise ValueError(
            f"partial_rotary_factor={share} is not supported: "
            + ("expected over 0 and at most 1" if partial else "only 1")
        )
    width = int(width * share)
    if width % 2:
        raise ValueError(
            f"rope turns pairs, and what it turns of a head is {width} wide: expected an even "
            "head_dim"
        )
    kind, longest = r["rope_type"], hf.get("max_position_embeddings", 2048)
    own: dict[str, Any] = {}
    if kind == "dynamic":
        own = dict(context=longest)
    if kind == "llama3":
        own = dict(low=float(r["low_freq_factor"]), high=float(r["high_freq_factor"]))
        own |= dict(context=context or longest)
    if kind == "yarn":
        own = _yarn(r) | dict(context=context or longest)
    if kind == "longrope":
        own = _longrope(r, width, context or longest)
    theta, factor = r.get("rope_theta") or hf.get("rope_theta") or 1e4, r.get("factor", 1.0)
    return Rope(kind, float(theta), width, factor=float(factor), **own)


def _rope_fields(hf: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """(the checked fields that are set, the original context)."""
    old, new = hf.get("rope_scaling"), hf.get("rope_parameters")
    for name, given in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(given, Mapping | NoneType):
            raise ValueError(f"{name}={given!r}, expected an object with {sorted(ROPE_ANY)}")
    if old and new and old != new:
        raise ValueError(f"config has both rope_scaling={old} and rope_parameters={new}")
    thetas = {x for x in (hf.get("rope_theta"), (new or {}).get("rope_theta")) if x is not None}
    if len(thetas) > 1:
        raise ValueError(f"config has rope_theta={hf['rope_theta']} and rope_parameters={new}")
    r = {key: value for key, value in (old or new or {}).items() if value is not None}
    kind = r.get("rope_type", r.get("type", "default"))
    kind = r["rope_type"] = OLD_ROPE_TYPES.get(kind, kind)
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {list(ROPE_KEYS)}")
    needed, optional = ROPE_KEYS[kind]
    unknown = sorted(set(r) - ROPE_ANY - {*needed, *optional})
    if unknown:
        raise ValueError(
            f"rope keys {unknown} are not understood with rope type {kind!r}; "
            f"understood: {sorted(ROPE_ANY | {*needed, *optional})}"
        )
    _rope_numbers(kind, r | {"rope_theta": r.get("rope_theta") or hf.get("rope_theta") or 1e4})
    context = hf.get("original_max_position_embeddings") or r.get(
        "original_max_position_embeddings"
    )
    if kind in ("yarn", "longrope") and context:
        r.setdefault("factor", hf.get("max_position_embeddings", 2048) / context)
    missing = [key for key in needed if key not in r]
    if missing:
        raise ValueError(f"rope type {kind!r} needs {missing}, got {r}")
    return r, context


def _rope_numbers(kind: str, r: Mapping[str, Any]) -> None:
    """Raises ValueError with every value that is no number over 0, `truncate` and names aside."""
    wrong = [
        f"{key}={value!r}"
        for key, value in r.items()
        if key not in (*ROPE_WORDS, *ROPE_LISTS)
        and not _number(value)
        and not (key in ROPE_NULL and value == 0)
    ]
    if wrong:
        raise ValueError(f"rope type {kind!r} has {', '.join(wrong)}; expected numbers over 0")
    if not isinstance(r.get("truncate", True), bool):
        raise ValueError(f"rope key truncate={r['truncate']!r}, expected true or false")
    low, high = r.get("low_freq_factor"), r.get("high_freq_factor")
    if low is not None and high is not None and low > high:
        raise ValueError(f"high_freq_factor is below low_freq_factor={low}, got {high}")


def _longrope(r: Mapping[str, Any], width: int, context: int) -> dict[str, Any]:
    for name in ROPE_LISTS:
        numbers = r[name]
        if not (isinstance(numbers, list | tuple) and all(map(_number, numbers))):
            raise ValueError(f"rope key {name}={numbers!r}, expected a list of numbers over 0")
        if len(numbers) != width // 2:
            raise ValueError(f"{name} has {len(numbers)} numbers, expected {width // 2}")
    attention = r.get("attention_factor")
    if attention is None:
        grown = r.get("factor", 1.0)
        attention = 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(context))
    lists = {short: tuple(map(float, r[f"{short}_factor"])) for short in ("short", "long")}
    return dict(attention_factor=float(attention), context=context, **lists)


def yarn_growth(hf: Mapping[str, Any], factor: float | int) -> float:
    """What DeepSeek's yarn multiplies queries and keys with, besides cos and sin."""
    by = _rope_fields(hf)[0].get("mscale_all_dim")
    return _growth(factor, by) if by else 1.0


def _growth(factor: float | int, by: float | int = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn(r: Mapping[str, Any]) -> dict[str, Any]:
    grow = lambda by=1.0: _growth(r["factor"], by)
    attention = r.get("attention_factor")
    if attention is None:
        m, all_dim = r.get("mscale"), r.get("mscale_all_dim")
        attention = grow(m) / grow(all_dim) if m and all_dim else grow()
    return dict(
        attention_factor=float(attention),
        beta_fast=float(r.get("beta_fast") or 32),
        beta_slow=float(r.get("beta_slow") or 1),
        truncate=r.get("truncate", True),
    )


def windows(hf: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer of a Qwen-style config, None for full attention."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        return tuple(window if window is not None and i >= first else None for i in range(layers))
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            "layer_types has sliding_attention but use_sliding_window or sliding_window is not set"
        )
    return tuple(window if sliding else None for sliding in sliding_layers(hf, layers, 0))


def sliding_layers(hf: Mapping[str, Any], layers: int, pattern: int) -> tuple[bool, ...]:
    """Whether each layer has a window: by `layer_types`, or all but every `pattern`-th."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return tuple((i + 1) % pattern != 0 for i in range(layers))
    known = ("full_attention", "sliding_attention")
    wrong = sorted(set(kinds) - set(known))
    if wrong or len(kinds) != layers:
        raise ValueError(
            f"layer_types must be {layers} of {sorted(known)}, "
            f"got {len(kinds)} with {wrong or 'no unknown'}"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)
