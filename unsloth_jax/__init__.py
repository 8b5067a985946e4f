"""Fine-tuning of language models in functional JAX.

The core is pure. The names of the face are loaded from `workflows` on first use, so that
`import unsloth_jax.models` loads neither transformers nor gguf.
"""

_HOMES = {
    "FastLanguageModel": "workflows.face",
    "is_bfloat16_supported": "workflows.face",
    "add_new_tokens": "workflows.vocabulary",
    "compile_cache": "workflows.compile_cache",
    "SFTConfig": "workflows.sft_config",
    "SFTTrainer": "workflows.sft_trainer",
    "train_on_responses_only": "workflows.responses_only",
    "DPOConfig": "workflows.preference_config",
    "DPOTrainer": "workflows.dpo_trainer",
    "ORPOConfig": "workflows.preference_config",
    "ORPOTrainer": "workflows.orpo_trainer",
    "CPOConfig": "workflows.preference_config",
    "CPOTrainer": "workflows.cpo_trainer",
    "KTOConfig": "workflows.preference_config",
    "KTOTrainer": "workflows.kto_trainer",
    "GRPOConfig": "workflows.grpo_config",
    "GRPOTrainer": "workflows.grpo_trainer",
    "SamplingParams": "workflows.sampling_params",
    "Episode": "workflows.custom_rollout",
    "continuations": "workflows.custom_rollout",
    "PatchDPOTrainer": "workflows.dpo_trainer",
    "PatchKTOTrainer": "workflows.dpo_trainer",
    "get_chat_template": "bridge.chat_templates",
    "standardize_sharegpt": "bridge.chat_templates",
    "standardize_data_formats": "bridge.chat_templates",
}


def __getattr__(name: str):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'unsloth_jax' has no attribute {name!r}; it has {sorted(_HOMES)}")


def __dir__():
    return sorted([*globals(), *_HOMES])
