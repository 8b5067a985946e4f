"""A data set of prompts in, token ids with their columns out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from bridge import tokenizer as text
from bridge.chat_templates import standard_messages
from workflows import schemas, sources
from workflows.keywords import say

SHOWN = 5


class Prompt(NamedTuple):
    """One row: its prompt as token ids, and all its columns for reward functions."""

    ids: list[int]
    example: dict[str, Any]

    @property
    def conversational(self) -> bool:
        """Whether the prompt is messages, so that completions are messages too."""
        return not isinstance(self.example["prompt"], str)


def prompts(
    dataset: Iterable[Any] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    *,
    drop: bool = False,
    vocab: int | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """A Prompt for each row of a data set with a column `prompt`, text or messages, in order.

    Raises ValueError naming the row for other columns, an empty prompt and a token outside
    `vocab`; for prompts over `longest` tokens unless `drop`, which leaves them out and says how
    many; and where no row is left.
    """
    opened = sources.opened(dataset)
    if isinstance(opened, Mapping):
        what = f"{type(opened).__name__} {str(list(opened))[:60]}"
        raise TypeError(f"a data set must be rows of named columns, got {what}; name a split")
    found = []
    for index, example in enumerate(opened):
        try:
            found.append(_prompt(example, tokenizer, vocab, dict(template or {})))
        except (TypeError, ValueError) as error:
            raise type(error)(f"row {index}: {error}") from error
    if not found:
        raise ValueError("the data set is empty: it has no row")
    return _fitting(found, longest, drop)


def _prompt(example: Any, tokenizer: Any, vocab: int | None, template: dict[str, Any]) -> Prompt:
    if not isinstance(example, Mapping):
        raise TypeError(f"expected a row of named columns, got {type(example).__name__}")
    if example.get("prompt") is None:
        raise ValueError(f"no column 'prompt'; there are {sorted(example)}")
    schemas.no_pictures(example)
    prompt = example["prompt"]
    if isinstance(prompt, str):
        ids = text.ids(tokenizer, prompt)
    elif isinstance(prompt, Sequence) and prompt:
        template |= example.get("chat_template_kwargs") or {}
        template |= {"tools": example["tools"]} if example.get("tools") else {}
        ids = text.ids(tokenizer, standard_messages(prompt), add_generation_prompt=True, **template)
    else:
        raise ValueError(f"prompt must be text or messages, got {prompt!r:.60}")
    if not ids:
        raise ValueError("the prompt is empty: it has no token")
    if vocab is not None:
        schemas.embedded(ids, tokenizer, vocab)
    return Prompt(ids, dict(example))


def _fitting(found: list[Prompt], longest: int, drop: bool) -> list[Prompt]:
    long = [i for i, one in enumerate(found) if len(one.ids) > longest]
    if long and not drop:
        most = max(len(found[i].ids) for i in long)
        raise ValueError(
            f"{len(long)} of {len(found)} prompts have more than {longest} tokens, the longest "
            f"{most} (rows {long[:SHOWN]}): raise max_seq_length, lower max_completion_length, or "
            "leave them out with drop_long_prompts=True"
        )
    kept = [one for one in found if len(one.ids) <= longest]
    if not kept:
        raise ValueError(f"each of the {len(found)} prompts has more than {longest} tokens")
    if long:
        say(f"{len(long)} of {len(found)} prompts are left out: more than {longest} tokens")
    columns = {frozenset(one.example) for one in kept}
    if len(columns) > 1:
        raise ValueError(f"rows have different columns: {[sorted(c) for c in columns][:2]}")
    return kept
