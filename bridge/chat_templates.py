"""Chat templates: which one a tokenizer speaks, given as a new tokenizer; the old one stays."""

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bridge.tokenizer import require_jinja

CHATML = """{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Template(NamedTuple):
    """A Jinja template and the text that ends a turn ("eos_token": the tokenizer's own)."""

    jinja: str
    stop_word: str


TEMPLATES = {"chatml": Template(CHATML, "<|im_end|>")}
IDENTITY = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
ALIASES = {
    "system": ("system",),
    "user": ("user", "human", "input"),
    "assistant": ("assistant", "gpt", "output"),
}
PLACEHOLDER = "{system_message}"


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
        chat_template: a name of TEMPLATES, (jinja_text, stop_word), or None for the model's own.
        mapping: what the messages call "role", "content", "user" and "assistant"; both are read.
        map_eos_token: the stop word becomes the EOS token. Where it is no token yet, it takes the
            EOS token's place in the vocabulary, so that no embedding row is added.
        system_message: fills {system_message} of a custom template.
        patch_saving, use_zoo_tokenizer_patch: without effect, there is nothing to patch here.

    Raises TypeError for another type, ValueError for an unknown name, key or missing message, and
    for text that is no Jinja.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"get_chat_template takes a tokenizer, got {type(tokenizer).__name__}")
    template = _chosen(tokenizer, chat_template)
    text = _filled(template.jinja, system_message)
    require_jinja(text, "chat_template")
    new = copy.deepcopy(tokenizer)
    if map_eos_token and template.stop_word not in ("eos_token", tokenizer.eos_token):
        _make_eos(new, template.stop_word)
    new.chat_template = _mapped(text, mapping)
    return new


def _chosen(tokenizer, chat_template) -> Template:
    if chat_template is None:
        if tokenizer.chat_template is None:
            raise ValueError("chat_template=None keeps the tokenizer's own, but it has none")
        return Template(tokenizer.get_chat_template(), "eos_token")
    if isinstance(chat_template, str):
        if chat_template not in TEMPLATES:
            raise ValueError(
                f"chat_template {chat_template!r}: known are {sorted(TEMPLATES)}, None (the "
                "model's own template) and (jinja_text, stop_word); more names come later"
            )
        return TEMPLATES[chat_template]
    pair = chat_template if isinstance(chat_template, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise TypeError(
            f"chat_template {chat_template!r}: expected (jinja_text, stop_word), None or one of "
            f"{sorted(TEMPLATES)}"
        )
    return Template(*pair)


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
        tokenizer.eos_token = word
        return
    if old is None:
        raise ValueError(f"stop word {word!r} is no token and there is no EOS token to rename")
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    slots = [name for name, token in tokenizer.special_tokens_map.items() if token == old]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(_renamed(tree, old, word)))
    for name in slots:
        setattr(tokenizer, name, word)


def _renamed(tree: Any, old: str, new: str) -> Any:
    """A JSON tree in which each string equal to `old`, keys included, is `new`."""
    if isinstance(tree, dict):
        return {new if k == old else k: _renamed(v, old, new) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_renamed(item, old, new) for item in tree]
    return new if tree == old else tree


def standard_messages(
    messages: Iterable[Mapping[str, Any]], aliases: Mapping[str, Iterable[str]] = ALIASES
) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from those or from ShareGPT's `from` and `value`.

    Raises ValueError for a message of another shape, TypeError for a role no alias names.
    """
    roles = {alias: role for role, known in aliases.items() for alias in known}
    return [_standard(n, message, roles) for n, message in enumerate(messages)]


def _standard(n: int, message: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    sharegpt = "from" in message
    role, content = ("from", "value") if sharegpt else ("role", "content")
    if role not in message or (content not in message and "tool_calls" not in message):
        raise ValueError(
            f"message {n} has {sorted(message)}: expected role and content, or from and value"
        )
    said = message[role]
    known = roles if sharegpt else {**roles, "tool": "tool", "developer": "developer"}
    if said not in known:
        raise TypeError(f"message {n} has role {said!r}: known are {sorted(known)}")
    rest = {k: v for k, v in message.items() if k not in (role, content) and v is not None}
    return {"role": known[said], "content": message.get(content), **rest}
