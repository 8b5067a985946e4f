"""The GRPO runs that TRL's trainer and ours take alike: prompts, completions, rewards, settings."""

from pathlib import Path

import numpy as np
import tiny_chat

from workflows.model import Model

STEPS, GROUP, LONGEST = 8, 4, 14
HELD_OUT = 1000  # the number of the completions that evaluations are given
ROWS = [
    {"prompt": [{"role": "user", "content": q}] if n % 2 else q, "answer": a}
    for n, (q, a) in enumerate(tiny_chat.PAIRS)
]
TEXTS = [{"prompt": q, "answer": a} for q, a in tiny_chat.PAIRS]
LOOP: dict = dict(
    gradient_accumulation_steps=1, per_device_train_batch_size=8, num_generations=GROUP,
    max_completion_length=LONGEST, learning_rate=5e-3, lr_scheduler_type="linear", warmup_steps=2,
    weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", max_steps=STEPS, logging_steps=1,
    shuffle_dataset=False, beta=0.0, epsilon_high=0.28, scale_rewards="group",
    mask_truncated_completions=False, loss_type="dapo", use_bias_correction_kl=True,
)  # fmt: skip
RUNS = {
    "dapo": dict(),
    "bnpo_kl": dict(loss_type="bnpo", beta=0.05),
    "grpo_twice": dict(loss_type="grpo", num_iterations=2, beta=0.04, learning_rate=2e-2),
    "dr_grpo": dict(loss_type="dr_grpo", scale_rewards="none"),
    "dapo_accumulated": dict(per_device_train_batch_size=4, gradient_accumulation_steps=2),
    "dapo_older": dict(steps_per_generation=2, scale_rewards="batch", learning_rate=2e-2),
    "gspo": dict(
        loss_type="grpo", importance_sampling_level="sequence", num_iterations=3, epsilon=3e-4,
        epsilon_high=4e-4,
    ),
    "cispo": dict(loss_type="cispo", num_iterations=2, epsilon_high=1.05),
    "sapo": dict(loss_type="sapo", num_iterations=2, learning_rate=2e-2),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", num_iterations=2),
    "vespo": dict(loss_type="vespo", num_iterations=2),
    "masked": dict(mask_truncated_completions=True, loss_type="grpo"),
    "entropy": dict(top_entropy_quantile=0.4),
    "two-sided": dict(num_iterations=3, delta=1.1, learning_rate=2e-2, temperature=0.7),
}  # fmt: skip

# SmolLM2's: two updates of each of five generations.
RUN: dict = LOOP | dict(
    max_completion_length=24, learning_rate=5e-4, warmup_steps=0, max_steps=10, num_iterations=2,
    loss_type="grpo", beta=0.04,
)  # fmt: skip


def completions(generation: int, prompts: int) -> list[list[int]]:
    """GROUP completions of each prompt, some of which end."""
    rng = np.random.default_rng(generation)
    found = []
    for _ in range(prompts * GROUP):
        ids = rng.integers(3, tiny_chat.VOCAB, rng.integers(2, LONGEST + 1)).tolist()
        ends = len(ids) < LONGEST
        found.append(ids[:-1] + [tiny_chat.EOS] if ends else ids)
    return found


def reward(completion_ids: list[list[int]], **columns) -> list[float]:
    return [(sum(ids) % 11) / 11 + len(ids) / LONGEST for ids in completion_ids]


def model(folder: Path) -> Model:
    """The tiny chat model with adapters that have left zero, as after SFT."""
    return tiny_chat.adapted(folder)
