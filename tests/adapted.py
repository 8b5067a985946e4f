"""LoRA settings, one for each way to choose modules, here and in PEFT on torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import tiny
import torch

from bridge import peft_adapter
from bridge.peft_adapter import Settings
from unsloth_jax import lora, tree

SOME_LAYERS = r"model\.layers\.(0|2)\.mlp\.(up|down)_proj"
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LLAMA4 = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
LORA = {
    "llama": Settings(4, 8.0, targets=lora.TARGETS),
    "mistral": Settings(4, 6.0, rslora=True, targets=("q_proj", "v_proj")),
    "qwen2": Settings(3, 7.5, targets="all-linear", start="gaussian"),
    "qwen3": Settings(4, 16.0, targets=("k_proj", "o_proj", "gate_proj"), layers=(0, 2)),
    "llama_tied_biased": Settings(2, 8.0, targets=SOME_LAYERS),
    "ministral3": Settings(3, 6.0, targets="all-linear"),
    "gemma": Settings(2, 4.0, targets=("q_proj", "o_proj", "up_proj")),
    "gemma2": Settings(3, 6.0, targets="all-linear"),
    "gemma3_text": Settings(2, 4.0, targets=lora.TARGETS, layers=(1, 2)),
    "phi3": Settings(4, 8.0, targets=("qkv_proj", "gate_up_proj", "o_proj", "down_proj")),
    "granite": Settings(2, 4.0, targets="all-linear"),
    "cohere": Settings(2, 4.0, targets=("q_proj", "v_proj", "down_proj")),
    "cohere2": Settings(3, 6.0, targets="all-linear"),
    "olmo2": Settings(2, 4.0, targets=lora.TARGETS, layers=(0,)),
    "smollm3": Settings(2, 4.0, targets="all-linear", start="gaussian"),
    "starcoder2": Settings(2, 4.0, targets=("q_proj", "c_fc", "c_proj")),
    "glm4": Settings(2, 4.0, targets=("k_proj", "gate_up_proj", "down_proj")),
    "exaone4": Settings(2, 4.0, targets="all-linear", rslora=True),
    "qwen3_5_text": Settings(3, 9.0, targets="all-linear"),
    "falcon_h1": Settings(2, 4.0, targets=("in_proj", *lora.TARGETS)),
    "mixtral": Settings(2, 4.0, targets=("q_proj", *EXPERTS)),
    "qwen3_moe": Settings(3, 6.0, targets=("k_proj", "o_proj", *EXPERTS)),
    "qwen3_moe_unnormed": Settings(2, 4.0, targets=("q_proj", "mlp.experts.down_proj")),
    "glm4_moe": Settings(2, 4.0, targets=("q_proj", "o_proj", *EXPERTS)),
    "deepseek_v3": Settings(
        3,
        6.0,
        targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *EXPERTS),
    ),
    "deepseek_v3_whole_queries": Settings(2, 4.0, targets=("q_proj", "kv_b_proj")),
    "qwen3_next": Settings(
        4,
        16.0,
        targets=(
            "q_proj",
            "in_proj_qkvz",
            "in_proj_ba",
            "out_proj",
            "shared_expert_gate",
            *EXPERTS,
        ),
    ),
    "gpt_oss": Settings(2, 4.0, targets=("q_proj", "o_proj", *EXPERTS)),
    "llama4_text": Settings(2, 4.0, targets=("q_proj", "shared_expert.down_proj", *LLAMA4)),
    "llama4_text_unnormed": Settings(
        3, 6.0, targets=("v_proj", "feed_forward.experts.gate_up_proj")
    ),
    "llama_gelu": Settings(2, 8.0, targets=("lm_head", "down_proj"), layers=(1,)),
}


def scale(s: Settings) -> float:
    """What the product of a pair is multiplied with."""
    return lora.scaling(s.alpha, s.rank, s.rslora)


def drawn(params, s: Settings, seed: int = 5):
    """Adapters of these settings with `b` random, so that they change the result."""
    adapters = lora.init(jax.random.key(seed), params, s.rank, s.targets, s.layers, s.start)
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)
    return tree.map_paths(lambda p, x: jax.tree.map(fill, x) if p.endswith(".b") else x, adapters)


def in_peft(name: str, s: Settings, seed: int = 9) -> peft.PeftModel:
    """PEFT's own adapter of the same settings on transformers' model, `lora_B` redrawn.

    Both sides come from `seed`: of 16 draws of qwen2's, whose scale is large, one put two float32
    programs 1.1e-4 of the logits' spread apart, torch's own 4e-5 from float64.
    """
    targets = s.targets if isinstance(s.targets, str) else list(s.targets)
    experts = [name for name in targets if ".experts." in name] if s.targets != targets else []
    if experts:
        targets = [name for name in targets if name not in experts]
    fields = peft.LoraConfig(
        task_type="CAUSAL_LM", r=s.rank, lora_alpha=s.alpha, use_rslora=s.rslora,
        target_modules=targets, target_parameters=experts or None,
        layers_to_transform=s.layers and list(s.layers),
        init_lora_weights=s.start, lora_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny.reference(name), fields).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(torch.tensor(rng.normal(0, 0.2, p.shape)))
    return model


def names_adapted(params, targets, layers=None) -> set[str]:
    """Full names of the modules that `lora.modules` chooses."""
    found = lora.modules(params, targets, layers)
    return {p.replace("*", str(i), 1) for p, ids in found.items() for i in ids or (0,)}


def read_config(folder: Path) -> dict:
    """The content of an adapter folder's adapter_config.json."""
    return json.loads((folder / peft_adapter.CONFIG).read_text())
