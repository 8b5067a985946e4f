"""The table of keywords in docs/sft.md, made of the lists that decide them.

python -m workflows.option_table docs/sft.md
"""

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from workflows import face_keywords, sft_config, sft_trainer
from workflows.face import FastLanguageModel
from workflows.marked import between
from workflows.sft_config import SFTConfig
from workflows.sft_trainer import SFTTrainer

BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"


class Lists(NamedTuple):
    """Every keyword of one function."""

    used: dict[str, Any]  # name -> default
    ignored: Mapping[str, str]  # name -> why it has no effect
    refused: Mapping[str, tuple]  # name -> values that change nothing


def lists() -> dict[str, Lists]:
    """The functions whose keywords are listed, by name."""
    k, t, c = face_keywords, sft_trainer, sft_config
    config = {f.name: f.default for f in fields(SFTConfig)}
    own = {name: getattr(SFTConfig(), name) for name in t.OLD_STYLE}
    return {
        "FastLanguageModel.from_pretrained": Lists(
            _used(FastLanguageModel.from_pretrained, k.LOAD_USED), k.LOAD_IGNORED, k.LOAD_LATER
        ),
        "FastLanguageModel.get_peft_model": Lists(
            _used(FastLanguageModel.get_peft_model, k.PEFT_USED), k.PEFT_IGNORED, k.PEFT_LATER
        ),
        "SFTConfig": Lists(config, c.CONFIG_IGNORED, c.CONFIG_LATER),
        "SFTTrainer": Lists(
            _used(SFTTrainer.__init__, t.TRAINER_USED, own), t.TRAINER_IGNORED, t.TRAINER_LATER
        ),
    }


def _used(function: Any, names: Iterable[str], own: Mapping[str, Any] | None = None) -> dict:
    given = inspect.signature(function).parameters
    own = own or {}
    default = lambda name: own[name] if name in own else given[name].default
    return {name: default(name) for name in names}


def page() -> str:
    """The tables as Markdown."""
    parts = []
    for where, found in lists().items():
        parts += [f"### {where}", "", "Used:", "", "| keyword | default |", "|---|---|"]
        parts += [f"| `{name}` | {_shown(value)} |" for name, value in found.used.items()]
        parts += ["", "Taken without effect, said once:", "", "| keyword | why |", "|---|---|"]
        parts += [f"| `{name}` | {why} |" for name, why in sorted(found.ignored.items())]
        parts += ["", "Refused, unless they have a value that changes nothing:", ""]
        parts += ["| keyword | values that are taken |", "|---|---|"]
        for name, values in sorted(found.refused.items()):
            parts.append(f"| `{name}` | {', '.join(map(_shown, values))} |")
        parts.append("")
    return "\n".join(parts).strip() + "\n"


def _shown(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "must be given"
    value = dict(value) if isinstance(value, Mapping) else value
    return f"`{value!r}`".replace("|", "\\|")


def filled(text: str) -> str:
    """The page's text with its tables replaced; raises ValueError where it has no place."""
    return between(text, BEGIN, END, f"\n{page()}")


def main(line: list[str]) -> None:
    (name,) = line
    path = Path(name)
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
