"""GGUF metadata -> the config.json a Hugging Face folder of the same model would have.

Keys as llama.cpp's converter writes them; rope_parameters as transformers 5 spells them.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge import gguf_architectures
from bridge.gguf_experts import MARK
from bridge.gguf_header import GGUF
from unsloth_jax.models import FAMILIES

# Of the classes in transformers, those that are not called as their model_type.
CLASSES = {
    "deepseek_v3": "DeepseekV3",
    "falcon_h1": "FalconH1",
    "gemma3_text": "Gemma3",
    "glm4_moe": "Glm4Moe",
    "gpt_oss": "GptOss",
    "llama4_text": "Llama4",
    "qwen3_5_text": "Qwen3_5",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "smollm3": "SmolLM3",
}
# Architecture -> the family that reads it; of the three in llama's files keys decide.
AS_LLAMA = ("mistral", "mixtral")
FAMILY_OF = {
    module.GGUF_ARCH: name
    for name, module in FAMILIES.items()
    if hasattr(module, "from_gguf") and name not in AS_LLAMA
}
ARCHITECTURES = tuple(FAMILY_OF)
WINDOW = "attention.sliding_window"

NEEDED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    "attention.head_count",
)
RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
READ = {
    *NEEDED,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}
# Keys that change nothing at the value given here; None: whatever the value.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "rope.scaling.finetuned": None,
    "rope.scaling.yarn_ext_factor": 1,
    "tensor_data_layout": "Meta AI original pth",
}
ATTENTION = "rope.scaling.attn_factor"
SIGNED = ("rope.scaling.yarn_log_multiplier",)
FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
YARN_NAMES = {
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Llama 3's constants; only original / low and original / high matter, so low stays 1.
LOW, HIGH = 1.0, 4.0
WITHOUT_RAMP = ("llama4",)  # architectures where both may be LOW
ORIGINAL_CONTEXTS = (8192, *(2**power for power in range(4, 21) if power != 13))


def architecture(file: GGUF) -> str:
    """The file's architecture. Raises ValueError where it is not one of ARCHITECTURES."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"{file.path}: GGUF architecture {name!r}; known: {list(ARCHITECTURES)}")
    return name


def family_of(file: GGUF) -> str:
    """The model_type of the family that reads the file."""
    arch = architecture(file)
    if arch == "llama" and file.metadata.get(f"{arch}.expert_count"):
        return "mixtral"
    mistral = arch == "llama" and f"{arch}.{WINDOW}" in file.metadata
    return "mistral" if mistral else FAMILY_OF[arch]


def hyperparameters(file: GGUF) -> dict[str, Any]:
    """The architecture's keys without their prefix; per-layer lists must repeat one value.

    Raises ValueError naming a missing key, an unknown one, or one whose value is not honoured.
    """
    arch = architecture(file)
    prefix, own = arch + ".", {*FAMILIES[family_of(file)].GGUF_READS}
    eps = LAYER_EPS if gguf_architectures.ARCHITECTURES[arch].layer_norm else RMS_EPS
    stated = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    found = {k: v if k in own else _uniform(file, prefix + k, v) for k, v in stated.items()}
    unknown = sorted(set(found) - READ - {eps} - own - set(NEUTRAL))
    if unknown:
        raise ValueError(f"{file.path}: metadata not understood: {unknown}")
    _numbers(file, found, READ | {eps}, own)
    for key, neutral in NEUTRAL.items():
        if neutral is not None and key not in own and found.get(key, neutral) != neutral:
            raise ValueError(
                f"{file.path}: {prefix}{key} is {found[key]!r}; only {neutral!r} is supported"
            )
    missing = [prefix + key for key in (*NEEDED, eps) if key not in found]
    if missing:
        raise ValueError(f"{file.path}: metadata keys are missing: {missing}")
    return found


def sizes(file: GGUF) -> dict[str, Any]:
    """Counts of layers and heads, of any architecture."""
    prefix = file.metadata["general.architecture"] + "."
    names = ("block_count", "attention.head_count", "attention.head_count_kv")
    found = {name: file.metadata.get(prefix + name) for name in names}
    return {n: _uniform(file, prefix + n, v) for n, v in found.items() if v is not None}


def config(
    file: GGUF,
    values: dict[str, Any],
    names: set[str],
    *,
    vocabulary: int,
    dtype: str,
    rope_factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """config.json of the model with these `hyperparameters` and weights `names` of `dtype`.

    `rope_factors` are the tensors of rope's frequencies, by their own names. Raises ValueError
    naming a value that is not honoured.
    """
    name, a = family_of(file), gguf_architectures.ARCHITECTURES[architecture(file)]
    family = FAMILIES[name]
    heads, width = values["attention.head_count"], values["embedding_length"]
    head_dim = values.get("attention.key_length", width // heads)
    _consistent(file, values, head_dim, vocabulary, family.GGUF_READS)
    values = {k: decimal(v) if isinstance(v, float) else v for k, v in values.items()}
    # Families that scale yarn by keys of their own take this one with those.
    scaled = {k: v for k, v in values.items() if k != ATTENTION or k not in family.GGUF_READS}
    rope = _rope(file, scaled, values.get("rope.dimension_count", head_dim), rope_factors)
    made = {
        "architectures": [f"{CLASSES.get(name, name.capitalize())}ForCausalLM"],
        "model_type": name,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": values["feed_forward_length"],
        "num_hidden_layers": values["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": a.activation,
        "max_position_embeddings": values["context_length"],
        "rope_parameters": rope,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "dtype": dtype,
    }
    made |= {} if a.layer_norm else {"rms_norm_eps": values[RMS_EPS]}
    try:
        own = family.from_gguf(values, names, rope)
    except KeyError as error:
        missing = f"{architecture(file)}.{error.args[0]}"
        raise ValueError(f"{file.path}: metadata keys are missing: {[missing]}") from None
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return made | own | _token_ids(file.metadata)


def decimal(value: float) -> float:
    """The shortest decimal that is `value` in float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _uniform(file: GGUF, key: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{file.path}: {key} differs by layer ({value}); one value is supported")
    return value[0]


def _numbers(file: GGUF, values: dict[str, Any], read: set[str], own: set[str]) -> None:
    """Raises ValueError where a key that sizes or scales the model is no positive number.

    Of `own`, a family's, zeros and lists are for the family.
    """
    for key in sorted((read | own) - {"rope.scaling.type", *SIGNED}):
        value = values.get(key, 1)
        if key in own and (isinstance(value, list) or value == 0):
            continue
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{file.path}: corrupt: {key} is {value!r}, not a positive number")
    if values.get("block_count", 0) > len(file.tensors):
        raise ValueError(
            f"{file.path}: corrupt: {values['block_count']} layers, {len(file.tensors)} tensors"
        )
    experts = values.get("expert_count", 0)
    held = {t.shape[0] for name, t in file.tensors.items() if MARK in name}
    if held != ({experts} if experts else set()):
        raise ValueError(
            f"{file.path}: expert_count is {experts}, tensors of experts have {sorted(held)}"
        )


def _consistent(
    file: GGUF, values: dict[str, Any], head_dim: int, vocabulary: int, own: tuple[str, ...]
) -> None:
    expected = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": vocabulary,
    }
    for key, wanted in expected.items():
        if key not in own and values.get(key, wanted) != wanted:
            raise ValueError(
                f"{file.path}: {key} is {values[key]}, the model has {wanted} (head_dim is "
                f"{head_dim}, token_embd.weight has {vocabulary} rows); nothing else is supported"
            )


def _token_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos, eos and pad ids; end-of-turn and end-of-message tokens end an answer like eos."""
    get = lambda name: metadata.get(f"tokenizer.ggml.{name}_token_id")
    ends = list(dict.fromkeys(get(name) for name in ("eos", "eot", "eom") if get(name) is not None))
    ids = {"bos_token_id": get("bos"), "pad_token_id": get("padding")}
    ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {key: value for key, value in ids.items() if value is not None}


def _rope(
    file: GGUF, values: dict[str, Any], width: int, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """rope_parameters; `width` is what turns of a head."""
    theta = decimal(values.get("rope.freq_base", 10000.0))
    if LONG in tensors:
        return _longrope(file, values, theta, tensors)
    factors = tensors.get(FACTORS)
    factor = decimal(values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0)))
    # llama.cpp takes a bare factor as linear.
    kind = values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file.path}: rope scaling {kind!r}; known: none, linear, yarn")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        kind = "default"
    if kind != "yarn" and values.get(ATTENTION, 1) != 1:
        raise ValueError(
            f"{file.path}: {ATTENTION} is {values[ATTENTION]!r} with rope scaling {kind!r}; "
            "it is read with 'yarn' only, elsewhere 1 is expected"
        )
    rope = {"rope_type": kind, "rope_theta": theta}
    if factors is not None and not np.all(factors == 1):
        if kind != "default":
            raise ValueError(f"{file.path}: rope_freqs.weight beside rope scaling {kind!r}")
        return rope | {"rope_type": "llama3"} | _llama3(file, theta, width, factors)
    if kind == "default":
        return rope
    return rope | {"factor": factor} | (_yarn(file, values, factor) if kind == "yarn" else {})


def _longrope(
    file: GGUF, values: dict[str, Any], theta: float, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    if SHORT not in tensors or ATTENTION not in values:
        raise ValueError(f"{file.path}: {LONG} without {SHORT} or {ATTENTION}")
    lists = {"long_factor": tensors[LONG], "short_factor": tensors[SHORT]}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "attention_factor": decimal(values[ATTENTION]),
    } | {key: [decimal(float(value)) for value in numbers] for key, numbers in lists.items()}


def _yarn(file: GGUF, values: dict[str, Any], factor: float) -> dict[str, Any]:
    """Yarn's keys; llama.cpp multiplies its own 1 + 0.1 ln(factor) by ATTENTION."""
    original = values.get("rope.scaling.original_context_length")
    if original is None:
        raise ValueError(f"{file.path}: yarn without rope.scaling.original_context_length")
    extras = {name: decimal(values[key]) for key, name in YARN_NAMES.items() if key in values}
    by = values.get(ATTENTION, 1)
    if by != 1:
        whole = decimal(by * (1.0 + 0.1 * math.log(factor)))
        stated = extras.setdefault("attention_factor", whole)
        if not math.isclose(stated, whole, rel_tol=1e-5):
            raise ValueError(
                f"{file.path}: rope.scaling.yarn_attn_factor is {stated}, but {ATTENTION}={by} "
                f"with factor {factor} makes {whole}; expected the same"
            )
    return {"original_max_position_embeddings": original} | extras


def _llama3(file: GGUF, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's parameters that give exactly `factors` [head_dim / 2].

    Raises ValueError where none of ORIGINAL_CONTEXTS does.
    """
    if factors.shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: rope_freqs.weight has shape {factors.shape}, head_dim is {head_dim}"
        )
    factor = float(f"{factors.max():.6g}")
    highs = (HIGH, LOW) if file.metadata.get("general.architecture") in WITHOUT_RAMP else (HIGH,)
    for high, original in itertools.product(highs, ORIGINAL_CONTEXTS):
        if np.allclose(llama3_factors(theta, head_dim, factor, original, high), factors, 1e-5, 0):
            return {
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ValueError(
        f"{file.path}: rope_freqs.weight is not Llama 3's scaling by {factor} for any original "
        f"context of {sorted(ORIGINAL_CONTEXTS)} with low_freq_factor {LOW}, high {highs}"
    )


def llama3_factors(
    theta: float, head_dim: int, factor: float, original: int, high: float = HIGH
) -> np.ndarray:
    """What Llama 3.1 divides each of the head_dim / 2 rope frequencies by."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - LOW) / max(high - LOW, 1e-6), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
