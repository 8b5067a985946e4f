"""Alpaca's columns, rows of the wrong kind or too long: what comes out and what is said."""

import pytest
from small_tokenizers import SYSTEM, TALK, USER, byte_level

from bridge.chat_templates import get_chat_template
from unsloth_jax.data import Row
from workflows import keywords, lengths
from workflows.rows import rows


@pytest.fixture(scope="module")
def chatml():
    return get_chat_template(byte_level(), "chatml")


def one(example, tokenizer, **how) -> Row:
    return rows([example], tokenizer, max_length=None, **how)[0]


def learnt(tokenizer, row: Row) -> str:
    return tokenizer.decode([t for t, on in zip(*row, strict=True) if on])


ALPACA = {"instruction": "What is 2+2?", "input": "", "output": "It's 4."}


def test_alpacas_columns_are_a_question_and_its_answer(chatml):
    talk = [{"role": "user", "content": "What is 2+2?"}, TALK[3]]
    assert one(ALPACA, chatml) == one({"messages": talk}, chatml)
    with_input = ALPACA | {"input": "Be brief.", "system": "Hello."}
    talk[0] = {"role": "user", "content": "What is 2+2?\n\nBe brief."}
    hello = {"role": "system", "content": "Hello."}
    assert one(with_input, chatml) == one({"messages": [hello, *talk]}, chatml)
    for how in (dict(assistant_only_loss=True), dict(completion_only_loss=True)):
        assert learnt(chatml, one(ALPACA | {"input": None}, chatml, **how)) == "It's 4.<|im_end|>"


def test_alpacas_columns_and_template_make_alpacas_text():
    alpaca = get_chat_template(byte_level(), "alpaca")
    text = alpaca.decode(one(ALPACA, alpaca).tokens)
    assert "### Instruction:\nWhat is 2+2?\n\n### Response:\nIt's 4.<EOS>" in text


def test_alpacas_columns_without_a_template_name_what_there_is():
    with pytest.raises(ValueError, match="row 0: .*'alpaca'.* or give a formatting_func"):
        one(ALPACA, byte_level())


def test_text_in_parts_is_learnt_as_its_text(chatml):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    talk = [{"role": "user", "content": parts}, TALK[3]]
    assert one({"messages": talk}, chatml) == one(ALPACA, chatml)


IMAGE = {"type": "image", "image": "a.png"}
SPOKEN = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}, TALK[3]]
BAD = [
    ({"messages": SPOKEN}, r"message 0 holds \['image'\]; the model reads text alone"),
    ({"messages": TALK, "images": ["a.png"]}, "column 'images' holds what is no text"),
    ({"text": "a b", "image": "a.png"}, "column 'image' holds what is no text"),
    (
        {"prompt": "a", "completion": "b", "images": ["a.png"]},
        "column 'images' holds what is no text",
    ),
    ({"prompt": SPOKEN[:1], "completion": TALK[3:]}, r"message 0 holds \['image'\]"),
    ({"conversations": [{"from": "human", "value": [IMAGE]}]}, r"message 0 holds \['image'\]"),
    (ALPACA | {"output": 4}, r"columns \['output'\] hold no text; expected text in \['system'"),
    ({"instruction": "x"}, "of no known schema; expected .*'instruction' and 'output'"),
    ({"messages": [{"role": "user"}]}, r"message 0 has \['role'\]: expected role and content, or"),
    ({"messages": [USER]}, "no supervised token among .*; expected an answer"),
]


@pytest.mark.parametrize(("example", "text"), BAD)
def test_a_row_of_another_kind_is_named_with_what_is_accepted(example, text, chatml):
    silent = dict(assistant_only_loss=example.get("messages") == [USER])
    with pytest.raises(ValueError, match=f"row 1: .*{text}"):
        rows([{"messages": TALK}, example], chatml, max_length=None, **silent)


def test_an_order_of_roles_that_the_template_refuses_is_named():
    gemma = get_chat_template(byte_level(), "gemma-3")
    with pytest.raises(ValueError, match="row 1: the chat template refuses it: .*user and assis"):
        rows([{"messages": TALK}, {"messages": [*TALK, SYSTEM]}], gemma, max_length=None)


@pytest.fixture
def said(capsys, monkeypatch):
    monkeypatch.setattr(keywords, "_said", set())
    return lambda: capsys.readouterr().out


LONG = {"input_ids": [5] * 30}


def test_rows_that_are_all_too_long_are_said_with_the_histogram(chatml, said):
    with pytest.raises(ValueError) as error:
        rows([LONG] * 3, chatml, max_length=8)
    text = str(error.value)
    assert text.startswith("row 0: 30 tokens, more than max_length=8; ")
    assert "(3 of 3 rows are longer)" in text and text.endswith(lengths.histogram([30] * 3, 8))
    cut = rows([LONG] * 3, chatml, max_length=8, truncate=True)
    assert cut == [Row([5] * 8, [0] + [1] * 7)] * 3
    assert said() == (
        lengths.histogram([30] * 3, 8)
        + "\nunsloth_jax: all 3 rows are longer than max_length=8 and are cut\n"
    )


def test_how_many_rows_are_cut_is_said_and_nothing_where_all_fit(chatml, said):
    rows([LONG, LONG, {"input_ids": [5, 6]}], chatml, max_length=8, truncate=True)
    assert said() == "unsloth_jax: 2 of 3 rows are longer than max_length=8 and are cut\n"
    rows([LONG, LONG, {"input_ids": [5, 6]}], chatml, max_length=30)
    with pytest.raises(ValueError, match="30 tokens, more than max_length=29"):
        rows([LONG], chatml, max_length=29)
    assert said() == ""


def test_a_histogram_counts_every_row_and_shows_the_limit():
    assert lengths.histogram([3, 4, 4, 12], 5) == "\n".join([
        "       tokens  rows",
        "     1-1       0",
        "     2-2       0",
        "     3-3       1      ####################",
        "     4-4       2      ########################################",
        "     5-5       0",
        "               ---- max_length=5",
        *[f"{n:>6}-{n:<6}  0" for n in range(6, 12)],
        "    12-12      1      ####################",
    ])  # fmt: skip
    many = lengths.histogram([n % 977 + 1 for n in range(5000)])
    assert sum(int(line.split()[1]) for line in many.splitlines()[1:]) == 5000
