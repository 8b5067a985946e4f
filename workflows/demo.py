"""The README's first command: a real model fine-tuned, exported and run in llama.cpp.

python -m workflows.demo --output demo_output
"""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from bridge import export, hub, peft_adapter
from bridge import tokenizer as text
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.sample import Sampling
from workflows import demo_data, llama_cpp, machine
from workflows.generate import Answer
from workflows.model import Model

QUANTIZATIONS = ("q8_0", "q4_k_m")
LENGTH, NEW_TOKENS = 64, 20
SHOWN, CHECKED = 4, 8
IMPORTS = "from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer"
OWN_MODEL = """\
model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained("path/or/hub-name")[0])
SFTTrainer(model, train_dataset=rows, args=SFTConfig(max_steps=60, learning_rate=2e-4)).train()
model.save_pretrained_gguf("out", quantization_method="q4_k_m")"""


class Scored(NamedTuple):
    """Answers to the held-out requests and the share that is right to the last token."""

    texts: list[str]
    share: float


class Artefact(NamedTuple):
    """One row of the closing table."""

    path: str
    bytes: int
    verified: str


def config(seed: int, output: Path | None) -> SFTConfig:
    """How the demo trains; rows of at most 64 tokens, at most 30,000 padded tokens in all."""
    return SFTConfig(
        output_dir=None if output is None else str(output),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=110,
        optim="adamw_torch",
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=5,
        weight_decay=0.0,
        max_seq_length=LENGTH,
        packing=True,
        assistant_only_loss=True,
        logging_steps=1,
        seed=seed,
    )


def evaluated(model: Model, examples: Sequence[demo_data.Example]) -> Scored:
    """Greedy answers; one counts only if it is the record and then the end token, nothing else."""
    prompts = [
        text.ids(model.tokenizer, demo_data.prompt(e), add_generation_prompt=True) for e in examples
    ]
    found = model.answers(prompts, max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0))
    end = text.end_of_turn(model.tokenizer)
    expected = [(*text.ids(model.tokenizer, e.record), end) for e in examples]
    share = demo_data.score([tuple(a.tokens) for a in found], expected)
    return Scored([shown(model, a) for a in found], share)


def shown(model: Model, answer: Answer) -> str:
    body = answer.tokens[:-1] if answer.stopped else answer.tokens
    return model.tokenizer.decode(body).replace("\n", " ") + ("" if answer.stopped else " ...")


def load(seed: int) -> Model:
    """The embedded model in 4 bits with fresh adapters."""
    model, _ = FastLanguageModel.from_pretrained(str(hub.embedded_smollm2()), max_seq_length=128)
    # Rows are so short that keeping every activation costs less than computing it again.
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, random_state=seed, use_gradient_checkpointing=False
    )


def trained(seed: int, output: Path | None = None) -> tuple[Model, SFTTrainer, Scored, Scored]:
    """(model, trainer, score before, score after) of one seed."""
    model, data = load(seed), demo_data.split(seed)
    before = evaluated(model, data.held_out)
    trainer = SFTTrainer(
        model=model, train_dataset=demo_data.conversations(data.train), args=config(seed, output)
    )
    trainer.train()
    return model, trainer, before, evaluated(model, data.held_out)


def picture(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss of every step, and its running mean, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [row["step"] for row in history], [row["loss"] for row in history]
    smooth = [float(np.mean(losses[max(0, i - 7) : i + 1])) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="loss")
    axes.plot(steps, smooth, color="#1f4e9c", linewidth=2, label="mean of 8 steps")
    axes.set(xlabel="step", ylabel="cross entropy, nats a token")
    axes.set_title("QLoRA, SmolLM2-135M-Instruct")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def in_llama_cpp(path: Path, examples: Sequence[demo_data.Example]) -> list[str]:
    """llama.cpp's greedy answers to the same messages, through its own template and tokenizer."""
    said = llama_cpp.chat(path, [demo_data.prompt(e) for e in examples], NEW_TOKENS)
    return [answer.replace("\n", " ") for answer in said]


def agreement(ours: Sequence[str], theirs: Sequence[str], examples) -> str:
    """How llama.cpp did on the first requests."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    right = sum(a == e.record for a, e in zip(theirs, examples, strict=True))
    return f"ran in llama.cpp: {right} of {len(theirs)} records right, {same} answers equal ours"


def merged_agrees(folder: Path, model: Model, examples: Sequence[demo_data.Example]) -> str:
    """Loads the merged folder again and compares its answers with base plus adapter."""
    again, _ = FastLanguageModel.from_pretrained(str(folder), 128, load_in_4bit=False)
    messages = [row["messages"] for row in demo_data.conversations(examples)]
    rows = [text.conversation_row(model.tokenizer, m) for m in messages]
    batch, answers = np.zeros((2, len(rows), LENGTH), np.int32)
    there = np.zeros_like(batch)
    for i, (tokens, mask) in enumerate(rows):
        batch[i, : len(tokens)], there[i, : len(tokens)] = tokens, 1
        answers[i, : len(mask) - 1] = mask[1:]
    ours, theirs = (m(batch, there).argmax(-1)[answers == 1] for m in (model, again))
    same = (ours == theirs).sum()
    return f"loaded again: the likeliest token equal at {same} of {ours.size} places of answers"


def fresh(output: Path) -> None:
    """An empty folder; one that an earlier demo made is replaced, any other raises."""
    if output.exists() and any(output.iterdir()):
        if not (output / export.MANIFEST).exists():
            raise FileExistsError(f"{output} is not empty and no demo made it: choose another")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / export.MANIFEST).write_text("{}\n")


def artefact(path: Path, verified: str) -> Artefact:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return Artefact(path.name, sum(p.stat().st_size for p in files), verified)


def adapter(output: Path, model: Model) -> Artefact:
    """Saves the adapter and compares what is read back."""
    model.save_pretrained(output / "adapter")
    again, _ = peft_adapter.load(output / "adapter", model.params)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), model.adapters, again)
    if not jax.tree.all(equal):
        raise RuntimeError("the adapter read back differs from the one that was trained")
    return artefact(output / "adapter", "read back: every adapter equal")


def ggufs(output: Path, model: Model, after: Scored, examples) -> tuple[list[Artefact], dict, dict]:
    """(rows, llama.cpp's answers by file, what the exports say) of one GGUF a quantization."""
    facts = model.save_pretrained_gguf(output / "gguf", quantization_method=QUANTIZATIONS)
    rows, said = [], {}
    for fmt in QUANTIZATIONS:
        path = output / f"model.{fmt.upper()}.gguf"
        os.replace(output / "gguf" / path.name, path)
        said[path.name] = in_llama_cpp(path, examples)
        ran = agreement(after.texts, said[path.name], examples)
        found = facts["quantization"][path.name]
        rows.append(artefact(path, f"{rounding(found)}; {tokens(found['llama_cpp'])}; {ran}"))
    shutil.rmtree(output / "gguf")
    return rows, said, facts["quantization"]


def rounding(facts: dict[str, Any]) -> str:
    """What the export measured on one finished GGUF file."""
    worst = [f"{kind} {found['error']:.1%}" for kind, found in facts["rounding"].items()]
    return f"every tensor dequantised, largest error {', '.join(worst)}; {distance(facts)}"


def tokens(facts: dict[str, Any]) -> str:
    return f"llama.cpp's tokens are ours at {facts['equal']} of {facts['new_tokens']} places"


def distance(facts: dict[str, Any]) -> str:
    return f"KL to ours on general text {facts['kl_trained_to_written']:.2f}"


def before_and_after(console: Console, examples, before: Scored, after: Scored) -> None:
    table = Table(title="the same requests before and after", show_lines=True)
    for name in ("request", "expected", "before", "after"):
        table.add_column(name, overflow="fold")
    for e, old, new in zip(examples, before.texts, after.texts, strict=False):
        table.add_row(e.request, e.record, old[:80], new)
    console.print(table)


def closing(console: Console, rows: Sequence[Artefact], output: Path) -> None:
    table = Table(title=f"written to {output}")
    for name in ("path", "size", "verified"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for row in rows:
        table.add_row(row.path, f"{row.bytes / 1e6:,.1f} MB", row.verified)
    console.print(table)
    console.print(f"the loss curve: {output / 'loss.png'}\n\nthe same for your own model:\n")
    console.print(f"{IMPORTS}\n{OWN_MODEL}", highlight=False, markup=False, soft_wrap=True)


def side_by_side(console: Console, ours: Sequence[str], said: dict[str, list[str]]) -> None:
    table = Table(title="our answers and llama.cpp's", show_lines=True)
    for name in ("ours", *said):
        table.add_column(name, overflow="fold")
    for i, answer in enumerate(ours):
        table.add_row(answer, *(texts[i] for texts in said.values()))
    console.print(table)


def run(output: Path, seed: int, console: Console) -> None:
    """Everything `make demo` does and prints."""
    fresh(output)
    console.print(f"device: {jax.devices()[0]}, JAX {jax.__version__}", highlight=False)
    model, trainer, before, after = trained(seed, output)
    held_out = demo_data.split(seed).held_out
    best = demo_data.best_constant([e.record for e in held_out])
    picture(trainer.log_history, output / "loss.png")
    examples = held_out[:CHECKED]
    before_and_after(console, examples[:SHOWN], before, after)
    console.print(
        f"exact match on {len(held_out)} held-out requests, end token included: "
        f"before {before.share:.1%}, after {after.share:.1%} (best constant answer {best:.1%})"
    )
    rows = [adapter(output, model)]
    merged = model.save_pretrained_merged(output / "merged")
    agrees = merged_agrees(output / "merged", model, examples[:SHOWN])
    rows.append(artefact(output / "merged", f"{distance(merged)}; {agrees}"))
    files, said, quantization = ggufs(output, model, after, examples)
    side_by_side(console, after.texts[:SHOWN], said)
    rows += files
    rows.append(artefact(output / "loss.png", "drawn from metrics.jsonl"))
    rows.append(artefact(output / "metrics.jsonl", f"{len(trainer.log_history)} steps"))
    facts = {
        "kind": "demo",
        "base_model": Path(model.name).name,
        "seed": seed,
        "exact_match": {"before": before.share, "after": after.share, "best_constant": best},
        "held_out": len(held_out),
        "verified": {row.path: row.verified for row in rows},
        "quantization": quantization,
    }
    export.write_manifest(output, facts)
    rows.append(artefact(output / export.MANIFEST, "sizes and hashes of the files beside it"))
    closing(console, rows, output)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=demo_data.SEED)
    a = parser.parse_args()
    terminal, started = Console(), time.perf_counter()
    console = terminal if terminal.is_terminal else Console(width=110)
    run(a.output, a.seed, console)
    peak = machine.peak() / 2**30
    console.print(f"{time.perf_counter() - started:.0f} s in all, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
