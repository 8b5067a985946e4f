"""What decides which batch and which update comes next: a checkpoint goes on with the same only."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge.export import text_hash
from unsloth_jax.data import Row
from workflows.run import short_hash

# Settings with which the next batch or the next update would be another one.
DECISIVE = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "optim", "optim_args", "embedding_learning_rate",
    "loraplus_lr_ratio", "packing", "seed", "packing_strategy", "train_sampling_strategy",
    "group_by_length", "pad_to_multiple_of",
)  # fmt: skip
# Settings by which examples become rows; where all rows are known, their digest tells.
READING = ("dataset_text_field", "completion_only_loss", "assistant_only_loss", "truncation")


def of(trainer: Any, total: int, data: dict[str, Any]) -> dict[str, Any]:
    """A run's of `total` steps, as JSON; `data` are those that tell its rows from others."""
    a, m = trainer.args, trainer.model
    found = {name: getattr(a, name) for name in DECISIVE} | {
        "loss": trainer.objective.name,
        "steps in all": total,
        "warm-up steps": a.warmup(total),
        "length": trainer.length,
        "base model": [Path(m.name).name, str(m.dtype), m.stored],
        "adapter scale": m.scale,
        "initial pairs": short_hash(m.initial) if m.initial else None,
        "optimizers": [x is not None for x in trainer.optimizers],
        "rate follows": _followed(trainer) if a.follows else None,
        "fp8": a.matmul_dtype if a.matmul_dtype != "bf16" else None,
    }
    return json.loads(json.dumps(found | data))


def _followed(trainer: Any) -> dict[str, Any]:
    """Which metric moves the learning rate, and when."""
    names = ("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps")
    rows = {name: trainer._digest(some) for name, some in trainer.eval_rows.items()}
    return {name: getattr(trainer.args, name) for name in names} | {"eval_dataset": rows}


def streamed(trainer: Any, first: Sequence[Row]) -> dict[str, Any]:
    """What tells a stream apart, of which only the `first` rows are known."""
    template = getattr(trainer.tokenizer, "chat_template", None)
    hashed = text_hash(template if isinstance(template, str) else None)
    how = {name: getattr(trainer.args, name) for name in READING}
    return {"data": f"streamed, first {digest(first)}", "chat template sha256": hashed} | how


def digest(rows: Sequence[Any]) -> str:
    """What tells data sets apart in checkpoints."""
    data = json.dumps(rows)
    return f"{len(rows)} rows, sha256 {hashlib.sha256(data.encode()).hexdigest()}"
