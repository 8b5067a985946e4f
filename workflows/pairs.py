"""A preference data set in, token rows out: pairs of answers, or answers with a verdict."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bridge.chat_templates import standard_messages
from unsloth_jax.data import Row
from workflows import schemas, sources
from workflows.keywords import say

Example = Mapping[str, Any]
UNPAIRED = 1000  # pairs whose chosen answers stand before their rejected ones, as in TRL
ANSWERS = schemas.Loss(completion_only=True)
PAIRED_SHAPES = (
    "'prompt', 'chosen' and 'rejected' (all texts, or all lists of messages), or 'chosen' and "
    "'rejected' that begin with the same prompt"
)
JUDGED_SHAPES = (
    "'prompt', 'completion' (both texts, or both lists of messages) and 'label' (True or False), "
    f"or {PAIRED_SHAPES}"
)


class Pair(NamedTuple):
    """Two answers to one prompt; `reference` are the frozen policy's log-probabilities of them."""

    chosen: Row
    rejected: Row
    reference: tuple[float, float] | None = None


class Judged(NamedTuple):
    """One answer, and whether it is as wanted."""

    answer: Row
    desirable: bool


class Cut(NamedTuple):
    """How rows are shortened: all of it, and before that its prompt and its answer."""

    length: int
    keep_end: bool = False
    prompt: int | None = None
    completion: int | None = None
    refuse: bool = False  # a row over `length` is an error


def pairs(
    dataset: Iterable[Any] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut,
    vocab: int | None = None,
) -> list[Pair]:
    """A Pair for each example of (prompt,) chosen and rejected answers, in order.

    Raises ValueError with the row's index for other columns, for answers that are the same, for a
    token outside the model's `vocab`, and where nothing is left; pairs whose prompt leaves no room
    for an answer are left out, and said.
    """

    def made(example: Example) -> Pair | None:
        prompt, chosen, rejected = paired(example)
        whole = [_row(prompt, side, example, tokenizer, vocab) for side in (chosen, rejected)]
        sides = [shortened(row, cut) for row in whole]
        return None if None in sides else Pair(*sides)

    return _every(dataset, made, cut)


def judged(
    dataset: Iterable[Any] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut,
    vocab: int | None = None,
) -> list[Judged]:
    """A Judged for each example of prompt, completion and label, or two for a chosen and a rejected
    answer. Raises as `pairs`, and for a label that is none.
    """

    def made(example: Example) -> Judged | None:
        prompt, answer, desirable = _verdict(example)
        row = shortened(_row(prompt, answer, example, tokenizer, vocab), cut)
        return None if row is None else Judged(row, desirable)

    return _every(dataset, made, cut, unpaired)


def unpaired(dataset: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """(row's index, example) with one answer each."""
    numbered = enumerate(dataset)
    while chunk := list(islice(numbered, UNPAIRED)):
        both = [isinstance(e, Mapping) and "chosen" in e and "rejected" in e for _, e in chunk]
        if not any(both):
            yield from chunk
            continue
        for label in (True, False):
            for (index, example), two in zip(chunk, both, strict=True):
                if two:
                    yield index, {**example, "label": label, "completion": None}
                elif label:
                    yield index, example


def paired(example: Example) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), texts or messages; a prompt that both answers begin with is cut
    out of them. Raises ValueError for columns or values that are no such pair.
    """
    chosen, rejected = (example.get(name) for name in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        raise _columns(example, PAIRED_SHAPES)
    spoken = [not isinstance(side, str) for side in (chosen, rejected)]
    if any(spoken):
        if not all(spoken):
            raise ValueError("'chosen' and 'rejected' must both be text or both be messages")
        chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if chosen == rejected:
        raise ValueError(
            "'chosen' and 'rejected' are the same: such a pair prefers nothing; leave it out"
        )
    prompt = example.get("prompt")
    if prompt is None or (spoken[0] and isinstance(prompt, str)):
        return _implicit(prompt, chosen, rejected)
    if not spoken[0]:
        if not isinstance(prompt, str):
            raise ValueError("'prompt' is messages, 'chosen' and 'rejected' are text")
        return prompt, chosen, rejected
    prompt = _messages(prompt, "prompt")
    if prompt and chosen[: len(prompt)] == prompt:
        raise ValueError(
            "'chosen' begins with the messages of 'prompt', which would stand there twice; leave "
            "them out of 'chosen' and 'rejected', or leave 'prompt' out"
        )
    return prompt, chosen, rejected


def _implicit(prompt: str | None, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The longest common beginning as the prompt, as TRL finds it."""
    alike = takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
    at = sum(1 for _ in alike)
    if isinstance(chosen, str) and at and chosen[at - 1] == " ":
        at -= 1
    if not at:
        raise ValueError(
            "there is no 'prompt', and 'chosen' and 'rejected' begin with nothing in common; "
            f"expected {PAIRED_SHAPES}"
        )
    shared = chosen[:at]
    if not chosen[at:] or not rejected[at:]:
        raise ValueError("one of 'chosen' and 'rejected' is the beginning of the other")
    if prompt is not None and prompt not in (m["content"] for m in shared):
        raise ValueError(
            f"'prompt' {prompt[:40]!r} is no prefix of 'chosen' and 'rejected', none of whose "
            "common messages it is; give 'prompt' as messages, or leave it out"
        )
    return shared, chosen[at:], rejected[at:]


def _verdict(example: Example) -> tuple[Any, Any, bool]:
    label = example.get("label")
    if example.get("completion") is None and example.get("chosen") is not None:
        prompt, chosen, rejected = paired(example)
        return prompt, chosen if label else rejected, bool(label)
    if None in (example.get("prompt"), example.get("completion"), label):
        raise _columns(example, JUDGED_SHAPES)
    if label not in (True, False):
        raise ValueError(f"'label' must be True or False, got {label!r}")
    return example["prompt"], example["completion"], bool(label)


def _columns(example: Example, shapes: str) -> ValueError:
    empty = sorted(name for name, value in example.items() if value is None)
    return ValueError(f"columns {sorted(example)} (None in {empty}); expected {shapes}")


def _messages(given: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{name!r} must be text or a list of messages, got {str(given)[:60]!r}")
    return standard_messages(given)


def _row(prompt, answer, example, tokenizer, vocab) -> Row:
    """Prompt and answer, the answer's tokens supervised, by the same road as SFT's rows."""
    schemas.no_pictures(example)
    tools = {name: example[name] for name in ("tools", "chat_template_kwargs") if name in example}
    whole = {"prompt": prompt, "completion": answer, **tools}
    tokens, mask = schemas.SCHEMAS["prompt/completion"](whole, tokenizer, ANSWERS)
    if vocab is not None:
        schemas.embedded(tokens, tokenizer, vocab)
    row = Row(tokens, [0, *mask[1:]])
    if not any(row.mask):
        raise ValueError(f"no token to learn in the answer {str(answer)[:60]!r}")
    return row


def shortened(row: Row, cut: Cut) -> Row | None:
    """The row within its limits; None where none of the answer is left.

    Raises ValueError for a row over the length where `cut` refuses those.
    """
    tokens, mask = row
    start = mask.index(1)
    if cut.completion is not None:
        tokens, mask = tokens[: start + cut.completion], mask[: start + cut.completion]
    if cut.prompt is not None and start > cut.prompt:
        tokens, mask = tokens[start - cut.prompt :], mask[start - cut.prompt :]
    if len(tokens) > cut.length:
        if cut.refuse:
            raise ValueError(
                f"{len(tokens)} tokens, more than the model's max_seq_length={cut.length}; give "
                "max_length to cut such rows"
            )
        kept = slice(-cut.length, None) if cut.keep_end else slice(cut.length)
        tokens, mask = tokens[kept], mask[kept]
    mask = [0, *mask[1:]]
    return Row(tokens, mask) if any(mask) else None


def _every(
    dataset: Iterable[Any] | str | Path,
    made: Callable[[Example], Any],
    cut: Cut,
    numbered: Callable[[Iterable[Any]], Iterable[tuple[int, Any]]] = enumerate,
) -> list[Any]:
    """What `made` makes of each example; None is left out and counted."""
    dataset = sources.opened(dataset)
    if isinstance(dataset, Mapping):
        what = f"{type(dataset).__name__} {str(list(dataset))[:60]}"
        raise TypeError(f"a data set must be rows of named columns, got {what}; name a split")
    found = [_named(index, example, made) for index, example in numbered(dataset)]
    if not found:
        raise ValueError("the data set is empty: it has no row")
    kept = [one for one in found if one is not None]
    if not kept:
        raise ValueError(
            f"each of the {len(found)} rows has a prompt of max_length={cut.length} tokens or "
            "more, which leaves no answer; raise max_length or give max_prompt_length"
        )
    if len(kept) < len(found):
        say(
            f"{len(found) - len(kept)} of {len(found)} rows are left out: their prompts fill "
            f"max_length={cut.length}"
        )
    _say_cut(kept, cut)
    return kept


def _say_cut(kept: Sequence[Any], cut: Cut) -> None:
    sides = [one[:2] if isinstance(one, Pair) else one[:1] for one in kept]
    full = sum(any(len(row.tokens) == cut.length for row in rows) for rows in sides)
    if full:
        say(f"{full} of {len(kept)} rows fill max_length={cut.length}; what is longer was cut")


def _named(index: int, example: Any, made: Callable[[Example], Any]) -> Any:
    try:
        if not isinstance(example, Mapping):
            raise TypeError(f"expected a row of named columns, got {type(example).__name__}")
        return made(example)
    except (ValueError, TypeError) as error:
        raise type(error)(f"row {index}: {error}") from error
    except TemplateError as error:
        raise ValueError(f"row {index}: the chat template refuses it: {error}") from error
