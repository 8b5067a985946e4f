"""workflows.rows and workflows.responses: each schema gives the rows that its loss asks for."""

import functools
from pathlib import Path

import datasets
import jaxtyping
import pytest
from small_tokenizers import SYSTEM, TALK, TEMPLATES, TOKENIZERS, USER, byte_level

from bridge import tokenizer as bt
from bridge.chat_templates import get_chat_template, standardize_sharegpt
from unsloth_jax.data import Row
from workflows.responses import (
    Detected,
    Markers,
    detect_markers,
    markers,
    mask_responses,
    responses_only,
)
from workflows.rows import Report, report, rows
from workflows.schemas import schema


@pytest.fixture(scope="module")
def chatml():
    return get_chat_template(byte_level(), "chatml")


@pytest.fixture(scope="module")
def llama2():
    return get_chat_template(TOKENIZERS["metaspace"](), (TEMPLATES["llama-2"].jinja, "eos_token"))


def learnt(tokenizer, row: Row) -> str:
    return tokenizer.decode([t for t, on in zip(*row, strict=True) if on])


def detected(made, tokenizer, **how) -> list[Row]:
    """The rows as they are masked where nobody gives markers and the messages are not known."""
    find = Detected(tokenizer, **how)
    return [Row(row.tokens, find(*row)) for row in made]


def one(example, tokenizer, **options) -> Row:
    return rows([example], tokenizer, **({"max_length": None} | options))[0]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_text_is_learnt_whole_with_one_end_token(kind):
    tokenizer = TOKENIZERS[kind]()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("Hello.", "Hello.<EOS>", "<BOS>Hello.", "Hello.<EOS>\n"):
        row = one({"text": text}, tokenizer)
        assert row.tokens.count(eos) == 1 and row.tokens.count(bos) <= 1
        assert row.mask == [0] + [1] * (len(row.tokens) - 1)
    assert one({"text": "Hello."}, tokenizer).tokens == [*tokenizer("Hello.")["input_ids"], eos]


def test_text_without_an_end_token_in_the_vocabulary_stays_as_it_is():
    tokenizer = byte_level(eos_token=None)
    assert tokenizer.eos_token is None
    assert one({"text": "Hello."}, tokenizer).tokens == tokenizer("Hello.")["input_ids"]


def test_text_rendered_by_the_template_gives_the_rows_of_its_messages(chatml):
    text = bt.render(chatml, TALK)
    assert one({"text": text}, chatml) == one({"messages": TALK}, chatml)


def test_messages_are_learnt_whole_unless_asked_otherwise(chatml):
    row = one({"messages": TALK}, chatml)
    assert row.tokens == bt.ids(chatml, TALK) and sum(row.mask) == len(row.tokens) - 1
    only = one({"messages": TALK}, chatml, assistant_only_loss=True)
    assert learnt(chatml, only) == "Hello.<|im_end|>It's 4.<|im_end|>"
    last = one({"messages": TALK}, chatml, last_response_only=True)
    assert learnt(chatml, last) == "It's 4.<|im_end|>"


def test_sharegpt_conversations_give_the_rows_of_messages(chatml):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    talk = [{"from": names[m["role"]], "value": m["content"]} for m in [SYSTEM, *TALK]]
    want = one({"messages": [SYSTEM, *TALK]}, chatml)
    assert one({"conversations": talk}, chatml) == want
    listed = standardize_sharegpt([{"conversations": talk, "id": 3}])
    assert listed == [{"conversations": [SYSTEM, *TALK], "id": 3}]
    table = standardize_sharegpt(datasets.Dataset.from_list([{"conversations": talk}] * 3))
    assert table["conversations"][2] == [SYSTEM, *TALK]
    assert rows(table, chatml, max_length=None) == [want] * 3
    with pytest.raises(TypeError, match="'bot'"):
        standardize_sharegpt([{"conversations": [{"from": "bot", "value": "x"}]}])
    bots = [{"conversations": [{"from": "bot", "value": "x"}]}]
    fixed = standardize_sharegpt(bots, aliases_for_assistant=["bot"])
    assert fixed == [{"conversations": [{"role": "assistant", "content": "x"}]}]


def test_a_dataset_gives_the_rows_of_its_list(chatml):
    examples = [{"messages": TALK}, {"messages": [SYSTEM, *TALK]}]
    want = rows(examples, chatml, max_length=None)
    assert rows(datasets.Dataset.from_list(examples), chatml, max_length=None) == want
    assert rows(iter(examples), chatml, max_length=None) == want
    streamed = datasets.Dataset.from_list(examples).to_iterable_dataset()
    assert rows(streamed, chatml, max_length=None) == want


@pytest.mark.parametrize("kind", ["byte_level", "digits", "metaspace"])
def test_only_the_completion_is_learnt_by_default(kind):
    tokenizer = TOKENIZERS[kind]()
    example = {"prompt": "What is 2+2? ", "completion": "It's 4."}
    row = one(example, tokenizer)
    whole = one({"text": "What is 2+2? It's 4."}, tokenizer)
    assert row.tokens == whole.tokens
    assert learnt(tokenizer, row).strip() == "It's 4.<EOS>"
    assert one(example, tokenizer, completion_only_loss=False) == whole


def test_completion_messages_are_learnt_and_prompt_messages_are_not(chatml):
    example = {"prompt": [SYSTEM, *TALK[:3]], "completion": TALK[3:]}
    row = one(example, chatml)
    assert row.tokens == bt.ids(chatml, [SYSTEM, *TALK])
    assert learnt(chatml, row) == "It's 4.<|im_end|>"
    both = one(example, chatml, completion_only_loss=False, assistant_only_loss=True)
    assert learnt(chatml, both) == "Hello.<|im_end|>It's 4.<|im_end|>"
    all_of_it = one(example, chatml, completion_only_loss=False)
    assert all_of_it == one({"messages": [SYSTEM, *TALK]}, chatml)


@pytest.mark.parametrize(
    ("columns", "mask"),
    [
        ({}, [0, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 0, 1]}, [0, 0, 0, 1]),
        ({"labels": [5, -100, 7, 8], "attention_mask": [1, 1, 1, 1]}, [0, 0, 1, 1]),
    ],
)
def test_tokenised_rows_are_taken_as_they_are(columns, mask, chatml):
    assert one({"input_ids": [5, 6, 7, 8], **columns}, chatml) == Row([5, 6, 7, 8], mask)


def test_padding_is_dropped_from_tokenised_rows(chatml):
    columns = {"attention_mask": [0, 1, 1, 1, 0], "labels": [-100, -100, 7, 1, -100]}
    row = one({"input_ids": [1, 5, 7, 1, 1], **columns}, chatml)
    assert row == Row([5, 7, 1], [0, 1, 1])


def test_formatting_functions_of_one_example_and_of_batches_agree(chatml):
    data = datasets.Dataset.from_list([{"q": f"What is {i}?", "a": f"It's {i}."} for i in range(5)])
    single = lambda row: f"{row['q']} {row['a']}"
    batch = lambda rows: [f"{q} {a}" for q, a in zip(rows["q"], rows["a"], strict=False)]
    want = [one({"text": f"What is {i}? It's {i}."}, chatml) for i in range(5)]
    assert rows(data, chatml, max_length=None, formatting_func=single) == want
    assert rows(data, chatml, max_length=None, formatting_func=batch) == want
    for wrong in (lambda row: {"text": []}, lambda row: [3]):
        with pytest.raises(TypeError, match="formatting_func"):
            rows(data, chatml, max_length=None, formatting_func=wrong)


TABLE = [{"q": f"What is {i}?", "a": str(i)} for i in range(8)]


@pytest.mark.parametrize(
    "func",
    [
        lambda row: [f"{row['q']} {row['a']}"],
        lambda row: [row["q"].strip() + " " + row["a"]],
        lambda row: [f"{a} {b}" for a, b in zip(row["q"], row["a"], strict=False)],
    ],
    ids=["one", "one, of texts alone", "batch, of one letter here"],
)
@pytest.mark.parametrize("table", [TABLE, TABLE[:1]], ids=len)
def test_a_list_of_one_text_is_that_of_a_row_or_of_a_batch_of_one(func, table, chatml):
    want = [one({"text": f"{row['q']} {row['a']}"}, chatml) for row in table]
    assert rows(table, chatml, max_length=None, formatting_func=func) == want


@pytest.mark.parametrize(
    "func, said",
    [
        (lambda row: row["q"][:3], r"3 texts for 8 rows \(rows 0 to 7\), expected one a row"),
        (lambda row: ["x"] * (1 + (row["a"] == "5")), "row 5: .* 2 texts for one row, expected"),
    ],
    ids=["batch", "one"],
)
def test_another_number_of_texts_than_rows_is_refused(func, said, chatml):
    table = [row | {"q": list(row["q"])} for row in TABLE]
    columns = lambda row: func({"q": list(row["q"]), "a": row["a"]})
    with pytest.raises(ValueError, match=said):
        rows(table, chatml, max_length=None, formatting_func=columns)


def test_columns_beside_a_schema_are_left_alone(chatml):
    example = {"text": "Hello.", "instruction": "Greet.", "messages": None}
    assert schema(example) == "text"
    assert schema({"story": "x", "text": "y", "input_ids": None}, "story") == "text"
    assert schema({"conversations": TALK, "text": "x"}) == "text"
    assert one(example, chatml) == one({"text": "Hello."}, chatml)


GOOD = {"text": "Hello."}
IDS = {"input_ids": [5, 6, 7]}


@pytest.mark.parametrize(
    ("example", "options", "text"),
    [
        ({"question": "x", "answer": "y"}, {}, r"row 1: columns \['answer', 'question'\]"),
        ({"prompt": "x"}, {}, "'prompt' and 'completion'"),
        ({"text": 3}, {}, "row 1: column 'text' holds int"),
        ({"messages": []}, {}, "row 1: the conversation is empty"),
        ({"messages": [{"text": "x"}]}, {}, r"row 1: message 0 has \['text'\]"),
        ({"messages": [USER]}, {"assistant_only_loss": True}, "row 1: no supervised token"),
        ({"messages": [USER]}, {"last_response_only": True}, "row 1: no supervised token"),
        ({"prompt": [USER], "completion": "x"}, {}, "both be text or both be messages"),
        (IDS | {"labels": [-100] * 3}, {}, "row 1: no supervised token among 3"),
        (IDS | {"labels": [5, 6]}, {}, r"3 input_ids, but labels and masks of lengths \[2,"),
        (IDS | {"labels": [5, 6, 8]}, {}, "labels differ"),
        ({"input_ids": [5, 10**6]}, {}, "outside the vocabulary"),
        ({"input_ids": [5.5, 6]}, {}, r"whole numbers, got \[5.5, 6\]"),
        ({"input_ids": "123"}, {}, "whole numbers, got 123"),
        ({"input_ids": []}, {}, "row 1: no supervised token"),
        ({"text": "Hello. " * 20}, {"max_length": 8}, "row 1: .* tokens, more than max_length=8"),
        (IDS | {"labels": [-100, -100, 7]}, {"max_length": 2, "truncate": True},
         "row 1: no supervised token among the first 2 of 3"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_their_index(example, options, text, chatml):
    good = {"messages": TALK[:2]} if options.keys() & {"assistant_only_loss"} else GOOD
    good = {"messages": TALK[:2]} if "last_response_only" in options else good
    options = {"max_length": None} | options
    with pytest.raises(ValueError, match=text):
        rows([good, example], chatml, **options)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (GOOD, {"completion_only_loss": True}),
        (GOOD, {"assistant_only_loss": True}),
        ({"messages": TALK}, {"completion_only_loss": True}),
        ({"prompt": "a", "completion": "b"}, {"assistant_only_loss": True}),
    ],
)
def test_a_loss_that_the_columns_cannot_give_is_refused(example, options, chatml):
    with pytest.raises(ValueError, match="=True needs"):
        one(example, chatml, **options)


def test_unknown_roles_are_refused(chatml):
    with pytest.raises(TypeError, match="row 0: message 0 has role 'narrator'"):
        one({"messages": [{"role": "narrator", "content": "x"}]}, chatml)


def test_long_rows_are_cut_when_asked(chatml):
    whole = one({"messages": TALK}, chatml)
    cut = one({"messages": TALK}, chatml, max_length=10, truncate=True)
    assert cut == Row(whole.tokens[:10], whole.mask[:10])
    assert one({"messages": TALK}, chatml, max_length=len(whole.tokens)) == whole


def test_report_counts_rows_tokens_and_supervised_tokens(chatml):
    made = rows([IDS, IDS | {"labels": [-100, -100, 7]}], chatml, max_length=None)
    assert report(made) == Report(rows=2, tokens=6, supervised=3)


USER_PART, ANSWER_PART = "<|im_start|>user\n", "<|im_start|>assistant\n"


@pytest.mark.parametrize("how", [{"force_match": True}, {"force_match": False}, None], ids=str)
def test_markers_keep_what_stands_between_them(how, chatml):
    made = rows([{"messages": [SYSTEM, *TALK]}], chatml, max_length=None)
    given = functools.partial(responses_only, instruction_part=USER_PART, response_part=ANSWER_PART)
    mask = detected if how is None else functools.partial(given, **how)
    masked = mask(made, chatml)
    assert masked[0].tokens == made[0].tokens
    # Without markers the answers end with their end-of-turn token, not with the line after it.
    end = "<|im_end|>" if how is None else "<|im_end|>\n"
    assert learnt(chatml, masked[0]) == f"Hello.{end}It's 4.{end}"
    last = mask(made, chatml, last_response_only=True)
    assert learnt(chatml, last[0]) == f"It's 4.{end}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_markers_are_found_for_each_template(name, kind):
    tokenizer = get_chat_template(TOKENIZERS[kind](), (TEMPLATES[name].jinja, "eos_token"))
    text = bt.render(tokenizer, TALK)
    made = rows([{"text": text}], tokenizer, max_length=None)
    got = learnt(tokenizer, detected(made, tokenizer)[0])
    exact = learnt(tokenizer, one({"messages": TALK}, tokenizer, assistant_only_loss=True))
    squeeze = lambda text: "".join(text.split())
    assert squeeze(got) == squeeze(exact)


def test_detected_markers_are_the_usual_ones(chatml):
    assert detect_markers(chatml) == (USER_PART, ANSWER_PART)
    llama3 = get_chat_template(byte_level(), (TEMPLATES["llama-3"].jinja, "eos_token"))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert detect_markers(llama3) == (head.format("user"), head.format("assistant"))
    qwen3 = get_chat_template(byte_level(), (TEMPLATES["qwen-3"].jinja, "eos_token"))
    assert detect_markers(qwen3) == (USER_PART, ANSWER_PART)


def test_an_answer_that_begins_with_a_blank_line_is_found(chatml):
    talk = [USER, {"role": "assistant", "content": "\n\nHello."}]
    made = rows([{"messages": talk}], chatml, max_length=None)
    masked = detected(made, chatml)
    assert learnt(chatml, masked[0]).strip() == "Hello.<|im_end|>"


def test_markers_never_add_to_a_mask():
    found = Markers(instruction=[1, 2], response=[3])
    tokens = [1, 2, 9, 3, 7, 8, 1, 2, 9, 3, 7]
    assert mask_responses(tokens, [1] * 11, found) == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert mask_responses(tokens, [1] * 5 + [0] * 6, found) == [0, 0, 0, 0, 1] + [0] * 6
    ended = found._replace(tails=[[7]], stop=8)
    assert mask_responses(tokens, [1] * 11, ended) == [0] * 5 + [1] + [0] * 5


def test_bad_markers_are_refused(chatml, llama2):
    made = rows([{"messages": TALK}], chatml, max_length=None)
    with pytest.raises(ValueError, match="give both"):
        responses_only(made, chatml, USER_PART, None)
    with pytest.raises(ValueError, match=r"row 0: no supervised token after masking \(1 of 1"):
        responses_only(made, chatml, USER_PART, "### Answer:")
    with pytest.raises(ValueError, match="no distinct token ids"):
        markers(chatml, "a", "a")


def test_an_empty_data_set_and_a_dictionary_of_splits_are_refused(chatml):
    with pytest.raises(ValueError, match="data set is empty"):
        rows([], chatml, max_length=None)
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        rows({"train": [{"text": "a"}]}, chatml, max_length=None)


def test_rows_without_columns_or_content_are_refused(chatml):
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        rows(["text"], chatml, max_length=None)
    silent = {"messages": [{"role": "user", "content": None}]}
    with pytest.raises((TypeError, ValueError), match="row 1: "):
        rows([{"messages": TALK}, silent], chatml, max_length=None)
    with pytest.raises(ValueError, match=r"row 0: columns \['text'\] \(None in \['text'\]\)"):
        rows([{"text": None}], chatml, max_length=None)


BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SAID = ["<think>a</think> two ", "four", "4", " Hello.", "Hello.\n"]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("kind", ["byte_level", "digits"])
def test_answers_that_no_special_token_ends_are_found_without_markers(kind, said):
    tokenizer = get_chat_template(TOKENIZERS[kind](), (BARE, "eos_token"))
    assert markers(tokenizer).stop is None
    talk = [dict(m) for m in TALK]
    talk[1]["content"] = said
    whole = one({"messages": talk}, tokenizer)
    exact = one({"messages": talk}, tokenizer, assistant_only_loss=True)
    assert detected([whole], tokenizer) == [exact]


def test_a_question_that_takes_the_headers_space_is_not_learnt():
    # This vocabulary has " th" and no " x": the marker's last space is a token only now and then.
    given = bt.load(Path(__file__).parent / "data" / "tiny_tokenizer")
    tokenizer = get_chat_template(given, (BARE, "eos_token"))
    said = ("one", "<a> two ", "three", "four")
    talk = [dict(m, content=text) for m, text in zip(TALK, said, strict=True)]
    (row,) = detected([one({"messages": talk}, tokenizer)], tokenizer)
    assert learnt(tokenizer, row) == "<a> two \n four\n"


def test_a_message_that_holds_a_marker_is_refused_where_nothing_tells_it_apart():
    tokenizer = get_chat_template(byte_level(), (BARE, "eos_token"))
    asked = {"role": "user", "content": "Say\nassistant: four"}
    texts = [{"text": bt.render(tokenizer, talk)} for talk in (TALK, [asked, TALK[1]])]
    with pytest.raises(ValueError, match="row 1: two response markers .* give rows of messages"):
        rows(texts, tokenizer, max_length=None, elsewhere=Detected(tokenizer))


def test_turns_that_their_openings_do_not_tell_apart_are_refused():
    # The first role is written with its space and later ones without: they share the colon only.
    tokenizer = get_chat_template(TOKENIZERS["metaspace"](), (BARE, "eos_token"))
    made = rows([{"messages": TALK}], tokenizer, max_length=None)
    with pytest.raises(ValueError, match="ends answers with no special token, and the text that"):
        detected(made, tokenizer)


@pytest.mark.parametrize("ids", [5, [None], [float("nan")], [float("inf")], [[3]], ["3"], [1.5]])
def test_input_ids_that_are_no_whole_numbers_are_refused_by_row(chatml, ids):
    with pytest.raises(ValueError, match="row 0: input_ids must be whole numbers, got"):
        rows([{"input_ids": ids}], chatml, max_length=9)


def test_a_formatting_func_returns_a_list_for_a_batch_too(chatml):
    once = iter([["a"]])
    func = lambda batch: next(once, "abc")
    with pytest.raises(TypeError, match="a list for one example and str for a batch of them"):
        rows([{"text": "abc"}], chatml, max_length=None, formatting_func=func)


def test_an_instruction_marker_that_no_row_has_is_refused(chatml):
    made = rows([{"messages": TALK}], chatml, max_length=None)
    with pytest.raises(ValueError, match="'### Ask:' is in none of the 1 rows: what users say"):
        responses_only(made, chatml, "### Ask:", ANSWER_PART)
