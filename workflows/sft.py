"""Fine-tune a model from the command line, with the settings of the Python road.

    python -m workflows.sft --model-name path/or/hub-name --train-dataset rows.jsonl --max-steps 60
    python -m workflows.sft --config run.yaml --learning-rate 1e-4 --dry-run

output_dir gets report.html, metrics.jsonl, the adapters, and config.yaml, which runs again.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bridge import export, gguf_blocks
from unsloth_jax.chat_templates import get_chat_template
from workflows import dry_run, report, saving, settings_file, sft_settings, widths
from workflows.face import FastLanguageModel
from workflows.model import Model
from workflows.responses_only import train_on_responses_only
from workflows.sft_config import SFTConfig
from workflows.sft_settings import Sections
from workflows.sft_trainer import SFTTrainer

PROG, CONFIG = "python -m workflows.sft", "config.yaml"
# Settings of adapters that an adapter folder decides, by their names in its own.
ADAPTED = {
    "r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "use_rslora": "rslora",
    "layers_to_transform": "layers", "init_lora_weights": "start", "use_dora": "dora",
    "lora_dropout": "dropout", "modules_to_save": "saved",
}  # fmt: skip


class Written:
    """A callback that writes all settings to output_dir once the first step is about to come."""

    def __init__(self, sections: Sections):
        head = f"Runs again with: {PROG} --config {CONFIG}\nGoes on with: --resume"
        self.text = settings_file.written(sections, head)

    def on_train_begin(self, args: SFTConfig, state: Any, control: Any, **other: Any) -> None:
        report.replace(Path(args.output_dir) / CONFIG, self.text)


class Job(NamedTuple):
    """A trainer that is ready, and every setting it was made with."""

    trainer: SFTTrainer
    settings: Sections


def made(
    given: Sections,
    load: Callable = FastLanguageModel.from_pretrained,
    adapt: Callable = FastLanguageModel.get_peft_model,
) -> Job:
    """The trainer of settings; raises TypeError, ValueError and OSError as its parts do.

    `load` and `adapt` take the keywords of from_pretrained and get_peft_model.
    """
    full = sft_settings.complete(given)
    args = SFTConfig(**{"output_dir": full["training"]["output_dir"]} | given["training"])
    given_data = full["data"]
    if given_data["train_dataset"] is None:
        raise ValueError("no train_dataset; expected a file, a folder or a hub name")
    name = {"model_name": full["model"]["model_name"]}
    model, tokenizer = load(**name | given["model"])
    full["model"] |= widths.settled(given["model"])
    full["adapters"] |= adapted(model, given["adapters"], adapt)
    if given_data["chat_template"] is not None:
        how = {name: given_data[name] for name in ("map_eos_token", "system_message")}
        tokenizer = get_chat_template(tokenizer, given_data["chat_template"], **how)
    elif given_data["system_message"] is not None:
        raise ValueError("system_message needs a chat_template that has such a text")
    trainer = SFTTrainer(
        model, processing_class=tokenizer, train_dataset=given_data["train_dataset"],
        eval_dataset=held_out(given_data["eval_dataset"]), args=args,
    )  # fmt: skip
    full["training"] = {name: getattr(trainer.args, name) for name in full["training"]}
    answers = ("instruction_part", "response_part", "last_response_only")
    answers = {name: given_data[name] for name in answers}
    if given_data["train_on_responses_only"]:
        trainer = train_on_responses_only(trainer, **answers)
    elif any(answers.values()):
        raise ValueError(f"{[n for n in answers if answers[n]]} need train_on_responses_only")
    return Job(trainer, full)


def adapted(model: Model, given: Mapping[str, Any], adapt: Callable) -> dict[str, Any]:
    """Gives the model its adapters, unless it was loaded with some; what they then decide."""
    if model.adapters is None or set(given) & set(ADAPTED):
        adapt(model, **given)
        return {}
    if "use_gradient_checkpointing" in given:
        FastLanguageModel.for_training(model, given["use_gradient_checkpointing"])
    if model.peft is None:
        return {}
    return {name: getattr(model.peft, own) for name, own in ADAPTED.items()}


def held_out(given: Any) -> Any:
    """What SFTTrainer takes for one data set, or for several given as name=path."""
    if given is None or isinstance(given, Mapping):
        return given
    several = [given] if isinstance(given, str) else given
    if len(several) == 1 and "=" not in several[0]:
        return several[0]
    named = [part.partition("=") for part in several]
    wrong = [name for name, sign, path in named if not (name and sign and path)]
    names = [name for name, _, _ in named]
    if wrong or len(set(names)) < len(names):
        raise ValueError(f"several eval_dataset need a name each, as name=path; got {several}")
    return {name: path for name, _, path in named}


def targets(settings: Sections, overwrite: bool) -> dict[str, Path]:
    """The folders that are written at the end; raises FileExistsError where one holds something.

    And ValueError for a GGUF format that is not known: both before the first step.
    """
    folder, asked = Path(settings["training"]["output_dir"]), settings["saving"]
    if asked["save_gguf"]:
        for name in saving.formats(list(asked["save_gguf"])):
            gguf_blocks.format_named(name)
    found = {n: folder / n for n in ("adapter", "merged", "gguf") if asked[f"save_{n}"]}
    full = [str(path) for path in found.values() if path.exists() and any(path.iterdir())]
    if full and not overwrite:
        raise FileExistsError(
            f"{' and '.join(full)} hold files of an earlier run: choose another --output-dir, or "
            "give --overwrite"
        )
    foreign = [str(path) for path in found.values() if _foreign(path)]
    if foreign:
        raise FileExistsError(f"{' and '.join(foreign)} hold files that no export made")
    return found


def _foreign(path: Path) -> bool:
    return path.exists() and any(path.iterdir()) and not (path / export.MANIFEST).exists()


def save(trainer: SFTTrainer, found: Mapping[str, Path], asked: Mapping[str, Any], overwrite: bool):
    """Writes what was asked for, and says where it lies."""
    model, tokenizer = trainer.model, trainer.tokenizer
    if "adapter" in found:
        model.save_pretrained_merged(
            found["adapter"], tokenizer, save_method="lora", overwrite=overwrite
        )
    how = {"base": asked["merge_base"], "overwrite": overwrite}
    if "merged" in found:
        model.save_pretrained_merged(found["merged"], tokenizer, **how)
    if "gguf" in found:
        how |= {"run_in_llama_cpp": asked["run_in_llama_cpp"]}
        formats = list(asked["save_gguf"])
        model.save_pretrained_gguf(found["gguf"], tokenizer, quantization_method=formats, **how)
    for name, path in found.items():
        print(f"{name}: {path}")


def main(line: Sequence[str] | None = None) -> None:
    """Trains as the command line says; exits with a line of text where a setting is wrong."""
    try:
        given = sft_settings.parsed(line, PROG, __doc__)
        command = given[sft_settings.COMMAND]
        dry, overwrite = command.get("dry_run", False), command.get("overwrite", False)
        if dry:
            ready = made(given, dry_run.loaded, dry_run.adapted)
            shown = ready.settings["data"]["train_dataset"], command.get("gpu")
            dry_run.show(ready.trainer, *shown)
            return
        found = targets(sft_settings.complete(given), overwrite)
        trainer, settings = made(given)
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f"{PROG}: {error}")
    trainer.add_callback(Written(settings))
    print(f"report: {Path(trainer.args.output_dir) / report.PAGE}", flush=True)
    trainer.train(resume_from_checkpoint=command.get("resume", False))
    save(trainer, found, settings["saving"], overwrite)


if __name__ == "__main__":
    main()
