"""A row as a person reads it: its text, with the tokens that the loss predicts marked."""

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from unsloth_jax.data import Row

LEARNT, GIVEN, HEAD = "bold green", "default", "dim"


def preview(
    row: Row | Sequence[Row], tokenizer: PreTrainedTokenizerBase, console: Console | None = None
) -> None:
    """Prints a row, or the documents that share a packed one, under a line of counts each.

    Supervised text is green in a terminal, and stands in [[ ]] where there is none.
    """
    console = Console(file=sys.stdout) if console is None else console
    console.print(text(row, tokenizer, marks=not console.is_terminal), soft_wrap=True)


def text(row: Row | Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, marks: bool) -> Text:
    """What `preview` prints; `marks` puts [[ ]] around supervised text.

    Raises ValueError where there is no row.
    """
    documents = documents_of(row)
    out = Text()
    if len(documents) > 1:
        tokens, learnt = (sum(part) for part in zip(*map(_counts, documents), strict=True))
        out.append(f"-- {len(documents)} documents, {_count(tokens, learnt)} --\n", HEAD)
    for number, document in enumerate(documents, start=1):
        which = f"document {number}, " if len(documents) > 1 else ""
        out.append(f"-- {which}{_count(*_counts(document))} --\n", HEAD)
        for on, piece in _pieces(document, tokenizer):
            shown = f"[[{piece}]]" if on and marks else piece
            out.append(shown, LEARNT if on else GIVEN)
        out.append("\n")
    out.rstrip()
    return out


def documents_of(row: Any) -> list[Row]:
    """The documents of one row: itself, or those packed into it. Raises ValueError for none."""
    documents = [row] if isinstance(row, Row) else list(row)
    if not documents or not all(isinstance(document, Row) for document in documents):
        kinds = sorted({type(document).__name__ for document in documents})
        raise ValueError(f"expected a Row or the Rows of a packed one, got {kinds or 'no row'}")
    return documents


def _counts(row: Row) -> tuple[int, int]:
    return len(row.tokens), sum(row.mask)


def _count(tokens: int, learnt: int) -> str:
    return f"{tokens} tokens, {learnt} supervised"


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str]]:
    """(supervised, text) of each stretch; tokens are decoded together, as letters may need."""
    pairs = zip(row.tokens, row.mask, strict=True)
    for on, run in groupby(pairs, lambda pair: pair[1]):
        yield on, _printable(tokenizer.decode([token for token, _ in run]))


def _printable(piece: str) -> str:
    """Text that does nothing to a terminal but stand there."""
    plain = lambda c: c.isprintable() or c in "\n\t"
    return "".join(c if plain(c) else repr(c)[1:-1] for c in piece)
