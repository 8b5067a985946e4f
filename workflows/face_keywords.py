"""The keywords of from_pretrained and get_peft_model: those used, without effect, for later."""

from workflows.inputs import SEEDS

LOAD_KINDS = {
    "model_name": str, "max_seq_length": int, "load_in_4bit": bool, "load_in_8bit": bool,
    "load_in_16bit": bool, "full_finetuning": bool, "resize_model_vocab": int | None,
    "token": str | bool | None, "revision": str | None, "cache_dir": str | None,
    "local_files_only": bool, "use_exact_model_name": bool,
}  # fmt: skip
LOAD_NAMES = ("model_name", "revision", "cache_dir")
LOAD_USED = (
    "model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit",
    "token", "device_map", "revision", "cache_dir", "local_files_only", "full_finetuning",
    "resize_model_vocab", "use_exact_model_name",
)  # fmt: skip
PEFT_USED = (
    "r", "target_modules", "lora_alpha", "layers_to_transform", "finetune_last_n_layers",
    "use_gradient_checkpointing", "random_state", "use_rslora", "init_lora_weights",
    "memory_budget", "lora_dropout", "modules_to_save", "loftq_config", "use_dora",
    "target_parameters",
)  # fmt: skip
LOAD_LATER = {
    "load_in_fp8": (False, None),
    "rope_scaling": (None,),
    "offload_embedding": (False, None),
    "float32_mixed_precision": (None, True),
    "fast_inference": (False, None),
    "float8_kv_cache": (False, None),
    "qat_scheme": (None,),
    "unsloth_tiled_mlp": (False, None),
    "text_only": (False, None),
    "num_labels": (None,),
    "quantization_config": (None,),
    "trust_remote_code": (False, None),
    "subfolder": (None, ""),
    "variant": (None,),
    "config": (None,),
    "id2label": (None,),
    "label2id": (None,),
    "gguf_file": (None,),
    "unsloth_vllm_standby": (False, None),
}
LOAD_IGNORED = {
    "fix_tokenizer": "the tokenizer is read and never altered",
    "use_gradient_checkpointing": "it is set by get_peft_model",
    "gpu_memory_utilization": "no second engine shares the GPU",
    "random_state": "loading draws nothing",
    "max_lora_rank": "adapters of any rank are sampled from",
    "disable_log_stats": "no second engine writes statistics",
    "attn_implementation": "attention is chosen by device and shape",
}
PEFT_LATER = {
    "bias": ("none", None),
    "layers_pattern": (None,),
    "qat_scheme": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}
PEFT_IGNORED = {
    "max_seq_length": "the length given to from_pretrained stands",
    "temporary_location": "nothing is spilled to disk",
    "task_type": "the model is a causal language model",
    "ensure_weight_tying": "tied embedding and head always stay one matrix",
}
PEFT_KINDS = {
    "lora_alpha": float, "use_rslora": bool, "random_state": int, "init_lora_weights": bool | str,
    "use_dora": bool, "lora_dropout": float,
}  # fmt: skip
PEFT_RANGES = {"random_state": SEEDS["seed"], "lora_dropout": (0, 1, "below")}
