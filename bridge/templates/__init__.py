"""The named chat templates: Jinja parts in this folder, and for each name what it is made of.

A template's text is its settings, then its parts one after the other. Every tag of a part strips
the space around it, so that a Jinja engine renders the same text whatever it does with newlines.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

Setting = str | bool | tuple[str, ...] | None

FOLDER = Path(__file__).parent
EOS = "eos_token"
TURNS = ("text", "turns")
SYSTEM = (*TURNS, "system_first")
FOLDED = (*SYSTEM, "folded")
# What a part reads and a name need not say.
DEFAULTS: dict[str, dict[str, Setting]] = {
    "turns": {
        "roles": ("system", "user", "assistant"),
        "trimmed": (),
        "thinks": False,
        "has_tools": False,
    },
    "system_first": {"default_system": None},
    "folded": {"system_opens": "", "system_closes": " "},
    "gemma": {"alternates": False},
    "gemma-4": {"answer_opens": ""},
    "qwen": {"default_system": None, "thinks": False, "hybrid": False, "answer_opens": ""},
}


class Named(NamedTuple):
    """The parts of a template, its stop word ("eos_token": the tokenizer's own), its settings.

    `maps_eos`: the stop word may become the EOS token. `renames`: tokens that take others' places.
    """

    parts: tuple[str, ...]
    stop_word: str = EOS
    maps_eos: bool = False
    settings: Mapping[str, Setting] = {}
    renames: Mapping[str, str] = {}


ALL = ("system", "user", "assistant")
VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {0}'s questions."
)
ALPACA = (
    "Below are some instructions that describe some tasks. Write responses that appropriately "
    "complete each request."
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHAT_ROLES = {"roles": ("system", "developer", "user", "assistant", "tool")}
EMPTY_THOUGHT = "<|channel>thought\n<channel|>"

# One entry a format: its names, the first being the one that the others stand for.
FORMATS: dict[tuple[str, ...], Named] = {
    ("unsloth",): Named(
        (*SYSTEM, "unsloth"),
        settings={"default_system": "You are a helpful assistant to the user"},
    ),
    ("zephyr",): Named((*TURNS, "zephyr")),
    ("chatml",): Named((*TURNS, "chatml"), "<|im_end|>", True, CHAT_ROLES),
    ("mistral",): Named((*FOLDED, "mistral")),
    ("llama",): Named(
        (*FOLDED, "llama"),
        settings={
            "trimmed": ("user", "assistant"),
            "system_opens": "<<SYS>>\n",
            "system_closes": "\n<</SYS>>\n\n",
        },
    ),
    ("vicuna",): Named((*SYSTEM, "vicuna"), settings={"default_system": VICUNA.format("user")}),
    ("vicuna_old", "vicuna old"): Named(
        (*SYSTEM, "vicuna_old"), settings={"default_system": VICUNA.format("human")}
    ),
    ("alpaca",): Named((*SYSTEM, "alpaca"), settings={"default_system": ALPACA}),
    ("gemma", "gemma2"): Named((*FOLDED, "gemma"), "<end_of_turn>", True, {"trimmed": ALL}),
    ("gemma_chatml", "gemma2_chatml"): Named(
        (*TURNS, "bos", "chatml"),
        "<|im_end|>",
        True,
        CHAT_ROLES,
        {"<start_of_turn>": "<|im_start|>"},
    ),
    ("llama-3", "llama3"): Named((*TURNS, "llama-3"), settings={"trimmed": ALL}),
    ("phi-3", "phi-35", "phi-3.5"): Named((*TURNS, "phi-3"), "<|end|>"),
    ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33"): Named(
        ("text", "llama-3.1"), settings={"default_system": ""}
    ),
    ("qwen-2.5", "qwen-25", "qwen25", "qwen2.5"): Named(
        ("text", "qwen"), settings={"default_system": QWEN}
    ),
    ("phi-4",): Named((*TURNS, "phi-4"), "<|im_end|>"),
    ("gemma-3", "gemma3", "gemma-3n", "gemma3n"): Named(
        (*FOLDED, "gemma"),
        "<end_of_turn>",
        settings={
            "trimmed": ("user", "assistant"),
            "system_closes": "\n\n",
            "alternates": True,
        },
    ),
    ("gemma-4", "gemma4"): Named(
        (*TURNS, "gemma-4"), "<turn|>", settings={"trimmed": ALL, "thinks": True}
    ),
    ("gemma-4-thinking", "gemma4-thinking"): Named(
        (*TURNS, "gemma-4"),
        "<turn|>",
        settings={"trimmed": ALL, "thinks": True, "answer_opens": EMPTY_THOUGHT},
    ),
    ("qwen-3", "qwen3"): Named(
        ("text", "qwen"), "<|im_end|>", settings={"thinks": True, "hybrid": True}
    ),
    ("qwen3-instruct",): Named(("text", "qwen"), "<|im_end|>"),
    ("qwen3-thinking",): Named(
        ("text", "qwen"), "<|im_end|>", settings={"thinks": True, "answer_opens": "<think>\n"}
    ),
    ("gpt-oss", "gptoss"): Named(
        (*SYSTEM, "gpt-oss"),
        "<|return|>",
        settings={"roles": ("system", "developer", "user", "assistant"), "thinks": True},
    ),
    ("lfm-2", "lfm-2.5"): Named(
        (*TURNS, "lfm-2"),
        "<|im_end|>",
        settings={"roles": ("system", "user", "assistant", "tool"), "has_tools": True},
    ),
    ("starling",): Named((*TURNS, "starling"), "<|end_of_turn|>"),
    ("yi-chat",): Named((*TURNS, "newline", "chatml"), "<|endoftext|>"),
}
NAMED = {name: named for names, named in FORMATS.items() for name in names}


def default_system(name: str) -> str | None:
    """The system text of a conversation without one; None where the template has none."""
    return _settings(NAMED[name])["default_system"] if _has_default(NAMED[name]) else None


def text(name: str, system_message: str | None = None) -> str:
    """The Jinja text of a name, with `system_message` for the default one where there is one."""
    named = NAMED[name]
    settings = _settings(named)
    if system_message is not None:
        settings["default_system"] = system_message
    head = "".join(f"{{%- set {key} = {_literal(value)} -%}}\n" for key, value in settings.items())
    return head + "".join(_part(part) for part in named.parts)


def _settings(named: Named) -> dict[str, Setting]:
    needed = [DEFAULTS.get(part, {}) for part in named.parts]
    return {k: v for part in [*needed, named.settings] for k, v in part.items()}


def _has_default(named: Named) -> bool:
    return named.settings.get("default_system") is not None


def _literal(value: Setting) -> str:
    """A Jinja literal: JSON's spelling of text, which Jinja reads as text whatever it holds."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


@cache
def _part(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def table() -> str:
    """The names as a Markdown table: aliases, stop word, if it becomes EOS, default system text."""
    head = ["| name | also | stop word | becomes EOS | system text where none is given |"]
    head += ["|---|---|---|---|---|"]
    cell = lambda words: ", ".join(f"`{word.replace('|', chr(92) + '|')}`" for word in words)
    shown = lambda text: "" if text is None else json.dumps(text)
    rows = [
        f"| {cell(names[:1])} | {cell(names[1:])} | {cell([named.stop_word])} | "
        f"{'yes' if named.maps_eos else 'no'} | {shown(default_system(names[0]))} |"
        for names, named in FORMATS.items()
    ]
    return "\n".join([*head, *rows])
