"""PEFT's LoraConfig, or a dictionary of its fields, as get_peft_model's keywords."""

from collections.abc import Mapping
from typing import Any

from workflows.face import FastLanguageModel
from workflows.keywords import neutral, shown
from workflows.model import Model

# LoraConfig's own defaults, where they are others than get_peft_model's.
DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": ("q_proj", "v_proj")}
PASSED = (
    "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "loftq_config",
    "target_parameters",
)  # fmt: skip
IGNORED = (
    "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
)  # fmt: skip
# Other fields mean nothing while they hold one of these.
OFF = (None, False, "", "none", [], {}, ())


def adapt(model: Model, config: Any, seed: int) -> None:
    """Gives the model the adapters of `config`, their start drawn from `seed`, as TRL does.

    Raises TypeError for what is no LoraConfig, ValueError for a field that is not supported.
    """
    FastLanguageModel.get_peft_model(
        model, random_state=seed, memory_budget=model.memory_budget, **keywords(config)
    )


def keywords(config: Any) -> dict[str, Any]:
    """Fields as get_peft_model's keywords; a set of modules by its sorted names."""
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) else config
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"peft_config must be PEFT's LoraConfig or a dictionary of its fields, got "
            f"{shown(config)}"
        )
    kind = getattr(fields.get("peft_type", "LORA"), "value", fields.get("peft_type", "LORA"))
    neutral("peft_config", "peft_type", kind, ("LORA", None))
    for name, value in fields.items():
        if name not in (*PASSED, *IGNORED):
            neutral("peft_config", name, value, OFF)
    given = {name: fields[name] for name in PASSED if fields.get(name) is not None}
    given = DEFAULTS | given
    if isinstance(given["target_modules"], set | frozenset):
        given["target_modules"] = sorted(given["target_modules"])
    return given
