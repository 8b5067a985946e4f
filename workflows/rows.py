"""A user's data set in, token rows with loss masks out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unsloth_jax.data import Row
from workflows import lengths, sources
from workflows.schemas import IGNORED, Example, Loss, Tokens, embedded, read

BATCH = 1000
LEARNT = "expected an answer of the assistant, a completion, text, or labels that are not all -100"
TURNS = "most templates take a system message or none, then user and assistant in turn"


class Report(NamedTuple):
    """How much there is to learn from: rows, their tokens, and the tokens the loss predicts."""

    rows: int
    tokens: int
    supervised: int


class Shown(Sequence):
    """Rows as a data set shows them: ids, and labels that are -100 where nothing is learnt."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Shown(self.rows[index])
        tokens, mask = self.rows[index]
        labels = [token if on else IGNORED for token, on in zip(tokens, mask, strict=True)]
        return {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens)}


def rows(
    dataset: Iterable[Example] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncate: bool = False,
    split: bool = False,
    **how: Any,
) -> list[Row]:
    """`streamed`, all at once. Raises ValueError for a data set without rows, and says how long
    rows are where some are too long.
    """
    whole = [Row(*tokens) for tokens in _whole(dataset, tokenizer, **how)]
    if not whole:
        raise ValueError("the data set is empty: it has no row")
    lengths.judge([len(row.tokens) for row in whole], max_length, cut=truncate or split)
    limited = (
        _limited(index, *row, max_length, truncate, split) for index, row in enumerate(whole)
    )
    return list(chain.from_iterable(limited))


def streamed(
    dataset: Iterable[Example] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncate: bool = False,
    split: bool = False,
    **how: Any,
) -> Iterator[Row]:
    """One Row for each example, in order; mask[0] is 0, since nothing predicts the first token.

    `dataset` may be a file, a folder or a hub name, as `sources.opened` takes it; `how` is what
    SFTConfig calls dataset_text_field, completion_only_loss and assistant_only_loss, and
    last_response_only, formatting_func, `schemas.Loss.elsewhere` and the model's `vocab`.

    Raises ValueError, with the row's index, for columns of no known schema, a row with nothing to
    learn, a token outside `vocab`, and a row longer than `max_length` unless `truncate`; `split`
    makes several Rows of it.
    """
    for index, (tokens, mask) in enumerate(_whole(dataset, tokenizer, **how)):
        yield from _limited(index, tokens, mask, max_length, truncate, split)


def _whole(
    dataset: Iterable[Example] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_text_field: str = "text",
    formatting_func: Callable[[Any], Any] | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    last_response_only: bool = False,
    elsewhere: Callable[[Sequence[int], Sequence[int]], list[int]] | None = None,
    vocab: int | None = None,
) -> Iterator[Tokens]:
    """Token ids of each example and which the loss asks for, whatever their number."""
    asked = completion_only_loss, assistant_only_loss, last_response_only
    loss = Loss(*asked, dataset_text_field, elsewhere)
    dataset = sources.opened(dataset)
    if isinstance(dataset, Mapping):
        what = f"{type(dataset).__name__} {str(list(dataset))[:60]}"
        raise TypeError(f"a data set must be rows of named columns, got {what}; name a split")
    if formatting_func is not None:
        texts = formatted(dataset, formatting_func)
        dataset = ({dataset_text_field: text} for text in texts)
    for index, example in enumerate(dataset):
        yield _read(index, example, tokenizer, loss, vocab)


def _read(index, example, tokenizer, loss, vocab) -> Tokens:
    try:
        if not isinstance(example, Mapping):
            raise TypeError(f"expected a row of named columns, got {type(example).__name__}")
        tokens, mask = read(example, tokenizer, loss)
        if vocab is not None:
            embedded(tokens, tokenizer, vocab)
        return tokens, mask
    except (ValueError, TypeError) as error:
        raise type(error)(f"row {index}: {error}") from error
    except TemplateError as error:
        raise ValueError(f"row {index}: the chat template refuses it: {error}; {TURNS}") from error


def _limited(index, tokens, mask, max_length, truncate, split) -> list[Row]:
    """The row within its length: whole, cut at its end, or, split, the pieces to learn from."""
    size = len(tokens)
    cut = max_length is not None and size > max_length
    if cut and not (truncate or split):
        raise ValueError(lengths.too_long(index, size, max_length))
    starts = range(0, size, max_length) if cut and split else [0]
    part = lambda what, at: what[at : at + max_length] if cut else what
    pieces = [Row(part(tokens, at), [0, *part(mask, at)[1:]][: len(tokens)]) for at in starts]
    learnt = [piece for piece in pieces if any(piece.mask)]
    if not learnt:
        what = f"the first {max_length} of {size}" if cut and not split else str(size)
        raise ValueError(f"row {index}: no supervised token among {what}; {LEARNT}")
    return learnt


def report(rows: Sequence[Row]) -> Report:
    """The totals of `rows`."""
    return Report(len(rows), sum(len(r.tokens) for r in rows), sum(sum(r.mask) for r in rows))


def formatted(dataset: Iterable[Example], formatting_func: Callable[[Any], Any]) -> Iterator[str]:
    """The texts a formatting_func makes, one a row: of one example each where it returns str or a
    list of one text, of batches where it returns a list of as many texts as the batch has rows.

    Raises TypeError if it returns anything else, ValueError for another number of texts.
    """
    stream = iter(dataset)
    head = list(islice(stream, 1))
    stream = chain(head, stream)
    if head and _takes_batches(formatting_func, head[0]):
        return _of_batches(stream, formatting_func)
    return (_only(n, formatting_func(example)) for n, example in enumerate(stream))


def _takes_batches(formatting_func: Callable[[Any], Any], example: Example) -> bool:
    got = formatting_func(example)
    if not isinstance(got, str | list):
        raise TypeError(f"formatting_func returned {type(got).__name__}, expected str or list")
    if not isinstance(got, list) or len(got) != 1:
        return isinstance(got, list)
    # One text in a list may be that of one example, or of a batch whose columns have one letter.
    try:
        got = formatting_func(_columns([example, example]))
    except (AttributeError, TypeError):
        return False  # it does with a column what only one row's value can do
    return len(_list_of(got)) == 2


def _of_batches(stream: Iterator[Example], formatting_func: Callable[[Any], Any]) -> Iterator[str]:
    first = 0
    while chunk := list(islice(stream, BATCH)):
        texts, last = _list_of(formatting_func(_columns(chunk))), first + len(chunk) - 1
        if len(texts) != len(chunk):
            raise ValueError(
                f"formatting_func returned {len(texts)} texts for {len(chunk)} rows (rows {first} "
                f"to {last}), expected one a row; a function of one row returns a str"
            )
        yield from map(_text_of, texts)
        first = last + 1


def _only(index: int, got: Any) -> str:
    if isinstance(got, list) and len(got) != 1:
        raise ValueError(
            f"row {index}: formatting_func returned {len(got)} texts for one row, expected one"
        )
    return _text_of(got[0] if isinstance(got, list) else got)


def _list_of(got: Any) -> list[Any]:
    if not isinstance(got, list):
        raise TypeError(
            f"formatting_func returned a list for one example and {type(got).__name__} for a "
            "batch of them, expected a list of texts"
        )
    return got


def _text_of(got: Any) -> str:
    if not isinstance(got, str):
        raise TypeError(f"formatting_func gave {type(got).__name__} for a text, expected str")
    return got


def _columns(chunk: Sequence[Example]) -> dict[str, list[Any]]:
    return {name: [example.get(name) for example in chunk] for name in chunk[0]}
