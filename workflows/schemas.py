"""The columns that rows of a data set may have, and how each kind is read: ids, what is learnt."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from bridge.chat_templates import standard_messages
from bridge.tokenizer import conversation_row, encode, ids

Example = Mapping[str, Any]
Tokens = tuple[list[int], list[int]]

IGNORED = -100
READS = 'the model reads text alone: expected text, or parts like {"type": "text", "text": "..."}'
PICTURES = ("image", "images", "video", "videos", "audio", "audios")


class Loss(NamedTuple):
    """Which tokens a trainer asked to learn, in its own keywords.

    `elsewhere` has answers alone learnt: by rendering where a row is messages, and in other rows
    as its (tokens, mask) -> mask says.
    """

    completion_only: bool | None = None
    assistant_only: bool = False
    last_response_only: bool = False
    text_field: str = "text"
    elsewhere: Callable[[Sequence[int], Sequence[int]], list[int]] | None = None


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
        "instruction/output": {"instruction", "output"},
    }
    found = next((name for name, columns in needs.items() if columns <= has), None)
    no_pictures(example)
    if found is None:
        empty = sorted(name for name, value in example.items() if value is None)
        raise ValueError(
            f"columns {sorted(example)} (None in {empty}) are of no known schema; expected a text "
            f"column ({text_field!r}), 'messages' or 'conversations', 'prompt' and 'completion', "
            "'instruction' and 'output' (with 'input', 'system'), 'input_ids' (with 'labels', "
            "'attention_mask', 'completion_mask', 'assistant_masks'), or a formatting_func"
        )
    return found


def read(example: Example, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> Tokens:
    """Ids of an example, and which of them the loss asks for; raises ValueError and TypeError."""
    name = schema(example, loss.text_field)
    if loss.elsewhere is None:
        return SCHEMAS[name](example, tokenizer, loss)
    if name in SPOKEN or name == "prompt/completion" and not _text(example["prompt"]):
        return SCHEMAS[name](example, tokenizer, loss._replace(assistant_only=True))
    tokens, mask = SCHEMAS[name](example, tokenizer, loss)
    return tokens, loss.elsewhere(tokens, mask)


def no_pictures(example: Example) -> None:
    """Raises ValueError for a column with an image and the like."""
    for column in PICTURES:
        if example.get(column):
            raise ValueError(f"column {column!r} holds what is no text; {READS}")


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
    messages = [_texts_only(n, message) for n, message in enumerate(messages)]
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


def _texts_only(n: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message, its text in one piece. Raises ValueError for an image and the like."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    said = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(map(_text, said)):
        kind = lambda part: part.get("type") if isinstance(part, Mapping) else type(part).__name__
        other = [kind(part) for part, t in zip(content, said, strict=True) if not _text(t)]
        raise ValueError(f"message {n} holds {other}; {READS}")
    return message | {"content": "".join(said)}


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


def _instruction(example: Example, tokenizer: PreTrainedTokenizerBase, loss: Loss) -> Tokens:
    """Alpaca's columns as a question, with the input below the instruction, and its answer."""
    names = ("system", "instruction", "input", "output")
    system, asked, given, said = (example.get(name) or "" for name in names)
    wrong = [n for n, x in zip(names, (system, asked, given, said), strict=True) if not _text(x)]
    if wrong:
        raise ValueError(f"columns {wrong} hold no text; expected text in {list(names)}")
    if tokenizer.chat_template is None:
        raise ValueError(
            "'instruction' and 'output' need a chat template: get_chat_template(tokenizer, "
            "'alpaca') has Alpaca's own, or give a formatting_func that makes text of a row"
        )
    talk = [{"role": "system", "content": system}] if system else []
    talk.append({"role": "user", "content": f"{asked}\n\n{given}" if given else asked})
    talk.append({"role": "assistant", "content": said})
    answers = loss.assistant_only or bool(loss.completion_only)
    return _spoken(talk, 0, answers, example, tokenizer, loss)


def _text(value: Any) -> bool:
    return isinstance(value, str)


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


def embedded(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Raises ValueError for a token that a model of `vocab` embedding rows has no row for."""
    if max(tokens, default=0) < vocab:
        return
    first = next(token for token in tokens if token >= vocab)
    raise ValueError(
        f"token {tokenizer.convert_ids_to_tokens(first)!r} has the id {first}, but the model's "
        f"vocabulary has {vocab} (ids 0 to {vocab - 1}), the tokenizer {len(tokenizer)}; take the "
        "model's own tokenizer, or before get_peft_model add_new_tokens, or "
        "model.resize_token_embeddings(len(tokenizer))"
    )


def _whole(token: Any) -> bool:
    return isinstance(token, Real) and math.isfinite(token) and int(token) == token


SCHEMAS = {
    "input_ids": _tokenised,
    "text": _plain,
    "messages": _conversation,
    "conversations": _conversation,
    "prompt/completion": _completion,
    "instruction/output": _instruction,
}
SPOKEN = ("messages", "conversations", "instruction/output")  # rows that are messages
