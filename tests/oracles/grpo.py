"""Makes tests/data/grpo.json: runs of TRL's GRPOTrainer with PEFT, step by step, an evaluation.

PYTHONPATH=.:tests python tests/oracles/grpo.py    (with trl and peft installed)

Float32 on a CPU, prompts in their order, completions and rewards of tests/grpo_runs.py, the
adapters that `grpo_runs.model` starts from. TRL's shuffling of what was sampled is left out.
"""

import json
import tempfile
from pathlib import Path

import datasets
import grpo_runs
import peft
import tiny_chat
import transformers
import trl
from trl.trainer import grpo_trainer

FILE = Path(__file__).parents[1] / "data" / "grpo.json"
CPU = dict(
    use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
    disable_tqdm=True, seed=1,
)  # fmt: skip
KEPT = (
    "loss", "grad_norm", "learning_rate", "reward", "rewards/", "frac_reward", "kl", "entropy",
    "clip_ratio/", "cispo", "vespo", "completions/", "num_tokens", "eval_",
)  # fmt: skip


def injected(tokenizer):
    """A rollout_func that gives the recorded completions, one generation after another."""
    count = 0

    def rollout(prompts, trainer):
        nonlocal count
        # A prompt stands in `prompts` once for each of its completions.
        number = count if trainer.model.training else grpo_runs.HELD_OUT
        found = grpo_runs.completions(number, len(prompts) // grpo_runs.GROUP)
        count += trainer.model.training
        ids = [
            tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
        return {"prompt_ids": ids, "completion_ids": found, "logprobs": None}

    return rollout


def trainer(settings: dict, folder: Path, output: Path) -> trl.GRPOTrainer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = tiny_chat.reference(folder)
    model = peft.PeftModel.from_pretrained(base, output / "start", is_trainable=True)
    args = trl.GRPOConfig(output_dir=str(output / "out"), **(grpo_runs.LOOP | CPU | settings))
    rows = datasets.Dataset.from_list(grpo_runs.TEXTS)
    return trl.GRPOTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows,
        reward_funcs=grpo_runs.reward, processing_class=tokenizer,
        rollout_func=injected(tokenizer),
    )  # fmt: skip


def steps(settings: dict, folder: Path, output: Path) -> list[dict[str, float]]:
    run = trainer(settings, folder, output)
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if k.startswith(KEPT)} for row in rows]


def main() -> None:
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    output = Path(tempfile.mkdtemp())
    folder = tiny_chat.save(output / "model")
    grpo_runs.model(folder).save_pretrained(output / "start")
    runs = {name: steps(how, folder, output) for name, how in grpo_runs.RUNS.items()}
    rows = len(grpo_runs.TEXTS) * grpo_runs.GROUP
    held_out = trainer(dict(per_device_eval_batch_size=rows), folder, output).evaluate()
    held_out = {name: x for name, x in held_out.items() if x is not None}
    versions = {m.__name__: m.__version__ for m in (trl, peft, transformers)}
    found = json.loads(
        json.dumps({"versions": versions, "runs": runs, "evaluation": held_out}),
        parse_float=lambda x: float(f"{float(x):.8g}"),
    )
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
