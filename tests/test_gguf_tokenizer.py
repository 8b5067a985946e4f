"""Tokenizers built from GGUF metadata: ids and templates equal to llama.cpp's."""

import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from bridge import gguf_header, gguf_tokenizer, hub
from tests import llama_server, tiny_gguf

PIECES = json.loads((Path(__file__).parent / "data" / "gguf_source_pieces.json").read_text())
UNMERGED = "QzJ"  # a token no merges lead to
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
def vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and types of a BPE whose merges cross words, spaces and digits.

    So that every split shows in the ids; the last tokens are control and user-defined ones.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    plain = [text for text in texts(400) if "<" not in text and UNMERGED not in text]
    bpe.train_from_iterator(plain, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [UNMERGED]
    types = [1] * len(tokens) + [3, 3, 3, 4, 5]
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", f"[PAD{len(tokens) + 4}]"]
    return tokens + added, [" ".join(pair) for pair in model["merges"]], types


def tiny(folder: Path, pre: str, **more) -> Path:
    """A GGUF that llama.cpp loads, with the vocabulary above."""
    tokens, merges, types = vocabulary()
    embedding = np.zeros((len(tokens), tiny_gguf.WIDTH), np.float32)
    ids = {f"{name}_token_id": tokens.index("<|im_end|>") for name in ("eos", "padding")}
    ids |= {"bos_token_id": tokens.index("<|im_start|>")}
    return tiny_gguf.write(
        folder / "m.gguf",
        tiny_gguf.weights(tied=True) | {"token_embd.weight": embedding},
        tiny_gguf.hyperparameters()
        | tiny_gguf.tokenizer_metadata(tokens, merges, pre, types, **(ids | more)),
    )


@pytest.fixture(scope="module")
def smollm2():
    return hub.embedded_smollm2()


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    return gguf_tokenizer.save_folder(smollm2, tmp_path_factory.mktemp("saved") / "tokenizer")


@pytest.fixture(scope="module")
def made_and_saved(smollm2, folder):
    return gguf_tokenizer.tokenizer(smollm2), AutoTokenizer.from_pretrained(folder)


def test_ids_of_the_real_file_equal_llama_cpps_and_the_saved_folders(smollm2, made_and_saved):
    made, saved = made_and_saved
    server = llama_server.serve(smollm2)
    for text in texts(200):
        ids = made(text)["input_ids"]
        assert ids == llama_server.token_ids(server, text, add_special=True), repr(text)
        assert ids == saved(text)["input_ids"], repr(text)
        assert made.decode(ids) == text
    for conversation in (TALK, TALK[1:], TALK[1:2]):
        ask = dict(tokenize=False, add_generation_prompt=True)
        prompt = made.apply_chat_template(conversation, **ask)
        assert prompt == llama_server.rendered(server, conversation)
        assert prompt == saved.apply_chat_template(conversation, **ask)


def test_names_of_the_real_file_survive_saving(smollm2, folder, made_and_saved):
    for tok in made_and_saved:
        assert (tok.bos_token, tok.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert (tok.pad_token, tok.unk_token) == ("<|im_end|>", "<|endoftext|>")
        assert len(tok) == 49152 and len(tok.all_special_tokens) == 17
        assert tok.model_max_length == 8192 and not tok.clean_up_tokenization_spaces
    assert (folder / "chat_template.jinja").read_text() == made_and_saved[0].chat_template
    assert str(smollm2) not in (folder / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("pre", PRES)
def test_each_pre_tokenizer_gives_llama_cpps_ids(tmp_path, pre):
    path = tiny(tmp_path, pre)
    made, server = gguf_tokenizer.tokenizer(path), llama_server.serve(path)
    # A control token cuts the text before any splitting, so one request serves all texts.
    text = "<|endoftext|>".join(texts(60))
    assert made(text)["input_ids"] == llama_server.token_ids(server, text, add_special=True)


def test_the_texts_tell_all_splittings_apart(tmp_path):
    found = set()
    for pre in PRES:
        made = gguf_tokenizer.tokenizer(tiny(tmp_path, pre, add_bos_token=False))
        found.add(tuple(made("<|endoftext|>".join(texts(60)))["input_ids"]))
    assert len(found) == len(set(gguf_tokenizer.SPLITTINGS.values())) == 9


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, bos, eos):
    path = tiny(tmp_path, "qwen2", add_bos_token=bos, add_eos_token=eos)
    made, server = gguf_tokenizer.tokenizer(path), llama_server.serve(path)
    saved = AutoTokenizer.from_pretrained(gguf_tokenizer.save_folder(path, tmp_path / "t"))
    ids = made("Hello world")["input_ids"]
    assert ids == llama_server.token_ids(server, "Hello world", add_special=True)
    assert ids == saved("Hello world")["input_ids"]
    assert (ids[0] == made.bos_token_id, ids[-1] == made.eos_token_id) == (bos, eos)


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path):
    made = gguf_tokenizer.tokenizer(tiny(tmp_path, "smollm"))
    ids = made("<|im_start|>a<tool>b")["input_ids"]
    assert made.convert_ids_to_tokens(ids) == ["<|im_start|>", "a", "<tool>", "b"]
    assert made.decode(ids, skip_special_tokens=True) == "a<tool>b"
    assert not made.added_tokens_decoder[ids[2]].normalized
    assert not [token for token in made.get_vocab() if token.startswith("[PAD")]


def test_several_templates_are_kept(tmp_path):
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    file = gguf_header.GGUF(tmp_path, metadata, {})
    found = gguf_tokenizer._templates(file)
    assert found == {"chat_template": {"default": "plain", "tool_use": "tools"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pre": "klingon"}, r"pre is 'klingon'; known: \['a.x-4.0', .*'smollm', "),
        ({"model": "llama"}, "model is 'llama'; only 'gpt2' .* from its Hugging Face folder"),
        ({"tokens": ["a", "a", "b"]}, r"3 tokens \(2 different\)"),
        ({"token_type": [1, 1]}, "2 types"),
        ({"merges": ["ab"]}, "merge 'ab' has no two halves"),
        ({"merges": ["x y"]}, "merges that the vocabulary does not hold"),
        ({"eos_token_id": 99}, "ids beyond the vocabulary of 3: {'eos_token': 99}"),
        ({"add_bos_token": True}, r"\['bos_token'\], but the file names none"),
    ],
)
def test_a_vocabulary_that_cannot_be_honoured_is_refused(tmp_path, change, message):
    keys = tiny_gguf.tokenizer_metadata(["a", "b", "ab"], ["a b"], "gpt-2")
    keys |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    path = tiny_gguf.write(tmp_path / "m.gguf", {}, keys)
    with pytest.raises(ValueError, match=message) as raised:
        gguf_tokenizer.tokenizer(path)
    assert str(path) in str(raised.value)
