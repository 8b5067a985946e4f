"""workflows.preview: what a person sees of a row before it is trained on."""

import io

import pytest
import tiny_chat
from rich.console import Console
from small_tokenizers import SYSTEM, TALK, byte_level

from bridge.chat_templates import get_chat_template
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.data import Row
from workflows.preview import documents_of, preview
from workflows.rows import rows

GREEN, END = "\x1b[1;32m", "\x1b[0m"


@pytest.fixture(scope="module")
def chatml():
    return get_chat_template(byte_level(), "chatml")


def one(tokenizer, messages, **options) -> Row:
    return rows([{"messages": messages}], tokenizer, max_length=None, **options)[0]


def printed(row, tokenizer, terminal: bool) -> str:
    out = io.StringIO()
    preview(row, tokenizer, Console(file=out, force_terminal=terminal, width=30))
    return out.getvalue()


def test_supervised_text_stands_in_marks_where_there_is_no_terminal(chatml):
    row = one(chatml, [SYSTEM, *TALK], assistant_only_loss=True)
    assert printed(row, chatml, terminal=False) == (
        f"-- {len(row.tokens)} tokens, {sum(row.mask)} supervised --\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there!<|im_end|>\n"
        "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[It's 4.<|im_end|>]]\n"
    )


def test_supervised_text_is_green_in_a_terminal(chatml):
    row = one(chatml, TALK, assistant_only_loss=True)
    shown = printed(row, chatml, terminal=True)
    assert shown.count(GREEN) == 2 and "[[" not in shown
    assert f"{GREEN}Hello.<|im_end|>{END}" in shown and f"{GREEN}It's 4.<|im_end|>{END}" in shown


def test_a_packed_row_shows_where_its_documents_begin(chatml):
    bin_ = [one(chatml, TALK[:2], assistant_only_loss=True), one(chatml, TALK[2:])]
    shown = printed(bin_, chatml, terminal=False).splitlines()
    size = [(len(row.tokens), sum(row.mask)) for row in bin_]
    total = [sum(part) for part in zip(*size, strict=True)]
    assert [line for line in shown if line.startswith("--")] == [
        "-- 2 documents, {} tokens, {} supervised --".format(*total),
        "-- document 1, {} tokens, {} supervised --".format(*size[0]),
        "-- document 2, {} tokens, {} supervised --".format(*size[1]),
    ]


def test_text_of_a_row_cannot_steer_the_terminal(chatml):
    row = one(chatml, [{"role": "user", "content": "\x1b[31m[red]a\u202e日本"}])
    shown = printed(row, chatml, terminal=False)
    assert "\\x1b[31m[red]a\\u202e日本" in shown and "\x1b" not in shown


def test_what_is_no_row_is_refused(chatml):
    with pytest.raises(ValueError, match="got no row"):
        preview([], chatml)
    with pytest.raises(ValueError, match=r"expected a Row .*, got \['int'\]"):
        documents_of([3, 4])


def test_a_trainer_shows_its_rows_as_they_are_trained_on(tmp_path, capsys):
    model, _ = tiny_chat.load(tiny_chat.save(tmp_path))
    FastLanguageModel.get_peft_model(model, r=4)
    for packing in (False, True):
        args = SFTConfig(packing=packing, assistant_only_loss=True, max_length=128, max_steps=1)
        trainer = SFTTrainer(model=model, train_dataset=tiny_chat.MESSAGES, args=args)
        capsys.readouterr()
        trainer.preview()
        shown = capsys.readouterr().out
        assert ("document 2" in shown) == packing
        assert "<|im_start|>assistant\n[[" in shown and "<|im_end|>]]" in shown
    trainer.preview(trainer.rows[0])
    assert "Paris.<|im_end|>]]" in capsys.readouterr().out
    with pytest.raises(IndexError, match="row 99: there are [0-9]+"):
        trainer.preview(99)
