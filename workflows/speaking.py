"""The tokenizer of a run, with the special tokens and the template that its config names."""

import copy
from pathlib import Path
from typing import Any

from workflows.sft_config import SFTConfig

TOKENS = ("eos_token", "pad_token")


def speaking(tokenizer: Any, a: SFTConfig) -> Any:
    """A copy of the tokenizer with what `a` sets, or the tokenizer itself where that is nothing.

    Raises ValueError for a token that it has not, or a template that is no Jinja file.
    """
    tokens = {name: getattr(a, name) for name in TOKENS if getattr(a, name) is not None}
    if not tokens and a.chat_template_path is None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    known = own.get_vocab()
    for name, token in tokens.items():
        if token not in known:
            raise ValueError(f"SFTConfig: {name}={token!r} is no token of the tokenizer")
        setattr(own, name, token)
    if a.chat_template_path is not None:
        own.chat_template = _template(Path(a.chat_template_path))
    return own


def _template(path: Path) -> str:
    if path.suffix not in (".jinja", ".j2") or not path.is_file():
        raise ValueError(
            f"SFTConfig: chat_template_path={str(path)!r} must be a .jinja file; for the template "
            "of a model or by name use get_chat_template"
        )
    return path.read_text(encoding="utf-8")
