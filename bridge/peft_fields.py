"""Which fields of PEFT's adapter_config.json are understood, and which are refused.

Names and meaning: peft 0.21 `LoraConfig`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# Starts that leave the base as it is: the pair in the file is the whole difference.
STARTS = (True, False, "gaussian", "orthogonal")
REQUIRED = ("peft_type", "r", "lora_alpha")
USED = frozenset(
    """r lora_alpha lora_dropout use_rslora use_dora target_modules target_parameters
    exclude_modules modules_to_save ensure_weight_tying layers_to_transform init_lora_weights
    base_model_name_or_path rank_pattern alpha_pattern
    revision""".split()
)
HARMLESS = frozenset(
    "auto_mapping peft_version inference_mode qalora_group_size megatron_core".split()
)
# Fields with one meaning that is understood; any other field has to be None, False or empty.
FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "layers_pattern": (None, [], "", "layers", ["layers"]),
}


def check(fields: Mapping[str, Any], where: str) -> None:
    """Raises one ValueError naming each field of an adapter_config.json that is not honoured."""
    wrong = [f"{name} is missing" for name in REQUIRED if fields.get(name) in (None, [], "")]
    targets = ("target_modules", "target_parameters")
    if all(fields.get(name) in (None, [], "") for name in targets):
        wrong.append("target_modules is missing")
    off = (None, False, "", [], {})
    for name, value in fields.items():
        allowed = FIXED.get(name, off)
        if name not in USED | HARMLESS and value not in allowed:
            wrong.append(f"{name}={value!r} is not supported; supported: {allowed}")
    if not isinstance(fields.get("r"), int) or fields["r"] < 1:
        wrong.append(f"r={fields.get('r')!r} is no rank, expected a positive integer")
    if fields.get("use_dora", False) not in (True, False):
        wrong.append(f"use_dora={fields['use_dora']!r} is neither true nor false")
    start = fields.get("init_lora_weights", True)
    if start not in STARTS:
        wrong.append(f"init_lora_weights={start!r} may change the base; supported: {STARTS}")
    if wrong:
        raise ValueError(f"{where}: " + "; ".join(wrong))


def names(pattern: str, module: str) -> bool:
    """PEFT's rule for the keys of `rank_pattern`: a regular expression for a name's end."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


class Own(NamedTuple):
    """One module's rank, and its scale over that of the adapter's `r` and `lora_alpha`."""

    rank: int
    factor: float


def own(fields: Mapping[str, Any], module: str, where: str) -> Own:
    """What `rank_pattern` and `alpha_pattern` give a module by its full name.

    Raises ValueError for a rank that is no positive integer, or an alpha that is no number.
    """
    found = {}
    for name, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        hits = (v for key, v in (fields.get(name) or {}).items() if names(key, module))
        found[usual] = value = next(hits, fields[usual])
        kind = int if usual == "r" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            said = f"{name} or {usual} gives {module} {value!r}, expected a number over 0"
            raise ValueError(f"{where}: {said}")
    under = math.sqrt if fields.get("use_rslora") else float
    scale, usual = (x["lora_alpha"] / under(x["r"]) for x in (found, fields))
    return Own(found["r"], 1.0 if math.isclose(scale, usual) else scale / usual)
