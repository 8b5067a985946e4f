"""The tokenizer of a run, with the special tokens and the template that its config names."""

import copy
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from bridge.tokenizer import end_in_pieces
from workflows.keywords import say
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


def say_pieces(tokenizer: Any) -> None:
    """Says where the chat template ends answers with text that is no token of the tokenizer."""
    try:
        end = end_in_pieces(tokenizer)
    except (TemplateError, ValueError):
        return  # rows of messages say what the template refuses, and rows of text need none
    if end is not None:
        say(
            f"the chat template ends answers with {end!r}, which is no token of the tokenizer: it "
            "is learnt in pieces, of which the last may be one token with the next turn's "
            "beginning and is then not learnt, and answers don't stop there; take another "
            f"template, or get_chat_template(tokenizer, (jinja_text, {end!r})), whose stop word "
            f"takes the EOS token's place (map_eos_token), or tokenizer.add_tokens([{end!r}], "
            "special_tokens=True) and model.resize_token_embeddings(len(tokenizer)) before "
            "get_peft_model"
        )
