"""A user's data set in, token rows with loss masks out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unsloth_jax.data import Row
from workflows import lengths, sources
from workflows.schemas import IGNORED, SCHEMAS, Example, Loss, Tokens, schema

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
        raise ValueError("the data set is empty: there is nothing to train on")
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
    last_response_only and formatting_func.

    Raises ValueError, with the row's index, for columns of no known schema, a row with nothing to
    learn, and one longer than `max_length` unless `truncate`; `split` makes several Rows of it.
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
) -> Iterator[Tokens]:
    """Token ids of each example and which the loss asks for, whatever their number."""
    loss = Loss(completion_only_loss, assistant_only_loss, last_response_only, dataset_text_field)
    dataset = sources.opened(dataset)
    if isinstance(dataset, Mapping):
        what = f"{type(dataset).__name__} {str(list(dataset))[:60]}"
        raise TypeError(f"a data set must be rows of named columns, got {what}; name a split")
    if formatting_func is not None:
        texts = formatted(dataset, formatting_func)
        dataset = ({dataset_text_field: text} for text in texts)
    for index, example in enumerate(dataset):
        yield _read(index, example, tokenizer, loss)


def _read(index, example, tokenizer, loss) -> Tokens:
    try:
        if not isinstance(example, Mapping):
            raise TypeError(f"expected a row of named columns, got {type(example).__name__}")
        read = SCHEMAS[schema(example, loss.text_field)]
        return read(example, tokenizer, loss)
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
    """The texts a formatting_func makes: of one example each if it returns str, of batches if list.

    Raises TypeError if it returns anything else.
    """
    stream = iter(dataset)
    head = list(islice(stream, 1))
    stream = chain(head, stream)
    many = bool(head) and _returns_list(formatting_func(head[0]))
    if not many:
        return (_text_of(formatting_func(example)) for example in stream)
    return (
        _text_of(text) for batch in _batches(stream) for text in _list_of(formatting_func(batch))
    )


def _list_of(got: Any) -> list[Any]:
    if not isinstance(got, list):
        raise TypeError(
            f"formatting_func returned a list for one example and {type(got).__name__} for a "
            "batch of them, expected a list of texts"
        )
    return got


def _returns_list(got: Any) -> bool:
    if not isinstance(got, str | list):
        raise TypeError(f"formatting_func returned {type(got).__name__}, expected str or list")
    return isinstance(got, list)


def _text_of(got: Any) -> str:
    if not isinstance(got, str):
        raise TypeError(f"formatting_func gave {type(got).__name__} for a text, expected str")
    return got


def _batches(stream: Iterator[Example]) -> Iterator[dict[str, list[Any]]]:
    while chunk := list(islice(stream, BATCH)):
        yield {name: [example.get(name) for example in chunk] for name in chunk[0]}
