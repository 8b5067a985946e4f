"""The tokenizer keys of GGUF files, against llama.cpp itself (xllamacpp) and transformers."""

import json

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from bridge import gguf_tokenizer, gguf_tokens
from tests import llama_server
from tests.gguf_writing import serving, small, tokenizer_folder, written
from tests.oracles import gguf_answers as made

ROWS = {"vocab_size": 512}
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Größe\n  {{ no }} <tool>"},
        {"role": "user", "content": "one  two"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "東京?"},
    ],
]


PIECES = """hello
 world
It's THEY'RE we'll I'm
for(i=0;i<10;++i){}
x = {"a": [1, 2.5]}
3 33 333 3333 33333
12,345.678
  two  spaces  x
Größe naïve café
Москва не верит
東京都
한국어
สวัสดี
مرحبا
🚀🎉
½ ² Ⅷ
٣٤ ३४
<|im_start|>user
<|im_end|>
<|endoftext|>
<|sep|>
<tool>
<|im_
<tool
a<tool>b
...!!!???
'''```
——
https://a.b/c?d=e#f
snake_case CamelCase
ÀÉÎ ǅ ß
a""".splitlines()
PIECES += [
    "\n",
    "\n\n\n",
    "\r\n",
    "\t\ttabs",
    "   ",
    "def f(a):\n    return a\n",
    "e\u0301",
    "\u00a0",
]
PIECES += ["\u200b", "\U0001f1eb\U0001f1f7", "\U0001f469\u200d\U0001f467", " \n  \n", "\x00\x1f"]


def texts():
    """200 strings: words, code, digits, spaces, Unicode, special tokens, and mixtures of them."""
    draw = np.random.default_rng(0)
    return PIECES + ["".join(draw.choice(PIECES, 4)) for _ in range(200 - len(PIECES))]


SPLITS = {
    "smollm": (
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ),
    "gpt-2": (
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ),
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def respell(pre):
    """tokenizer.json as models of that pre-tokenizer have it, on the tiny vocabulary."""
    known = gguf_tokens.PRE_TOKENIZERS[pre]
    split = lambda step: {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated"}
    splits = [split(step) | {"invert": False} for step in known.steps[:-1]]
    steps = SPLITS.get(pre, (*splits, BYTES))

    def change(spec):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
        spec["model"]["ignore_merges"] = known.ignores_merges
        if known.adds_bos:
            spec["post_processor"] = made.adding("<|im_start|>", 1)

    return change


@pytest.mark.parametrize("pre", gguf_tokens.PRE_TOKENIZERS)
def test_llama_cpps_token_ids_equal_the_tokenizers(pre, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", respell(pre))
    written(tmp_path / "model.gguf", small(), folder=folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    server, strings = serving(tmp_path / "model.gguf"), texts()
    assert len(strings) == 200
    for text in strings:
        ids = llama_server.token_ids(server, text, add_special=True)
        assert ids == tokenizer.encode(text).ids, text


# Phi-4-mini's file; models converted from OpenAI's vocabularies leave out what doesn't match.
OPENAI = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("arch, name", [("phi3", "gpt-4o"), ("llama4", "llama4")])
@pytest.mark.parametrize("behavior, invert", [("Isolated", False), ("Removed", True)])
def test_openais_splitting_has_the_converters_name(tmp_path, arch, name, behavior, invert):
    split = {"type": "Split", "pattern": {"Regex": OPENAI}}
    split |= {"behavior": behavior, "invert": invert}

    def change(spec):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, BYTES]}

    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    assert gguf_tokens.read(folder, {"vocab_size": 49152}, arch).pre == name


def test_a_splitting_that_removes_what_it_matches_has_no_name(tmp_path):
    split = {"type": "Split", "pattern": {"Regex": OPENAI}, "behavior": "Removed", "invert": False}

    def change(spec):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, BYTES]}

    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    with pytest.raises(ValueError, match="no name for this pre-tokenizer"):
        gguf_tokens.read(folder, {"vocab_size": 49152})


def test_no_bos_is_added_that_the_tokenizer_does_not_add(tmp_path):
    def change(spec):
        respell("llama-bpe")(spec)
        spec["post_processor"] = None

    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    written(tmp_path / "model.gguf", small(), folder=folder)
    server = serving(tmp_path / "model.gguf")
    assert llama_server.token_ids(server, "a", add_special=True) == [
        Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("a")
    ]


def test_llama_cpp_renders_the_chat_template_as_transformers_does(tmp_path):
    written(tmp_path / "model.gguf", small())
    server, tokenizer = (
        serving(tmp_path / "model.gguf"),
        AutoTokenizer.from_pretrained(made.TOKENIZER),
    )
    for talk in CONVERSATIONS:
        wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert llama_server.rendered(server, talk) == wanted


def test_a_tokenizer_read_from_gguf_is_written_as_it_was(tmp_path):
    written(tmp_path / "first.gguf", small())
    folder = gguf_tokenizer.save_folder(tmp_path / "first.gguf", tmp_path / "tokenizer")
    written(tmp_path / "second.gguf", small(), folder=folder)
    first, second = (
        {k: v for k, _, v in made.described(tmp_path / f"{n}.gguf")["keys"] if "token" in k}
        for n in ("first", "second")
    )
    assert first.items() <= second.items()


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config", "chat_template.json"])
def test_the_chat_template_is_found_wherever_the_folder_keeps_it(place, tmp_path):
    template = (made.TOKENIZER / "chat_template.jinja").read_text()
    extra = {"chat_template": template} if place == "tokenizer_config" else {}
    folder = tokenizer_folder(tmp_path / "tokenizer", **extra)
    if place != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": template}))
    assert gguf_tokens.read(folder, ROWS).special.chat_template == template


def test_the_template_file_wins_over_the_configs_as_in_transformers(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", chat_template="another")
    used = AutoTokenizer.from_pretrained(folder).chat_template
    assert gguf_tokens.read(folder, ROWS).special.chat_template == used != "another"


def test_tokens_are_typed_and_padded_to_the_embedding():
    tokens = gguf_tokens.read(made.TOKENIZER, ROWS)
    kinds = dict(zip(tokens.texts, tokens.types, strict=True))
    assert len(tokens.texts) == 512 and tokens.texts[482] == "[PAD482]"
    assert kinds["[PAD511]"] == gguf.TokenType.UNUSED
    assert kinds["<|im_end|>"] == kinds["<|sep|>"] == gguf.TokenType.CONTROL
    assert kinds["<tool>"] == gguf.TokenType.USER_DEFINED
    assert kinds["a"] == gguf.TokenType.NORMAL


def test_an_unmarked_special_id_comes_from_the_config(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", eos_token=None)
    ids = gguf_tokens.read(folder, ROWS | {"eos_token_id": 2}).special.special_token_ids
    assert ids["eos"] == 2


def no_word_level(spec):
    spec["model"]["type"] = "WordLevel"


def other_digits(spec):
    spec["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


def whole_words(spec):
    spec["model"]["ignore_merges"] = True
    spec["model"]["merges"] = spec["model"]["merges"][:-5]


def lowercase(spec):
    spec["normalizer"] = {"type": "Lowercase"}


def suffixes(spec):
    spec["model"]["end_of_word_suffix"] = "</w>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_word_level, "WordLevel.*known: BPE"),
        (other_digits, "no name for this pre-tokenizer.*smollm.*llama-bpe"),
        (whole_words, "ignore_merges=True; known"),
        (lowercase, "Lowercase.*known: NFC"),
        (suffixes, "</w>"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(change, message, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "model.gguf", small(), folder=folder)
    assert not list(tmp_path.glob("model*"))


def test_whole_words_that_merges_make_too_are_llama_cpps(tmp_path):
    def change(spec):
        respell("gpt-4o")(spec)
        spec["model"]["ignore_merges"] = True

    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    written(tmp_path / "model.gguf", small(), folder=folder)
    assert gguf_tokens.read(folder, ROWS).pre == "gpt-4o"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    server = serving(tmp_path / "model.gguf")
    for text in PIECES:
        assert llama_server.token_ids(server, text, add_special=True) == tokenizer.encode(text).ids


def test_sentencepiece_is_refused_for_architectures_whose_converter_reads_none(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match="SentencePiece.*saved as safetensors"):
        gguf_tokens.read(tmp_path, ROWS, "qwen2")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "byte_fallback": true}}')
    with pytest.raises(ValueError, match="SentencePiece.*saved as safetensors"):
        gguf_tokens.read(tmp_path, ROWS, "qwen2")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="ids up to 481, the embedding has 400 rows.*without a row"
    ):
        written(tmp_path / "model.gguf", small(vocab_size=400))
