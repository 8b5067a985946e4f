"""A Hugging Face tokenizer folder -> the tokenizer keys of a GGUF file.

Keys and values are those of llama.cpp's converter, without running the tokenizer or torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
from gguf import TokenType
from tokenizers import models

from bridge import gguf_sentencepiece
from bridge.gguf_architectures import ARCHITECTURES
from bridge.gguf_sentencepiece import SPACE, normalizers
from bridge.gguf_tokenizer import SPLITTINGS

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(behind: str, digits: str) -> str:
    """Words whose capitals come first, with what may follow each; so many digits; the rest."""
    words = (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    parts = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}{behind}" for word in words]
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return "|".join([*parts, digits, rest])


_TEKKEN = _by_case("", r"\p{N}")
_GPT_4O = _by_case("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}")


class PreTokenizer(NamedTuple):
    """What llama.cpp does under a name: how it splits text, and two defaults of its own."""

    steps: tuple[str, ...]  # as `_steps` spells tokenizer.json's pre_tokenizer
    ignores_merges: bool = False  # a word of the vocabulary is taken whole
    adds_bos: bool = False


# By `tokenizer.ggml.pre` (llama.cpp, src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(("bytes of words",)),
    "smollm": PreTokenizer(("digits", "bytes of words")),
    "qwen2": PreTokenizer((_WORDS + _REST, "bytes")),
    "llama-bpe": PreTokenizer((_WORDS + "{1,3}" + _REST, "bytes"), True, True),
    "dbrx": PreTokenizer((_WORDS + "{1,3}" + _REST, "bytes")),
    "tekken": PreTokenizer((_TEKKEN, "bytes"), True, True),
    "gpt-4o": PreTokenizer((_GPT_4O, "bytes")),
    "deepseek-v3": PreTokenizer((*SPLITTINGS["deepseek-v3"].patterns, "bytes")),
}
GRANITE_VOCABULARY = 49152  # the converter turns the first token off for llama models of this size
# What the converter calls the same splitting in models of some architectures.
OTHER_NAMES = {
    "granite": {"smollm": "refact"},
    "starcoder2": {"smollm": "starcoder"},
    "command-r": {"smollm": "command-r"},
    "cohere2": {"smollm": "command-r"},
    "exaone4": {"gpt-2": "exaone4"},
    "glm4": {"dbrx": "glm4"},
    "glm4moe": {"dbrx": "glm4"},
    "llama4": {"gpt-4o": "llama4"},
}
END = "<|endoftext|>"
# Architectures whose SentencePiece vocabularies are read, and what is particular to some.
BY_PIECES = ("gemma", "gemma2", "gemma3", "phi3", "llama")
WITHOUT_SPACE = ("gemma", "gemma2", "gemma3")
ADDED_OF_BOTH = ("phi3",)
# Special tokens that are these where the folder names none.
BY_TEXT = {
    "glm4": {"eos": END, "eot": "<|user|>", "unk": END, "bos": END},
    "glm4moe": {"bos": "[gMASK]", "eot": "<|user|>", "unk": END, "eom": "<|observation|>"},
}
END_OF_TURN = {"gemma": {"eot": 107}}  # fixed ids, whatever the vocabulary
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
METASPACE = (
    "llama.cpp puts a space before a text that begins with one and behind special tokens, where "
    "the tokenizer may put none: such texts get other ids"
)
SENTENCEPIECE = "default"  # the name that the converter gives its splitting


class Tokens(NamedTuple):
    """A vocabulary as GGUF has it: one text and one type for each row of the embedding."""

    texts: list[str]
    types: list[TokenType]
    pre: str
    special: gguf.SpecialVocab  # merges, ids of special tokens, chat template
    add_prefix_space: bool | None
    notes: list[str]
    scores: list[float] | None = None  # of SentencePiece's pieces

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp begins a text with bos where no key says otherwise."""
        known = PRE_TOKENIZERS.get(self.pre)
        return self.scores is not None or (known is not None and known.adds_bos)


def read(folder: str | Path, config: Mapping[str, Any], arch: str = "llama") -> Tokens:
    """The tokenizer in `folder`, padded to the embedding's rows; ids it lacks are the config's.

    Raises ValueError for a tokenizer that GGUF or the converter's `arch` has no form for, and for
    more tokens than rows.
    """
    folder, rows = Path(folder), config["vocab_size"]
    found = (_pieces if _has_pieces(folder, arch) else _byte_level)(folder, rows, arch)
    special = found.special
    special.chat_template = _template(folder, special.chat_template)
    for kind in SPECIAL:
        if isinstance(config.get(f"{kind}_token_id"), int):
            special.special_token_ids.setdefault(kind, config[f"{kind}_token_id"])
    outside = {k: i for k, i in special.special_token_ids.items() if i >= rows}
    if outside:
        raise ValueError(f"special tokens outside the embedding's {rows} rows: {outside}")
    for kind, text in BY_TEXT.get(arch, {}).items():
        if text in found.texts:
            special.special_token_ids.setdefault(kind, found.texts.index(text))
    return found


def _has_pieces(folder: Path, arch: str) -> bool:
    model = _json(folder / "tokenizer.json").get("model", {})
    stored = not model and (folder / gguf_sentencepiece.MODEL).is_file()
    return arch in BY_PIECES and bool(stored or model.get("byte_fallback"))


def _byte_level(folder: Path, rows: int, arch: str) -> Tokens:
    spec = _tokenizer_json(folder)
    settings = _json(folder / "tokenizer_config.json")
    pre = pre_tokenizer(spec)
    pre = OTHER_NAMES.get(arch, {}).get(pre, pre)
    texts, types = _vocabulary(spec, settings, rows)
    special = gguf.SpecialVocab(folder, load_merges=True)
    space = settings.get("add_prefix_space") if ARCHITECTURES[arch].converter_llama else None
    return Tokens(texts, types, pre, special, space, _notes(spec))


def _pieces(folder: Path, rows: int, arch: str) -> Tokens:
    """The pieces with the tokens that the folder's other files add."""
    spec, settings = (_json(folder / f"{n}.json") for n in ("tokenizer", "tokenizer_config"))
    added = {int(i): t for i, t in settings.get("added_tokens_decoder", {}).items()}
    if arch in ADDED_OF_BOTH or not added:
        added |= {t["id"]: t for t in spec.get("added_tokens", [])}
    looks = lambda t: arch not in ADDED_OF_BOTH and _looks_special(t["content"])
    stored = (folder / gguf_sentencepiece.MODEL).is_file()
    pieces = gguf_sentencepiece.read(folder) if stored else gguf_sentencepiece.from_json(spec)
    unknown = sorted({*normalizers(spec)} - gguf_sentencepiece.NORMALIZERS)
    if unknown or pieces.normalizes:
        raise ValueError(
            f"{folder}: llama.cpp cuts texts into SentencePiece's pieces as they are, the "
            f"tokenizer changes them first: {unknown or 'by rules in ' + gguf_sentencepiece.MODEL}"
        )
    texts, scores, types = gguf_sentencepiece.vocabulary(
        pieces, added, rows, lambda t: bool(t.get("special") or looks(t))
    )
    special = gguf.SpecialVocab(folder, n_vocab=rows)
    notes, space = _notes(spec), None
    if arch in WITHOUT_SPACE or not pieces.adds_space:
        space = False
    if ARCHITECTURES[arch].converter_llama:
        adds = gguf_sentencepiece.adds_space(spec) if spec else pieces.adds_space
        space = _space_of_llama(folder, settings, adds)
        notes += [METASPACE] if gguf_sentencepiece.prepends(spec) else []
    return Tokens(texts, types, SENTENCEPIECE, special, space, notes, scores)


def _space_of_llama(folder: Path, settings: dict[str, Any], adds: bool) -> bool | None:
    """What the converter writes: the settings' word, None where llama.cpp's default is right."""
    stated = settings.get("add_prefix_space")
    if stated not in (None, adds):
        raise ValueError(
            f"{folder}: tokenizer_config.json has add_prefix_space={stated}, the tokenizer does "
            f"as with {adds}: expected the same"
        )
    return stated if adds else False


def write(out: gguf.GGUFWriter, tokens: Tokens) -> None:
    """Adds the tokenizer's keys to `out`, in the converter's order."""
    space = tokens.add_prefix_space
    first = tokens.scores is None or ARCHITECTURES[out.arch].converter_llama
    if space is not None and first:
        out.add_add_space_prefix(space)
    out.add_tokenizer_model("gpt2" if tokens.scores is None else "llama")
    out.add_tokenizer_pre(tokens.pre)
    out.add_token_list(tokens.texts)
    if tokens.scores is not None:
        out.add_token_scores(tokens.scores)
    out.add_token_types(tokens.types)
    tokens.special.add_to_gguf(out, quiet=True)
    granite = ARCHITECTURES[out.arch].converter_llama and len(tokens.texts) == GRANITE_VOCABULARY
    # llama.cpp's own default must not add a token that this tokenizer doesn't.
    if (granite or tokens.adds_bos) and "bos" not in tokens.special.add_special_token:
        out.add_add_bos_token(False)
    for name, i in END_OF_TURN.get(out.arch, {}).items():
        getattr(out, f"add_{name}_token_id")(i)
    if space is not None and not first:
        out.add_add_space_prefix(space)


def pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for what tokenizer.json does before BPE; ValueError where it has none."""
    steps = _steps(spec.get("pre_tokenizer"))
    ignores = bool(spec["model"].get("ignore_merges"))
    alike = {
        known.ignores_merges: name
        for name, known in PRE_TOKENIZERS.items()
        if steps in (known.steps, (*SPLITTINGS[name].patterns, "bytes"))
    }
    if ignores and ignores not in alike and alike:
        # It makes no difference where merges make every word that is a token.
        ignores = not _merged(spec["model"], spec.get("added_tokens", []))
    if ignores in alike:
        return alike[ignores]
    known = "; ".join(f"{n}: {k.steps} {k.ignores_merges}" for n, k in PRE_TOKENIZERS.items())
    raise ValueError(
        f"llama.cpp has no name for this pre-tokenizer: {spec.get('pre_tokenizer')} with "
        f"ignore_merges={ignores}; known (name: steps, ignore_merges): {known}"
    )


def _steps(spec: dict[str, Any] | None) -> tuple[str, ...]:
    """A pre_tokenizer in few words; what has no word here is spelled out and matches nothing."""
    spec = spec or {}
    kind = spec.get("type")
    if kind == "Sequence":
        return tuple(step for part in spec["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not spec.get("add_prefix_space", True):
        return ("bytes of words" if spec.get("use_regex", True) else "bytes",)
    if kind == "Digits" and spec.get("individual_digits"):
        return ("digits",)
    # Parts that don't match are left out, where none are left isolated ones are the same.
    ways = ("Isolated", False), ("Removed", True)
    cut = (spec.get("behavior"), bool(spec.get("invert"))) in ways
    if kind == "Split" and cut and "Regex" in spec["pattern"]:
        return (spec["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n"),)
    return (json.dumps(spec),)


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    """tokenizer.json, once it is known to be byte-level BPE without parts that GGUF lacks."""
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file():
            raise ValueError(_sentencepiece(folder))
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    spec = _json(folder / "tokenizer.json")
    model = spec["model"]
    if model.get("byte_fallback") or model["type"] == "Unigram":
        raise ValueError(_sentencepiece(folder))
    if model["type"] != "BPE":
        raise ValueError(
            f"{folder}: tokenizer model {model['type']!r} has no GGUF form; known: BPE"
        )
    extras = {k: model[k] for k in AFFIXES if model.get(k)}
    if extras:
        raise ValueError(f"{folder}: llama.cpp's BPE has no {extras}")
    if normalizers(spec) not in ([], ["NFC"]):
        raise ValueError(f"{folder}: normalizer {spec['normalizer']} has no GGUF form; known: NFC")
    return spec


def _sentencepiece(folder: Path) -> str:
    return (
        f"{folder} has a SentencePiece tokenizer, which can be written to GGUF for {BY_PIECES} "
        "only; byte-level BPE can for all. The model can be saved as safetensors."
    )


def _vocabulary(
    spec: dict[str, Any], settings: dict[str, Any], rows: int
) -> tuple[list[str], list[TokenType]]:
    """Text and type of every id below `rows`; raises ValueError for ids that don't fit."""
    added = {int(i): t for i, t in settings.get("added_tokens_decoder", {}).items()}
    added |= {t["id"]: t for t in spec.get("added_tokens", [])}
    by_id = {i: text for text, i in spec["model"]["vocab"].items()}
    by_id |= {i: t["content"] for i, t in added.items()}
    if max(by_id) >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {max(by_id)}, the embedding has {rows} rows; the first "
            f"token without a row is {by_id[min(i for i in by_id if i >= rows)]!r}"
        )
    texts, types = [], []
    for i in range(rows):
        text, kind = by_id.get(i, f"[PAD{i}]"), TokenType.NORMAL
        if i not in by_id:
            kind = TokenType.UNUSED
        elif i in added:
            control = added[i].get("special") or _looks_special(text)
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            text = text if control else text.replace(SPACE, " ")
        texts.append(text)
        types.append(kind)
    return texts, types


def _looks_special(text: str) -> bool:
    """Tokens that the converter holds for control tokens, whatever the tokenizer says."""
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    named = text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return named or any(text.startswith(a) and text.endswith(b) for a, b in pairs)


def _template(folder: Path, found: Any) -> Any:
    """The chat template; transformers lets chat_template.jinja win over tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    wins = file.is_file() and not isinstance(found, list)
    return file.read_text(encoding="utf-8") if wins else found


def _notes(spec: dict[str, Any]) -> list[str]:
    notes = []
    if "NFC" in normalizers(spec):
        notes.append("llama.cpp does not apply the tokenizer's NFC: decomposed text gets other ids")
    sticky = [
        t["content"]
        for t in spec.get("added_tokens", [])
        if t.get("lstrip") or t.get("rstrip") or t.get("single_word")
    ]
    if sticky:
        notes.append(f"llama.cpp takes no spaces into tokens as the tokenizer does: {sticky}")
    return notes


def _merged(model: dict[str, Any], added: list[dict[str, Any]]) -> bool:
    """Whether merges make of each whole word that is a token this one token."""
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    merging = models.BPE(model["vocab"], pairs)
    words = model["vocab"].keys() - {t["content"] for t in added}
    return all(len(merging.tokenize(word)) == 1 for word in words)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
