"""Tokenizers built from GGUF metadata: ids and templates equal to llama.cpp's."""

import functools
import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from bridge import gguf_tokenizer, hub
from tests import llama_server, tiny_gguf

# fmt: off
PIECES = [
    "Hello", " world", "the quick brown fox", "don't", "I'LL", "We'Ve", "o'clock", "'", "''s",
    " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", " \n ", "\u00a0", "\u2009", "\u3000", "\u2028", "\x0b",
    "0", "7", "42", "123", "1234", "1234567", "3.14", "1,000,000", "2  3", "٣٤٥", "१२३", "²", "½", "Ⅷ", "𝟘𝟙", "①",
    "naïve café", "Straße", "ÀÉÎ", "İstanbul", "ſ's", "ǅ", "Привет мир", "Ελληνικά", "日本語のテキスト", "中文，标点。", "한국어",
    "العربية", "עברית", "हिन्दी", "ไทย", "e\u0301", "\u200b", "\u200d", "\ufeff", "\u202e", "\ufffd",
    "🙂", "👩‍👩‍👧", "🇫🇷", "👍🏽", "∑∫√", "→", "€", "£", "™", "…", "—", "«»", "“”", "~", "`", "^", "|", "\\", "/", "//", "$x$",
    "def f(x):\n    return x**2\n", "if (a&&b) {", "};", "<div class=\"x\">", "</div>", "x+=1;", "a_b_c", "camelCaseWord", "HTTPServer",
    "https://example.com/a?b=c&d=%20", "a@b.org", "#!/bin/sh", "/* note */", "!!!", "???", "...", "----", "___", "***", "()", "[[]]",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\n", "<|im_end", "<repo_name>", "<tool>", " <tool> ",
]  # fmt: on
PRES = sorted(gguf_tokenizer.SPLITTINGS)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is  2+2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "日本 🙂"},
]


def texts(count: int) -> list[str]:
    """The pieces themselves, then random joins of them."""
    rng = random.Random(0)
    joined = ["".join(rng.choices(PIECES, k=rng.randint(2, 9))) for _ in range(count)]
    return ["", *PIECES, *joined]


@functools.cache
def vocabulary() -> tuple[list[str], list[str]]:
    """A BPE whose merges cross words, spaces and digits, so that every split shows in the ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts(400), trainer)
    bpe.save(str(path := __import__("tempfile").mkdtemp() + "/t.json"))
    return [], []
