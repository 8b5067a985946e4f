"""Chat templates: which one a tokenizer speaks, given as a new tokenizer; the old one stays."""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bridge import templates
from bridge.tokenizer import require_jinja


class Template(NamedTuple):
    """A Jinja text, the text that ends a turn ("eos_token": the tokenizer's own), and which
    tokens it takes: the stop word for EOS, and `renames` for others.
    """

    jinja: str
    stop_word: str = templates.EOS
    maps_eos: bool = True
    renames: Mapping[str, str] = {}


IDENTITY = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
ALIASES = {
    "system": ("system",),
    "user": ("user", "human", "input"),
    "assistant": ("assistant", "gpt", "output"),
}
PLACEHOLDER = "{system_message}"
# "chatml" on a Gemma tokenizer: the model knows turns by its own tokens, which are renamed.
GEMMA = {"chatml": "gemma_chatml"}


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str] | list[str] | None = "chatml",
    mapping: Mapping[str, str] = IDENTITY,
    map_eos_token: bool = True,
    system_message: str | None = None,
    patch_saving: bool = True,
    use_zoo_tokenizer_patch: bool | None = None,
) -> PreTrainedTokenizerBase:
    """A new tokenizer with the template; the one given stays as it is, to the byte.

    Args:
        chat_template: a name of docs/chat_templates.md, (jinja_text, stop_word), or None for the
            model's own. On Gemma's tokenizers "chatml" is "gemma_chatml", and a text without BOS
            gets it.
        mapping: what the messages call "role", "content", "user" and "assistant"; both are read.
        map_eos_token: the stop word becomes the EOS token, if the template allows it, and the pad
            token where that was the EOS token. Where it is no token yet, it takes the EOS token's
            place in the vocabulary, so that no embedding row is added. False renames nothing.
        system_message: the system text of a conversation that has none, for names that have such
            a text; fills {system_message} of a custom template.
        patch_saving, use_zoo_tokenizer_patch: without effect, there is nothing to patch here.

    Raises TypeError for another type, ValueError for an unknown name, key or missing message, and
    for text that is no Jinja.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"get_chat_template takes a tokenizer, got {type(tokenizer).__name__}")
    template = _chosen(tokenizer, chat_template, system_message)
    require_jinja(template.jinja, "chat_template")
    new = copy.deepcopy(tokenizer)
    if map_eos_token and template.maps_eos:
        vocabulary = tokenizer.get_vocab()
        for old, word in template.renames.items():
            if old in vocabulary and word not in vocabulary:
                _rename(new, old, word)
        if template.stop_word not in (templates.EOS, tokenizer.eos_token):
            _make_eos(new, template.stop_word)
    new.chat_template = _mapped(template.jinja, mapping)
    return new


def _chosen(tokenizer, chat_template, system_message) -> Template:
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise ValueError("chat_template=None keeps the tokenizer's own, but it has none")
        return Template(_filled(tokenizer.get_chat_template(), system_message))
    gemma = is_gemma(tokenizer)
    if isinstance(chat_template, str):
        name = GEMMA.get(chat_template, chat_template) if gemma else chat_template
        template = _named(name, system_message)
    else:
        jinja, stop_word = _pair(chat_template)
        template = Template(_filled(jinja, system_message), stop_word)
    bos = tokenizer.bos_token
    if gemma and bos and "bos_token" not in template.jinja and bos not in template.jinja:
        return template._replace(jinja="{{ bos_token }}" + template.jinja)
    return template


def is_gemma(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is one of Gemma's, whose models fail without BOS at the start."""
    if type(tokenizer).__name__.startswith("Gemma"):
        return True
    turns = {"<start_of_turn>", "<|turn>"} & set(tokenizer.get_vocab())
    return tokenizer.bos_token == "<bos>" and bool(turns)


def _named(name: str, system_message: str | None) -> Template:
    named = templates.NAMED.get(name)
    if named is None:
        near = difflib.get_close_matches(name, templates.NAMED, n=3, cutoff=0.5)
        raise ValueError(
            f"chat_template {name!r}: {f'did you mean {near}? ' if near else ''}known are "
            f"{sorted(templates.NAMED)}, None (the model's own template) and "
            "(jinja_text, stop_word)"
        )
    if system_message is not None and templates.default_system(name) is None:
        having = sorted(n for n in templates.NAMED if templates.default_system(n) is not None)
        raise ValueError(
            f"system_message given, but the template {name!r} has no system text of its own; put "
            f'a {{"role": "system"}} message in the conversations instead. Names with one: {having}'
        )
    jinja = templates.text(name, system_message)
    return Template(jinja, named.stop_word, named.maps_eos, named.renames)


def _pair(chat_template: Any) -> tuple[str, str]:
    pair = chat_template if isinstance(chat_template, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise TypeError(
            f"chat_template {chat_template!r}: expected (jinja_text, stop_word), None or one of "
            f"{sorted(templates.NAMED)}"
        )
    return pair[0], pair[1]


def _filled(text: str, system_message: str | None) -> str:
    holds = PLACEHOLDER in text
    if holds and system_message is None:
        raise ValueError(f"the template has {PLACEHOLDER}: give system_message=")
    if not holds and system_message is not None:
        raise ValueError(
            f"system_message given, but the template has no {PLACEHOLDER}; "
            'put a {"role": "system"} message in the conversations instead'
        )
    return text.replace(PLACEHOLDER, system_message or "")


def _mapped(text: str, mapping: Mapping[str, str]) -> str:
    """The template, reading messages with the mapping's keys and roles beside its own."""
    unknown = set(mapping) - set(IDENTITY)
    if unknown:
        raise ValueError(f"mapping has {sorted(unknown)}: known keys are {sorted(IDENTITY)}")
    if all(mapping.get(key, key) == key for key in IDENTITY):
        return text
    # json.dumps writes what Jinja reads as a string, and what the words hold stays text.
    role, content, user, assistant = (
        json.dumps(mapping.get(key, key), ensure_ascii=False) for key in IDENTITY
    )
    return (
        "{%- set seen = namespace(messages=[]) -%}{%- for m in messages -%}"
        f"{{%- set role = m[{role}] if {role} in m else m['role'] -%}}"
        f"{{%- set role = 'user' if role == {user} else role -%}}"
        f"{{%- set role = 'assistant' if role == {assistant} else role -%}}"
        f"{{%- set content = m[{content}] if {content} in m else m['content'] -%}}"
        "{%- set seen.messages = seen.messages + [dict(m, role=role, content=content)] -%}"
        "{%- endfor -%}{%- set messages = seen.messages -%}" + text
    )


def _make_eos(tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    """Makes `word` the EOS token: an existing token keeps its id, a new one takes EOS's."""
    old = tokenizer.eos_token
    if word in tokenizer.get_vocab():
        if old is not None and tokenizer.pad_token == old:
            tokenizer.pad_token = word
        tokenizer.eos_token = word
        return
    if old is None:
        raise ValueError(f"stop word {word!r} is no token and there is no EOS token to rename")
    _rename(tokenizer, old, word)


def _rename(tokenizer: PreTrainedTokenizerBase, old: str, word: str) -> None:
    """Writes `word` wherever the tokenizer says `old`; ids and the vocabulary's size stay."""
    slots = [name for name, token in tokenizer.special_tokens_map.items() if token == old]
    extra = list(map(str, tokenizer.extra_special_tokens))
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(_renamed(tree, old, word)))
    for name in slots:
        setattr(tokenizer, name, word)
    if old in extra:
        tokenizer.extra_special_tokens = _renamed(extra, old, word)


def _renamed(tree: Any, old: str, new: str) -> Any:
    """A JSON tree in which each string equal to `old`, keys included, is `new`."""
    if isinstance(tree, dict):
        return {new if k == old else k: _renamed(v, old, new) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_renamed(item, old, new) for item in tree]
    return new if tree == old else tree


def standard_messages(
    messages: Iterable[Any], aliases: Mapping[str, Iterable[str]] = ALIASES
) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from those or from ShareGPT's `from` and `value`.

    Raises ValueError for a message of another shape, TypeError for a role no alias names.
    """
    roles = {alias: role for role, known in aliases.items() for alias in known}
    return [_standard(n, message, roles) for n, message in enumerate(messages)]


def _standard(n: int, message: Any, roles: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {n} is {message!r}: expected role and content, or from and value"
        )
    given = {key: value for key, value in message.items() if value is not None}
    sharegpt = "from" in given
    role, content = ("from", "value") if sharegpt else ("role", "content")
    if role not in given or (content not in given and "tool_calls" not in given):
        raise ValueError(
            f"message {n} has {sorted(given)}: expected role and content, or from and value"
        )
    said = given.pop(role)
    known = roles if sharegpt else {**roles, "tool": "tool", "developer": "developer"}
    if said not in known:
        raise TypeError(f"message {n} has role {said!r}: known are {sorted(known)}")
    text = given.pop(content, None)
    if not isinstance(text, str | list | None):
        raise ValueError(
            f"message {n} has {content} {text!r}: expected text or a list of content parts"
        )
    return {"role": known[said], "content": text, **given}


def standardize_sharegpt(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    aliases_for_system: Iterable[str] = ALIASES["system"],
    aliases_for_user: Iterable[str] = ALIASES["user"],
    aliases_for_assistant: Iterable[str] = ALIASES["assistant"],
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """The data set with `conversations` (or `messages`) as role and content: a list of rows gives
    a list, what has map() (datasets' classes, streaming ones too) what that returns.

    `tokenizer` makes no difference to text. Raises, with the row's index, TypeError for a role no
    alias names and ValueError for a row of another shape.
    """
    said = (aliases_for_system, aliases_for_user, aliases_for_assistant)
    aliases = dict(zip(ALIASES, map(tuple, said), strict=True))
    if not hasattr(dataset, "map"):
        return [row | _conversation(n, row, aliases) for n, row in enumerate(map(dict, dataset))]
    # Streaming data sets know no num_proc.
    parallel = {} if num_proc is None else {"num_proc": num_proc}
    # A partial of a named function is quick to hash; datasets hashes a closure with all it sees.
    fixed = partial(_standard_batch, aliases=aliases)
    return dataset.map(fixed, batched=True, with_indices=True, batch_size=batch_size, **parallel)


# The notebooks' other name for it.
standardize_data_formats = standardize_sharegpt


def _standard_batch(
    batch: Mapping[str, list[Any]], indices: list[int], *, aliases: Mapping[str, Iterable[str]]
) -> dict[str, list[Any]]:
    """The changed columns of a batch, {name: values}."""
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    made = [_conversation(n, row, aliases) for n, row in zip(indices, rows, strict=True)]
    names = set().union(*made)
    pairs = list(zip(rows, made, strict=True))
    return {name: [new.get(name, old.get(name)) for old, new in pairs] for name in names}


def _conversation(
    index: int, row: Mapping[str, Any], aliases: Mapping[str, Iterable[str]]
) -> dict[str, list[dict[str, Any]]]:
    """{column: messages} of one row; errors name the row."""
    column = next(
        (name for name in ("conversations", "messages") if row.get(name) is not None), None
    )
    if column is None:
        raise ValueError(
            f"row {index} has {sorted(row)}: expected messages in 'conversations' or 'messages'"
        )
    try:
        return {column: standard_messages(row[column], aliases)}
    except (TypeError, ValueError) as error:
        raise type(error)(f"row {index}: {error}") from error
