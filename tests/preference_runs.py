"""The runs that TRL's preference trainers and ours take alike: rows, settings, start."""

from pathlib import Path

import tiny_chat

from unsloth_jax import FastLanguageModel
from workflows.model import Model

STEPS = 8
TEXTS = [
    {"prompt": q, "chosen": f" {a}", "rejected": f" {tiny_chat.PAIRS[(n + 3) % 8][1]}"}
    for n, (q, a) in enumerate(tiny_chat.PAIRS)
]
said = lambda role, text: [{"role": role, "content": text}]
TALKS = [
    {
        "prompt": said("user", row["prompt"]),
        "chosen": said("assistant", row["chosen"].strip()),
        "rejected": said("assistant", row["rejected"].strip()),
    }
    for row in TEXTS
]
IMPLICIT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in TALKS]
JUDGED = [
    {
        "prompt": row["prompt"],
        "completion": row["chosen" if n % 3 else "rejected"],
        "label": bool(n % 3),
    }
    for n, row in enumerate(TEXTS)
]
LOOP: dict = dict(
    gradient_accumulation_steps=1, learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2,
    weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", max_length=64, max_steps=STEPS,
    logging_steps=1, train_sampling_strategy="sequential",
)  # fmt: skip
# Trainer, rows, settings. TRL takes ORPO's and CPO's cross entropy and KTO's KL a micro-batch.
RUNS = {
    "dpo": ("DPO", TEXTS, dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)),
    "dpo_ipo": ("DPO", TEXTS, dict(per_device_train_batch_size=4, loss_type="ipo", beta=0.5)),
    "dpo_mixed": (
        "DPO", TEXTS,
        dict(
            per_device_train_batch_size=4, loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
        ),
    ),
    "orpo": ("ORPO", TEXTS, dict(per_device_train_batch_size=4, beta=0.2)),
    "simpo": (
        "CPO", TEXTS,
        dict(per_device_train_batch_size=4, loss_type="simpo", cpo_alpha=0.0, beta=2.0),
    ),
    "cpo": ("CPO", TEXTS, dict(per_device_train_batch_size=4, label_smoothing=0.1)),
    "kto": ("KTO", JUDGED, dict(per_device_train_batch_size=4, desirable_weight=0.8)),
}  # fmt: skip


def model(folder: Path) -> Model:
    """The tiny chat model with adapters that have left zero, as after SFT."""
    return tiny_chat.adapted(folder)


def fresh(base: Model, seed: int = 3407) -> Model:
    """The model with new adapters, which change nothing yet."""
    base.adapters = None
    return FastLanguageModel.get_peft_model(base, r=4, lora_alpha=8, random_state=seed)
