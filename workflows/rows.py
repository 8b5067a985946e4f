"""A user's data set in, token rows with loss masks out: each schema that a trainer takes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bridge.chat_templates import standard_messages
from bridge.tokenizer import conversation_row, encode, ids
from unsloth_jax.data import Row
from workflows import sources

Example = Mapping[str, Any]
Tokens = tuple[list[int], list[int]]

IGNORED = -100
BATCH = 1000


class Loss(NamedTuple):
    """Which tokens a trainer asked to learn, in its own keywords."""

    completion_only: bool | None = None
    assistant_only: bool = False
    last_response_only: bool = False
    text_field: str = "text"


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
    dataset: Iterable[Example] | str | Path, tokenizer: PreTrainedTokenizerBase, **how: Any
) -> list[Row]:
    """`streamed`, all at once. Raises ValueError for a data set without rows."""
    out = list(streamed(dataset, tokenizer, **how))
    if not out:
        raise ValueError("the data set is empty: there is nothing to train on")
    return out


def streamed(
    dataset: Iterable[Example] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    dataset_text_field: str = "text",
    formatting_func: Callable[[Any], Any] | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    last_response_only: bool = False,
    truncate: bool = False,
    split: bool = False,
) -> Iterator[Row]:
    """One Row for each example, in order; mask[0] is 0, since nothing predicts the first token.

    `dataset` may be a file, a folder or a hub name, as `sources.opened` takes it.

    Raises ValueError, with the row's index, for columns of no known schema, a row with nothing to
    learn, and one longer than `max_length` unless `truncate`; `split` makes several Rows of it.
    """
    loss = Loss(completion_only_loss, assistant_only_loss, last_response_only, dataset_text_field)
    dataset = sources.opened(dataset)
    if isinstance(dataset, Mapping):
        what = f"{type(dataset).__name__} {str(list(dataset))[:60]}"
        raise TypeError(f"a data set must be rows of named columns, got {what}; name a split")
    if formatting_func is not None:
        texts = formatted(dataset, formatting_func)
        dataset = ({dataset_text_field: text} for text in texts)
    for index, example in enumerate(dataset):
        tokens, mask = _read(index, example, tokenizer, loss)
        if split and max_length is not None:
            yield from _split(index, tokens, mask, max_length)
        else:
            yield _limited(index, tokens, mask, max_length, truncate)


def _read(index, example, tokenizer, loss) -> Tokens:
    try:
        if not isinstance(example, Mapping):
            raise TypeError(f"expected a row of named columns, got {type(example).__name__}")
        read = SCHEMAS[schema(example, loss.text_field)]
        return read(example, tokenizer, loss)
    except (ValueError, TypeError) as error:
        raise type(error)(f"row {index}: {error}") from error
    except TemplateError as error:
        raise ValueError(f"row {index}: the chat template refuses it: {error}") from error


def _split(index, tokens, mask, length) -> Iterator[Row]:
    """The row in pieces of `length` tokens, those left out in which nothing is learnt."""
    starts = range(0, len(tokens), length)
    cut = lambda part, at: part[at : at + length]
    pieces = [Row(cut(tokens, at), [0, *cut(mask, at)[1:]]) for at in starts]
    learnt = [piece for piece in pieces if any(piece.mask)]
    if not learnt:
        raise ValueError(f"row {index}: no supervised token among {len(tokens)}")
    yield from learnt


def _limited(index, tokens, mask, max_length, truncate) -> Row:
    cut = max_length is not None and len(tokens) > max_length
    if cut and not truncate:
        raise ValueError(
            f"row {index}: {len(tokens)} tokens, more than max_length={max_length}; "
            "raise the limit, shorten the row or ask for truncation"
        )
    row = Row(tokens[:max_length], [0, *mask[1:max_length]][: len(tokens)])
    if not any(row.mask):
        what = f"the first {max_length} of {len(tokens)}" if cut else str(len(tokens))
        raise ValueError(f"row {index}: no supervised token among {what}")
    return row


def report(rows: Sequence[Row]) -> Report:
    """The totals of `rows`."""
    return Report(len(rows), sum(len(r.tokens) for r in rows), sum(sum(r.mask) for r in rows))


def schema(example: Example, text_field: str = "text") -> str:
    """The name of the schema that an example's columns have; columns beside it are not read.

    Raises ValueError naming the columns and all accepted schemas.
    """
    has = {name for name, value in example.items() if value is not None}
    needs = {
        "input_ids": {"input_ids"},
        "text": {text_field},
        "messages": {"messages"},
        "conversations": {"conversations"},
        "prompt/completion": {"prompt", "completion"},
    }
    found = next((name for name, columns in needs.items() if columns <= has), None)
    if found is None:
        empty = sorted(name for name, value in example.items() if value is None)
        raise ValueError(
            f"columns {sorted(example)} (None in {empty}) are of no known schema; expected a text "
            f"column ({text_field!r}), 'messages' or 'conversations', 'prompt' and 'completion', "
            "'input_ids' (with 'labels', 'attention_mask', 'completion_mask', "
            "'assistant_masks'), or a formatting_func"
        )
    return found


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


def _plain(example: Example, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> Tokens:
    _refuse(loss.completion_only, "completion_only_loss", "'prompt' and 'completion'")
    _refuse(loss.assistant_only, "assistant_only_loss", "messages")
    text = example[loss.text_field]
    if not isinstance(text, str):
        raise ValueError(f"column {loss.text_field!r} holds {type(text).__name__}, expected text")
    tokens = _ended(tokenizer, text, encode(tokenizer, text).ids)
    return tokens, [1] * len(tokens)


def _refuse(asked: bool | None, name: str, needs: str) -> None:
    if asked:
        raise ValueError(f"{name}=True needs {needs}, which this row doesn't have")


def _ended(tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[int]) -> list[int]:
    """The tokens with EOS at their end, unless the text or the tokenizer has put one there."""
    eos = tokenizer.eos_token
    there = eos is None or tokens[-1:] == [tokenizer.eos_token_id] or text.rstrip().endswith(eos)
    return tokens if there else [*tokens, tokenizer.eos_token_id]


def _conversation(example: Example, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> Tokens:
    _refuse(loss.completion_only, "completion_only_loss", "'prompt' and 'completion'")
    column = "messages" if example.get("messages") is not None else "conversations"
    messages = standard_messages(example[column])
    return _spoken(messages, 0, loss.assistant_only, example, tokenizer, loss)


def _spoken(messages, first, answers_only, example, tokenizer, loss) -> Tokens:
    """Ids of a conversation; all tokens learnt, or the answers from message `first` on."""
    if not messages:
        raise ValueError("the conversation is empty")
    template = {**(example.get("chat_template_kwargs") or {})}
    if example.get("tools"):
        template["tools"] = example["tools"]
    if loss.last_response_only:
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        first, answers_only = (said or [len(messages)])[-1], True
    if answers_only:
        return conversation_row(tokenizer, messages, first=first, **template)
    tokens = ids(tokenizer, messages, **template)
    return tokens, [1] * len(tokens)


def _completion(example: Example, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> Tokens:
    prompt, completion = example["prompt"], example["completion"]
    only = loss.completion_only is not False
    if isinstance(prompt, str) and isinstance(completion, str):
        _refuse(loss.assistant_only, "assistant_only_loss", "messages")
        text = prompt + completion
        tokens, ends = encode(tokenizer, text)
        mask = [int(end > len(prompt) or not only) for end in ends]
        tokens = _ended(tokenizer, text, tokens)
        return tokens, mask + [1] * (len(tokens) - len(mask))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("'prompt' and 'completion' must both be text or both be messages")
    asked, said = standard_messages(prompt), standard_messages(completion)
    first = len(asked) if only else 0
    answers = only or loss.assistant_only
    return _spoken([*asked, *said], first, answers, example, tokenizer, loss)


def _tokenised(example: Example, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> Tokens:
    given = example["input_ids"]
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(map(_whole, given)):
        raise ValueError(f"input_ids must be whole numbers, got {str(given)[:80]}")
    tokens = [int(token) for token in given]
    ones = [1] * len(tokens)
    column = lambda name, default: default if (got := example.get(name)) is None else list(got)
    labels = column("labels", tokens)
    completion = column("completion_mask", ones) if loss.completion_only is not False else ones
    masks = [column("attention_mask", ones), completion, column("assistant_masks", ones)]
    lengths = [len(part) for part in (labels, *masks)]
    if set(lengths) != {len(tokens)}:
        raise ValueError(f"{len(tokens)} input_ids, but labels and masks of lengths {lengths}")
    if any(label not in (IGNORED, token) for label, token in zip(labels, tokens, strict=True)):
        raise ValueError("labels differ from input_ids; expected the same ids or -100")
    if any(not 0 <= token < len(tokenizer) for token in tokens):
        raise ValueError(f"input_ids outside the vocabulary of {len(tokenizer)} tokens")
    learnt = [label != IGNORED and all(on) for label, *on in zip(labels, *masks, strict=True)]
    kept = [i for i, present in enumerate(masks[0]) if present]
    return [tokens[i] for i in kept], [int(learnt[i]) for i in kept]


def _whole(token: Any) -> bool:
    return isinstance(token, Real) and math.isfinite(token) and int(token) == token


SCHEMAS = {
    "input_ids": _tokenised,
    "text": _plain,
    "messages": _conversation,
    "conversations": _conversation,
    "prompt/completion": _completion,
}
