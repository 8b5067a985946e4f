"""A GGUF file's byte-level BPE tokenizer and chat template as a transformers tokenizer.

Splitting rules after llama.cpp's src/llama-vocab.cpp, so that ids equal llama.cpp's.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from bridge import gguf_header
from bridge.gguf_header import GGUF

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

WORDS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SHORT_FORMS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# llama.cpp has no classes for upper and lower case; these are its stand-ins.
UPPER, LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _by_case(behind: str, digits: str) -> str:
    """Words whose capitals come first, with what may follow each; so many digits; the rest."""
    words = (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")
    parts = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}{behind}" for word in words]
    return "|".join([*parts, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", SPACES])


WORDS_TEKKEN = _by_case("", r"\p{N}")
WORDS_GPT_4O = _by_case(rf"(?:{SHORT_FORMS})?", r"\p{N}{1,3}")
WORDS_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


class Splitting(NamedTuple):
    """How text is cut before the merges: patterns in turn, each isolating its matches."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token needs no merges
    add_bos: bool = False  # unless the file says otherwise


DEFAULT = Splitting((r"[\p{P}\$\+<=>\^~\|]+", WORDS_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
GPT2 = Splitting((WORDS_GPT2,))
SMOLLM = Splitting((r"\p{N}", WORDS_GPT2))
LLAMA3_PATTERNS = (rf"(?:{SHORT_FORMS})|{LETTERS}|\p{{N}}{{1,3}}|{SIGNS}|{SPACES}",)
LLAMA3 = Splitting(LLAMA3_PATTERNS, whole_words=True, add_bos=True)
LLAMA3_BARE = Splitting(LLAMA3_PATTERNS)
QWEN2 = Splitting((rf"(?:{SHORT_FORMS})|{LETTERS}|\p{{N}}|{SIGNS}|{SPACES}",))
TEKKEN = Splitting((WORDS_TEKKEN,), whole_words=True, add_bos=True)
GPT_4O = Splitting((WORDS_GPT_4O,))
DEEPSEEK = Splitting((r"\p{N}{1,3}", CJK, WORDS_DEEPSEEK))

# tokenizer.ggml.pre -> its rule
SPLITTINGS = {
    "default": DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), GPT2),
    **dict.fromkeys(("a.x-4.0", "gigachat", "mellum", "granite-docling"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), SMOLLM),
    **dict.fromkeys(("exaone", "minerva-7b"), SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"), LLAMA3),
    **dict.fromkeys(("pixtral", "midm-2.0", "lfm2"), LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), LLAMA3_BARE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan"), QWEN2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT_4O),
    "deepseek-v3": DEEPSEEK,
}
SPECIAL_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "mask_token": "mask",
}


def tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer inside the GGUF file at `path`; its ids are llama.cpp's.

    Raises ValueError for a vocabulary that is not byte-level BPE or an unknown pre-tokenizer.
    """
    file = gguf_header.read(path)
    splitting = _splitting(file)
    tokens, types = _vocabulary(file)
    bpe = _bpe(file, tokens, types, splitting)
    names = {name: tokens[i] for name, i in _special_ids(file, len(tokens)).items()}
    bpe.post_processor = _ends(file, splitting, names, tokens)
    specials = [t for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    context = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **names,
        additional_special_tokens=[t for t in specials if t not in names.values()],
        clean_up_tokenization_spaces=False,
        **({} if context is None else {"model_max_length": context}),
        **_templates(file),
    )


def save_folder(path: str | Path, folder: str | Path) -> Path:
    """Write the tokenizer of the GGUF at `path` as Hugging Face files into `folder`.

    AutoTokenizer.from_pretrained(folder) gives the same ids and the same template.
    """
    made, folder = tokenizer(path), Path(folder)
    made.save_pretrained(folder)
    described = folder / "tokenizer_config.json"
    settings = json.loads(described.read_text())
    # transformers 4 knows neither the class name nor the list that transformers 5 writes.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    settings.pop("backend", None)
    described.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return folder


def _splitting(file: GGUF) -> Splitting:
    model = file.metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(
            f"{file.path}: tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) is "
            "read from GGUF, so take this model's tokenizer from its Hugging Face folder"
        )
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre not in SPLITTINGS:
        raise ValueError(f"{file.path}: tokenizer.ggml.pre is {pre!r}; known: {sorted(SPLITTINGS)}")
    return SPLITTINGS[pre]


def _vocabulary(file: GGUF) -> tuple[list[str], list[int]]:
    """Tokens and their types by id. Raises ValueError where a list is missing or too short."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    merges = file.metadata.get("tokenizer.ggml.merges")
    if tokens is None or merges is None:
        raise ValueError(f"{file.path}: no tokenizer.ggml.tokens or no tokenizer.ggml.merges")
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{file.path}: {len(tokens)} tokens ({len(set(tokens))} different), {len(types)} types"
        )
    return tokens, types


def _bpe(file: GGUF, tokens: list[str], types: list[int], splitting: Splitting) -> Tokenizer:
    """The bare BPE with its added tokens; the converter's padding tokens are left out."""
    kinds = list(zip(tokens, types, strict=True))
    vocabulary = {t: i for i, (t, kind) in enumerate(kinds) if kind != UNUSED}
    merges = _merges(file, vocabulary)
    bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    isolate = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*map(isolate, splitting.patterns), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    added = lambda t, special: AddedToken(t, special=special, normalized=False)
    bpe.add_special_tokens([added(t, True) for t, kind in kinds if kind in (UNKNOWN, CONTROL)])
    bpe.add_tokens([added(t, False) for t, kind in kinds if kind == USER_DEFINED])
    return bpe


def _merges(file: GGUF, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges as pairs. Raises ValueError for one without two halves or beyond the tokens."""
    lines = file.metadata["tokenizer.ggml.merges"]
    pairs = [tuple(line.split(" ")) for line in lines]
    for line, pair in zip(lines, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{file.path}: merge {line!r} has no two halves")
    beyond = [pair for pair in pairs if not {*pair, "".join(pair)} <= vocabulary.keys()]
    if beyond:
        raise ValueError(
            f"{file.path}: {len(beyond)} merges that the vocabulary does not hold: {beyond[:3]}"
        )
    return pairs


def _special_ids(file: GGUF, count: int) -> dict[str, int]:
    """Token ids by transformers' name. Raises ValueError for an id beyond the vocabulary."""
    found = {
        name: file.metadata[f"tokenizer.ggml.{short}_token_id"]
        for name, short in SPECIAL_NAMES.items()
        if f"tokenizer.ggml.{short}_token_id" in file.metadata
    }
    beyond = {name: i for name, i in found.items() if i >= count}
    if beyond:
        raise ValueError(f"{file.path}: ids beyond the vocabulary of {count}: {beyond}")
    return found


def _ends(
    file: GGUF, splitting: Splitting, names: dict[str, str], tokens: list[str]
) -> processors.PostProcessor:
    """Adds bos and eos to a text where the file, or else its splitting, says so."""
    wanted = {
        "bos_token": file.metadata.get("tokenizer.ggml.add_bos_token", splitting.add_bos),
        "eos_token": file.metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    missing = [name for name, wants in wanted.items() if wants and name not in names]
    if missing:
        raise ValueError(f"{file.path}: texts get a {missing}, but the file names none")
    bos, eos = ([names[name]] if wants else [] for name, wants in wanted.items())
    if not bos and not eos:
        return processors.ByteLevel(trim_offsets=False)
    one = lambda part: [*bos, f"${part}", *eos]
    return processors.TemplateProcessing(
        single=one("A"),
        pair=one("A") + [f"{piece}:1" for piece in one("B")],
        special_tokens=[(t, tokens.index(t)) for t in dict.fromkeys(bos + eos)],
    )


def _templates(file: GGUF) -> dict[str, Any]:
    """The chat template, or a dict of them where the file has several."""
    key = "tokenizer.chat_template"
    named = {
        name.removeprefix(key + "."): template
        for name, template in file.metadata.items()
        if name.startswith(key + ".")
    }
    plain = file.metadata.get(key)
    if named:
        return {"chat_template": named | ({} if plain is None else {"default": plain})}
    return {} if plain is None else {"chat_template": plain}
