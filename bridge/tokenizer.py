"""Messages to token ids, and which of them a model has to learn; the tokenizer is only read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from bridge.safetensors_file import read_json

Messages = Sequence[Mapping[str, Any]]

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE_FILES = ("chat_template.json", "processor_config.json", "preprocessor_config.json")
# A private-use character: no template tests for it and no sane message holds it.
MARK = "\ue0f1"


class Text(NamedTuple):
    """Token ids, and for each how many characters of the text it and those before it cover."""

    ids: list[int]
    ends: list[int]


def load(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, chat template included wherever the folder keeps it.

    Raises FileNotFoundError where it has no tokenizer, TypeError where none can give offsets,
    ValueError where a file is broken, which it names, or the chat template is no Jinja.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        raise FileNotFoundError(f"no tokenizer in {folder}: expected one of {', '.join(FILES)}")
    _require_whole(folder)
    with _naming(f"the tokenizer in {folder}", AttributeError, KeyError, TypeError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    _require_offsets(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(folder)
    templates = tokenizer.chat_template or {}
    if not isinstance(templates, str | Mapping):
        raise ValueError(
            f"chat_template of the tokenizer in {folder} is {templates!r}, expected Jinja text"
        )
    named = {"chat_template": templates} if isinstance(templates, str) else templates
    for name, jinja in named.items():
        require_jinja(jinja, f"{name} of the tokenizer in {folder}")
    return tokenizer


def _require_whole(folder: Path) -> None:
    """Raises ValueError naming the first file that is not JSON, not text, or no tokenizer."""
    for name in (*FILES, *SETTINGS_FILES, *TEMPLATE_FILES):
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)
    for path in sorted(folder.glob("*.jinja")):
        with _naming(str(path), UnicodeDecodeError):
            path.read_text(encoding="utf-8")
    if (file := folder / "tokenizer.json").is_file():
        with _naming(str(file), Exception):
            Tokenizer.from_file(str(file))


class _naming(AbstractContextManager):
    """Inside, errors of exactly these classes become ValueErrors that begin with `what`."""

    def __init__(self, what: str, *classes: type[Exception]):
        self.what, self.classes = what, classes

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        # By class and not by `except`: tokenizers raises Exception itself, and no subclass.
        if kind in self.classes:
            raise ValueError(
                f"{self.what} can't be read: {kind.__name__}: {error}; expected what a fast "
                "tokenizer's save_pretrained writes"
            ) from error


def require_jinja(jinja: str, what: str) -> None:
    """Raises ValueError naming `what`, the line and Jinja's reason where the text can't be parsed.

    It is compiled as transformers compiles it, `generation` tags included.
    """
    try:
        chat_template_utils._compile_jinja_template(jinja)
    except chat_template_utils.jinja2.TemplateSyntaxError as error:
        reason = (error.message or "no reason given").split("\n")[0]
        raise ValueError(
            f"{what} is not valid Jinja: line {error.lineno}: {reason}; expected a Jinja template"
        ) from error


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise TypeError(
            f"{type(tokenizer).__name__} gives no character offsets; "
            "expected a tokenizer that `tokenizers` runs (a folder with tokenizer.json)"
        )


def _processor_template(folder: Path) -> str | None:
    paths = [folder / name for name in TEMPLATE_FILES]
    found = [read_json(path) for path in paths if path.is_file()]
    return next((f["chat_template"] for f in found if f.get("chat_template")), None)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    **template: Any,
) -> str:
    """The text that the tokenizer's own chat template makes of messages; `template` reaches it.

    Raises ValueError without a template, and jinja2's TemplateError where the template refuses.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; give it one with "
            "get_chat_template(tokenizer, 'chatml') or (jinja_text, stop_word)"
        )
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template
    )


def ids(
    tokenizer: PreTrainedTokenizerBase,
    what: str | Messages,
    *,
    add_generation_prompt: bool = False,
    **template: Any,
) -> list[int]:
    """Token ids of messages, or of text with the tokenizer's own BOS and never a second one.

    Equal to apply_chat_template(tokenize=True), and the same for the text that it renders.
    """
    if isinstance(what, str):
        return encode(tokenizer, what).ids
    text = render(tokenizer, what, add_generation_prompt=add_generation_prompt, **template)
    return encode(tokenizer, text, special=False).ids


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> Text:
    """Ids and where each ends; `special` adds what the tokenizer adds, a second BOS excepted."""
    _require_offsets(tokenizer)
    bos = tokenizer.bos_token
    with _settings_kept(tokenizer):
        got = tokenizer(
            text,
            # Text that a template has rendered holds its BOS already.
            add_special_tokens=special and not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
    # Where a token begins is no use: byte-level tokenizers leave its leading space out.
    return Text(got["input_ids"], [end for _, end in got["offset_mapping"]])


@contextmanager
def _settings_kept(tokenizer: PreTrainedTokenizerBase):
    # transformers clears the file's truncation and padding on each call, in its serialisation too.
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation:
            backend.enable_truncation(**truncation)
        if padding:
            backend.enable_padding(**padding)


def conversation_row(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, first: int = 0, **template: Any
) -> tuple[list[int], list[int]]:
    """Ids of the whole conversation, and 1 for what the assistant says from message `first` on.

    An answer is what rendering it adds to the generation prompt, through its end-of-turn token.
    Raises ValueError where a template rewrites a turn so that its span can't be proved, or where
    an answer has no token.
    """
    full = render(tokenizer, messages, **template)
    tokens, ends = encode(tokenizer, full, special=False)
    turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    answers = [_answer(tokenizer, messages, turn, full, template) for turn in turns]
    for turn, (start, end) in zip(turns, answers, strict=True):
        if not any(start < place <= end for place in ends):
            raise ValueError(
                f"message {turn}: no token to learn: the answer is empty and the chat template "
                "ends it with nothing"
            )
    # A token belongs to the answer in which it ends: with the last header's space it is a word.
    return tokens, [int(any(a < end <= z for a, z in answers)) for end in ends]


def _answer(tokenizer, messages, turn, full, template) -> tuple[int, int]:
    """Characters [start, end) of one answer in the rendered conversation."""
    before = _opened(tokenizer, messages, turn, template)
    after = render(tokenizer, messages[: turn + 1], **template)
    specials = special_texts(tokenizer)
    if full.startswith(after) and after.startswith(before):
        kept = after.rstrip()
        return len(before), len(kept) if kept.endswith(specials) else len(after)
    edge = lambda place: _edge(tokenizer, messages, turn, full, template, place)
    start = len(before) if full.startswith(before) else edge(lambda text: MARK + text.lstrip())
    content_end = edge(lambda text: text.rstrip() + MARK)
    # An earlier turn may be rendered otherwise than as the last one, but it ends as that one does.
    said = after[len(commonprefix([before, after])) :]
    stops = [s for s in specials if s in said and full.find(s, content_end) >= 0]
    if not stops:
        raise ValueError(_rewritten(turn, "no end-of-turn token follows its text"))
    return start, min(full.find(s, content_end) + len(s) for s in stops)


def _opened(tokenizer, messages, turn, template) -> str:
    """The conversation up to where an answer begins: with the generation prompt, or, where the
    template ignores that, with the header that two different answers share.
    """
    asked = messages[:turn]
    opened = render(tokenizer, asked, add_generation_prompt=True, **template)
    if opened != render(tokenizer, asked, **template):
        return opened
    said = render(tokenizer, messages[: turn + 1], **template)
    probe = render(tokenizer, [*asked, {"role": "assistant", "content": MARK}], **template)
    shared = commonprefix([said, probe])
    if MARK not in probe:
        raise ValueError(
            f"message {turn}: the chat template ignores add_generation_prompt, and where it begins "
            "an answer can't be told; give it {% if add_generation_prompt %} with that header"
        )
    # Space alone is no header: the model has to say it.
    blank = shared.startswith(opened) and not shared[len(opened) :].strip()
    return opened if blank else shared


def _edge(tokenizer, messages, turn, full, template, place) -> int:
    """Where one side of a message's text lies in `full`, found by marking that side."""
    content = messages[turn].get("content")
    if not isinstance(content, str):
        raise ValueError(_rewritten(turn, f"its content is {type(content).__name__}, not text"))
    marked = [*messages]
    marked[turn] = {**messages[turn], "content": place(content)}
    text = render(tokenizer, marked, **template)
    at = text.find(MARK)
    if at < 0 or text[:at] != full[:at]:
        raise ValueError(_rewritten(turn, "its text doesn't stand in the rendered conversation"))
    return at


def _rewritten(turn: int, why: str) -> str:
    return (
        f"message {turn}: the chat template renders this answer otherwise once more messages "
        f"follow, and {why}; give one row for each answer, ending with it"
    )


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens marked special, as text, in a fixed order."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple(sorted({*tokenizer.all_special_tokens, *(t.content for t in added if t.special)}))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token with which the chat template ends an answer, if it has one."""
    if tokenizer.chat_template is None:
        return None
    probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    tokens, mask = conversation_row(tokenizer, probe)
    last = [token for token, on in zip(tokens, mask, strict=True) if on][-1]
    is_special = tokenizer.convert_ids_to_tokens(last) in special_texts(tokenizer)
    return last if is_special else None


def end_in_pieces(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text with which the chat template ends an answer, where no token of its own ends it.

    None where it writes space alone. Raises ValueError without a template, and jinja2's
    TemplateError where it refuses a question and an answer.
    """
    probe = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": MARK}]
    end = render(tokenizer, probe).rpartition(MARK)[2].strip()
    own = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    return None if not end or end.endswith(own) else end


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any] | None = None
) -> list[int]:
    """Every id that ends an answer: generation_config.json's, the tokenizer's, the template's.

    Raises ValueError where the first names what is no id.
    """
    eos = (generation_config or {}).get("eos_token_id")
    named = eos if isinstance(eos, list | tuple) else [eos]
    if not all(x is None or type(x) is int and 0 <= x < 2**31 for x in named):
        raise ValueError(
            f"eos_token_id of generation_config.json or config.json: expected a token id or a "
            f"list of them, got {eos!r}"
        )
    found = {*named, tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}
    return sorted(found)


def state(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides what the tokenizer does; it changes when anything alters that."""
    parts = {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "template": tokenizer.chat_template,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "max_length": tokenizer.model_max_length,
        "class": type(tokenizer).__name__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
