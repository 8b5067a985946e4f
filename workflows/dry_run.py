"""What a run would do, before it does anything: data, one row with its mask, steps, memory."""

import tempfile
from pathlib import Path
from typing import Any

import jax

from bridge import gguf_tokenizer, hf, hub
from bridge import tokenizer as text
from bridge.source import Header
from unsloth_jax import optim, plan
from unsloth_jax.plan import UNBOUNDED, Budget
from workflows import machine, row_lengths, schemas, sources, widths
from workflows import plan as planning
from workflows.face import FastLanguageModel, compute_dtype
from workflows.keywords import say
from workflows.model import Model
from workflows.preview import preview
from workflows.sft_trainer import SFTTrainer

GPU = "80GB"  # of a plan on a machine without one
# What changes the weights themselves, so that their shapes alone don't tell the rest.
DEEP = ("full_finetuning", "resize_model_vocab")


class Described:
    """A checkpoint of which only config.json is known."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def headers(self) -> dict[str, Header]:
        return {}

    def read(self, name: str) -> Any:
        raise ValueError(f"a dry run reads no weights, and {name!r} is one")


@widths.one_width
def loaded(model_name: str, **given: Any) -> tuple[Model, Any]:
    """What from_pretrained gives, with shapes in place of weights, which are not read.

    Adapter folders, and settings that change the weights, are loaded for good.
    """
    find = {k: given[k] for k in ("revision", "cache_dir", "local_files_only") if k in given}
    fmt = widths.packed(**{name: given[name] for name in widths.PACKED if name in given})
    exact = given.get("use_exact_model_name", False)
    name, path = widths.located(model_name, fmt, exact, find, weights=False)
    adapters = path.is_dir() and (path / hub.ADAPTER).exists()
    if adapters or any(given.get(name) for name in DEEP):
        say("this dry run loads the weights: adapters, or settings that change them, are given")
        return FastLanguageModel.from_pretrained(model_name, **given)
    dtype = compute_dtype(given.get("dtype"))
    fields = planning.fields(str(path))
    fmt = hf.kept(fields, fmt)
    family, c, params = planning.shapes(fields, dtype, fmt)
    length = given.get("max_seq_length", 2048)
    tokenizer = _tokenizer(path)
    model = Model(name, Described(fields), family, c, params, path, tokenizer, length, dtype, fmt)
    return model, tokenizer


def adapted(model: Model, **given: Any) -> Model:
    """get_peft_model of a model of shapes: the adapters are shapes too."""
    whole = model.params

    def made(params: Any) -> Any:
        model.params = params
        FastLanguageModel.get_peft_model(model, **given)
        return model.params, model.adapters, model.initial

    model.params, model.adapters, model.initial = jax.eval_shape(made, whole)
    return model


def _tokenizer(path: Path) -> Any:
    if path.suffix != ".gguf":
        return text.load(path)
    with tempfile.TemporaryDirectory(prefix="unsloth_jax-tokenizer-") as folder:
        gguf_tokenizer.save_folder(path, folder)
        return text.load(folder)


def show(trainer: SFTTrainer, dataset: Any, gpu: str | None = None) -> None:
    """Prints all that is known before the first step.

    Raises ValueError for a `gpu` that is no amount of memory.
    """
    batches, total = trainer._batches(), trainer.total_steps()
    _say_schema(trainer, dataset)
    found = row_lengths.lengths(batches)
    if found is not None:
        print(f"\n{row_lengths.sentence(found)}\n{row_lengths.drawn(found)}")
    for name, held_out in trainer.eval_rows.items():
        print(f"eval_dataset{name and ' ' + name}: {len(held_out):,} rows")
    first = batches.bins(0)[0]
    print("\nthe first row of a batch; green or in [[ ]] is what the loss predicts:")
    preview(first, trainer.tokenizer)
    a = trainer.args
    size = a.per_device_train_batch_size, a.gradient_accumulation_steps
    print(
        f"\nsteps: {total:,}, {batches.steps(0):,} an epoch; {size[0]} x {size[1]} rows of at most "
        f"{batches.widest:,} tokens each, {a.warmup(total)} of warm-up"
    )
    _say_memory(trainer, batches, gpu)
    print("a dry run: nothing was trained, nothing was written")


def _say_schema(trainer: SFTTrainer, dataset: Any) -> None:
    example = next(iter(sources.opened(dataset)))
    name = schemas.schema(example, trainer.args.dataset_text_field)
    print(f"{dataset}: {name} in rows of columns {sorted(example)}")


def _say_memory(trainer: SFTTrainer, batches: Any, gpu: str | None) -> None:
    """The plans that training may choose from, as for a GPU; the one it would take is marked."""
    a, model = trainer.args, trainer.model
    optimizer = optim.make(a.optim, optim.schedule("constant", 1e-4, 0, 1), max_grad_norm=1.0)
    job = planning.job_of(model, optimizer, batches, trainer.objective.draws)._replace(
        platform="gpu"
    )
    limit = machine.device_limit() if gpu is None else None
    whole = planning.size(GPU if gpu is None else gpu)
    device = limit or int(whole * planning.fraction())
    said = "this GPU's" if limit else f"{planning.fraction():.0%} of a GPU of {gpu or GPU}"
    if a.memory_budget is not None:
        device = min(device, planning.size(a.memory_budget, device))
    room = Budget(device, UNBOUNDED)
    allowed, lines, chosen = planning.rungs(model.memory, job), [], None
    for memory in dict.fromkeys((*allowed, *plan.ladder(job))):
        found = plan.estimate(job, memory)
        if chosen is None and memory in allowed and found.fits(room):
            chosen = plan.title(memory)
        lines.append((plan.title(memory), found, found.fits(room)))
    print(f"\nmemory on {plan.gib(device)}, {said}; estimated, in GiB; * would be taken")
    print(planning.table(lines, chosen))
    if chosen is None:
        print(plan.refusal(job, room, [(memory, plan.estimate(job, memory)) for memory in allowed]))
