"""The settings of `python -m workflows.sft`: flags and YAML keys, made of the face's signatures.

A keyword that from_pretrained, get_peft_model or SFTConfig gains is a flag from then on.
"""

import difflib
import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from workflows import face_keywords as face
from workflows import settings_file
from workflows.face import FastLanguageModel
from workflows.keywords import KINDS, typed
from workflows.sft_config import CONFIG_IGNORED, CONFIG_LATER, SFTConfig

Sections = dict[str, dict[str, Any]]


@dataclass
class Data:
    """What is trained on.

    Args:
        train_dataset: a file (.jsonl, .json, .csv, .parquet), a folder that `datasets` wrote, or a
            hub name.
        eval_dataset: the same, once or as several name=path; in YAML a text or names with paths.
        chat_template: a name of docs/chat_templates.md; by default the model's own.
        system_message: of conversations that have none, for templates that have such a text.
        map_eos_token: see get_chat_template.
        train_on_responses_only: only the assistant's answers count.
        instruction_part, response_part: texts that open a turn; by default the template's own.
        last_response_only: only each row's last answer counts.
    """

    train_dataset: str | None = None
    eval_dataset: str | Sequence[str] | Mapping | None = None
    chat_template: str | None = None
    system_message: str | None = None
    map_eos_token: bool = True
    train_on_responses_only: bool = False
    instruction_part: str | None = None
    response_part: str | None = None
    last_response_only: bool = False


@dataclass
class Saved:
    """What lies in output_dir at the end.

    Args:
        save_adapter: the adapters as a PEFT folder, output_dir/adapter.
        save_merged: the merged 16-bit model, output_dir/merged.
        save_gguf: formats of GGUF files in output_dir/gguf, such as q8_0 q4_k_m.
        merge_base: what adapters are added to: original16, dequant4 or dequant8.
        run_in_llama_cpp: llama.cpp runs the GGUF files, where xllamacpp is installed.
    """

    save_adapter: bool = True
    save_merged: bool = False
    save_gguf: Sequence[str] = ()
    merge_base: str = "original16"
    run_in_llama_cpp: bool = True


@dataclass
class Command:
    """What this one command does; no part of a settings file.

    Args:
        config: a YAML file of settings; flags win over it.
        resume: go on with the newest checkpoint of output_dir.
        overwrite: replace adapter, merged and gguf folders that are there already.
        dry_run: show the data, one row with its mask, the steps and the memory, and train nothing.
        gpu: the GPU's memory in a dry run's plan, such as 24GB; by default this machine's.
    """

    config: str | None = None
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    gpu: str | None = None


SOURCES: dict[str, Callable] = {
    "model": FastLanguageModel.from_pretrained, "adapters": FastLanguageModel.get_peft_model,
    "training": SFTConfig, "data": Data, "saving": Saved, "command": Command,
}  # fmt: skip
COMMAND = "command"
# No flags: a secret (the environment holds it), the model itself, and what another section has.
LEFT_OUT = {
    "model": ("token",), "adapters": ("model", "memory_budget"), "training": ("max_seq_length",),
}  # fmt: skip
DEFAULTS = {"output_dir": "outputs"}
# Keywords that change nothing, or may only be neutral: a file may hold them, no flag is offered.
BESIDE = {
    "model": (*face.LOAD_IGNORED, *face.LOAD_LATER),
    "adapters": (*face.PEFT_IGNORED, *face.PEFT_LATER),
    "training": (*CONFIG_IGNORED, *CONFIG_LATER),
}


class Option(NamedTuple):
    """One setting: its annotation, what it is where nobody says, and what help says of it."""

    kind: Any
    default: Any
    help: str


def options(section: str) -> dict[str, Option]:
    """The settings of a section by name, from its signature or its fields."""
    source, left = SOURCES[section], LEFT_OUT.get(section, ())
    said, kinds = described(source), get_type_hints(source)
    if is_dataclass(source):
        defaults = {f.name: f.default for f in fields(source) if f.default is not MISSING}
    else:
        every = inspect.signature(source).parameters.values()
        defaults = {p.name: p.default for p in every if p.kind is not p.VAR_KEYWORD}
    return {
        name: Option(kinds[name], DEFAULTS.get(name, default), said.get(name, ""))
        for name, default in defaults.items()
        if name not in left
    }


def described(source: Any) -> dict[str, str]:
    """What the docstring's Args say of each name."""
    _, _, args = inspect.getdoc(source).partition("Args:\n")
    found, names = {}, []
    for line in args.partition("\n\n")[0].splitlines():
        head, colon, rest = line.strip().partition(": ")
        if line.startswith("    ") and line[4:5] != " " and colon:
            names = [name.strip() for name in head.split(",")]
            found |= dict.fromkeys(names, rest)
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def flag_kind(kind: Any) -> Any:
    """What a flag of a setting takes; str where its text is read as a YAML value."""
    one, many, plain = _parts(kind)
    if many:
        return tuple[(get_args(many[0]) or (str,))[0], ...]
    if len(plain) < len(one):
        return str
    return functools.reduce(operator.or_, plain)


def _parts(kind: Any) -> tuple[list, list, list]:
    """The members of an annotation but None: all, those that are sequences, the plain ones."""
    one = [k for k in _members(kind) if k not in (types.NoneType, Path)]
    many = [k for k in one if get_origin(k) in (Sequence, list, tuple)]
    return one, many, [k for k in (bool, int, float, str) if k in one]


def _members(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def from_flag(kind: Any, given: Any) -> Any:
    """A flag's value as the section takes it: one word that is no name stands for itself."""
    one, many, plain = _parts(kind)
    if many:
        alone = len(given) == 1 and str in plain and not str(given[0]).isidentifier()
        return given[0] if alone else list(given)
    return given if len(plain) == len(one) else settings_file.value(given)


def parsed(line: Sequence[str] | None, prog: str, description: str) -> Sections:
    """The settings that flags and the file they name give, by section; defaults are left out.

    Raises ValueError or TypeError for a file's wrong key or kind, SystemExit for a wrong flag.
    """
    known = {section: options(section) for section in SOURCES}
    typed_in = tyro.cli(_flags(known), args=line, prog=prog, description=description)
    flags = {
        section: {name: from_flag(own[name].kind, v) for name, v in typed_in[section].items()}
        for section, own in known.items()
    }
    config = flags[COMMAND].get("config")
    held = {} if config is None else owned(Path(config), known)
    return {section: held.get(section, {}) | flags[section] for section in known}


def _flags(known: Mapping[str, Mapping[str, Option]]) -> Any:
    """The type that tyro reads: a dictionary a section, which holds what was typed alone."""
    parts = {}
    for section, own in known.items():
        kinds = {
            name: Annotated[
                flag_kind(option.kind),
                tyro.conf.arg(help=option.help, help_behavior_hint=f"(default: {option.default})"),
            ]
            for name, option in own.items()
        }
        made = TypedDict(section, kinds, total=False)
        parts[section] = tyro.conf.OmitArgPrefixes[made]
    return TypedDict("settings", parts)


def owned(file: Path, known: Mapping[str, Mapping[str, Option]]) -> Sections:
    """A file's settings by section. Raises ValueError or TypeError naming file, key and nearest."""
    found: Sections = {}
    names = {name: section for section, beside in BESIDE.items() for name in beside}
    names |= {name: section for section in known if section != COMMAND for name in known[section]}
    for key, value in settings_file.read(file).items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=3) or sorted(names)
            raise ValueError(f"{file}: unknown key {key!r}; nearest known: {near}")
        option = known[names[key]].get(key)
        if option is not None and _checkable(option.kind):
            typed(str(file), {key: value}, {key: option.kind})
        found.setdefault(names[key], {})[key] = value
    return found


def _checkable(kind: Any) -> bool:
    named = lambda k: isinstance(k, type) and k is not Any and not get_args(k)
    return all(k in KINDS or named(k) for k in _members(kind))


def complete(given: Sections) -> Sections:
    """Every setting with its value, but for the command's own."""
    return {
        section: {
            n: given[section].get(n, option.default) for n, option in options(section).items()
        }
        for section in SOURCES
        if section != COMMAND
    }
