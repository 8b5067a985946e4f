"""train_on_responses_only: messages by rendering them, other rows by markers; every data set."""

import datasets
import pytest
import tiny_chat
from small_tokenizers import byte_level

from bridge import tokenizer as bt
from bridge.chat_templates import get_chat_template
from unsloth_jax import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
    train_on_responses_only,
)
from workflows import keywords, speaking
from workflows.rows import rows


@pytest.fixture(scope="module")
def base(folder):
    return tiny_chat.load(folder, max_seq_length=256)[0]


def said(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# What users say holds what opens an answer in one of the templates.
TALKS = [
    {"messages": said("a ### Response: b", "one", "[INST] a [/INST]", "2 four")},
    {"messages": said("USER: hi ASSISTANT: no", "7", "### Instruction: c", "### d")},
    {"conversations": said("<|im_start|>assistant", "Straße", "[/INST]", " one two")},
    {"instruction": "[INST] a [/INST]", "output": "the ### fox"},
    {"prompt": said("USER: [INST]", "9", "two"), "completion": said("", "3 fox")[1:]},
]
QUIET = {"vicuna": "a", "alpaca": "a"}


def trainer(model, data, tokenizer=None, **changes) -> SFTTrainer:
    held_out = changes.pop("eval_dataset", None)
    args = SFTConfig(**(dict(max_length=256, max_steps=2) | changes))
    given = dict(train_dataset=data, eval_dataset=held_out, args=args)
    return SFTTrainer(model=model, tokenizer=tokenizer or model.tokenizer, **given)


def supervised(made) -> int:
    return sum(sum(row.mask) for row in made)


@pytest.mark.parametrize(
    "name", ["chatml", "mistral", "alpaca", "vicuna", "starling", "qwen3-thinking"]
)
def test_messages_are_masked_as_they_are_rendered_whatever_their_users_say(fresh, name):
    tokenizer = get_chat_template(fresh.tokenizer, name, system_message=QUIET.get(name))
    run = train_on_responses_only(trainer(fresh, TALKS, tokenizer, eval_dataset=TALKS[:2]))
    exact = trainer(fresh, TALKS, tokenizer, assistant_only_loss=True)
    assert run.rows == exact.rows and run.eval_rows[""] == exact.rows[:2]
    last = train_on_responses_only(trainer(fresh, TALKS, tokenizer), last_response_only=True)
    assert last.rows == rows(TALKS, tokenizer, max_length=256, last_response_only=True)
    assert supervised(last.rows) < supervised(run.rows)


def test_rows_of_text_are_masked_by_the_templates_markers_beside_rows_of_messages(fresh):
    talk = tiny_chat.MESSAGES[0]
    text = bt.render(fresh.tokenizer, talk["messages"])
    run = train_on_responses_only(trainer(fresh, [talk, {"text": text}]))
    assert run.rows[0] == run.rows[1] and supervised(run.rows) < sum(len(r[0]) for r in run.rows)


MARKERS = dict(
    instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n",
    force_match=False,
)  # fmt: skip


@pytest.mark.parametrize("how", [{"last_response_only": True}, MARKERS], ids=str)
def test_a_data_set_given_to_evaluate_is_masked_as_the_trainers_own(fresh, how):
    several = [*tiny_chat.MESSAGES[:2], {"messages": said("a", "one", "b", "two")}]
    run = train_on_responses_only(trainer(fresh, several, eval_dataset=several), **how)
    own, other = run.evaluate(), run.evaluate(several)
    assert own["eval_supervised_tokens"] == supervised(run.eval_rows[""])
    assert own["eval_supervised_tokens"] == other["eval_supervised_tokens"]
    assert own["eval_loss"] == other["eval_loss"]


def test_a_stream_of_messages_is_masked_as_its_rows_are(fresh):
    stream = datasets.Dataset.from_list(tiny_chat.MESSAGES).to_iterable_dataset()
    run = train_on_responses_only(trainer(fresh, stream))
    assert list(run.rows(0)) == train_on_responses_only(trainer(fresh, tiny_chat.MESSAGES)).rows
    with pytest.raises(ValueError, match="markers need rows that are there"):
        train_on_responses_only(run, **MARKERS)


def test_rows_that_cannot_be_masked_leave_the_trainer_as_it_was(fresh):
    run = trainer(fresh, tiny_chat.MESSAGES, eval_dataset={"a": tiny_chat.TEXTS[:1]})
    before, own = run.rows, run.evaluate()
    for how in ({}, MARKERS):
        with pytest.raises(ValueError, match=r"eval_dataset\['a'\]: row 0: no supervised token"):
            train_on_responses_only(run, **how)
        assert run.rows == before
        assert run.evaluate({"a": tiny_chat.TEXTS[:1]})["eval_a_loss"] == own["eval_a_loss"]


@pytest.mark.parametrize(
    "held_out, message",
    [
        ([], "eval_dataset: the data set is empty"),
        ([{"text": 3}], "eval_dataset: row 0: column 'text' holds int"),
        ({"a": tiny_chat.TEXTS, "b": [{"x": "y"}]}, r"eval_dataset\['b'\]: row 0: columns"),
        ([{"text": "one " * 300}], "eval_dataset: row 0: .* more than max_length=256"),
    ],
)
def test_what_is_wrong_with_an_evaluation_set_names_it(fresh, held_out, message):
    with pytest.raises(ValueError, match=message):
        trainer(fresh, tiny_chat.TEXTS, eval_dataset=held_out)
    with pytest.raises(ValueError, match=message):
        trainer(fresh, tiny_chat.TEXTS).evaluate(held_out)


@pytest.fixture
def wider(fresh):
    """The model's tokenizer with a token more than the model has rows."""
    tokenizer = bt.load(tiny_chat.TOKENIZER)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.convert_tokens_to_ids("<new>") == fresh.config.vocab
    return tokenizer


OUTSIDE = r"row 1: token '<new>' has the id 482, but the model's vocabulary has 482 .*resize"
NEW = {
    "text": lambda new: {"text": f"one {new}"},
    "messages": lambda new: {"messages": said(f"one {new}", "two")},
    "prompt": lambda new: {"prompt": f"one {new}", "completion": " two"},
    "ids": lambda new: {"input_ids": [3, 482 if new else 3, 4]},
}


@pytest.mark.parametrize("kind", NEW)
def test_a_token_that_the_model_has_no_row_for_is_refused(fresh, wider, kind):
    data = [NEW[kind](""), NEW[kind]("<new>")]
    assert rows(data, wider, max_length=None, vocab=483)[1].tokens.count(482) == 1
    with pytest.raises(ValueError, match=f"^{OUTSIDE}"):
        trainer(fresh, data, wider)
    with pytest.raises(ValueError, match=f"^eval_dataset: {OUTSIDE}"):
        trainer(fresh, data[:1], wider, eval_dataset=data)
    stream = datasets.Dataset.from_list(data).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"^{OUTSIDE}"):
        trainer(fresh, stream, wider).train()


def test_a_token_of_preferences_that_the_model_has_no_row_for_is_refused(fresh, wider):
    good = {"prompt": "one", "chosen": " two", "rejected": " three"}
    for change in ({"prompt": "<new>"}, {"rejected": "<new>"}):
        data = [good, good | change]
        with pytest.raises(ValueError, match=f"^{OUTSIDE}"):
            DPOTrainer(fresh, None, DPOConfig(max_steps=1), data, tokenizer=wider)
    judged = [{"prompt": "one", "completion": " two", "label": bool(n)} for n in range(2)]
    judged[1]["prompt"] = "<new>"
    with pytest.raises(ValueError, match=f"^{OUTSIDE}"):
        KTOTrainer(fresh, None, KTOConfig(max_steps=1), judged, tokenizer=wider)


def spoken(name, missing="<|eot_id|>"):
    return get_chat_template(byte_level(missing=(missing,)), name)


def test_an_end_of_turn_that_is_no_token_is_said_with_what_helps(capsys):
    keywords._said.clear()
    tokenizer = spoken("llama-3")
    speaking.say_pieces(tokenizer)
    line = capsys.readouterr().out
    assert "ends answers with '<|eot_id|>', which is no token" in line and "map_eos_token" in line
    swapped = get_chat_template(tokenizer, (tokenizer.chat_template, "<|eot_id|>"))
    added = spoken("llama-3")
    added.add_tokens(["<|eot_id|>"], special_tokens=True)
    refusing = byte_level()
    refusing.chat_template = "{{ raise_exception('no') }}"
    for other in (swapped, added, refusing, byte_level(), spoken("chatml")):
        speaking.say_pieces(other)
    assert capsys.readouterr().out == ""
    for helped in (swapped, added):
        row = rows([{"messages": said("a", "b", "c", "d")}], helped, max_length=None,
                   assistant_only_loss=True)[0]  # fmt: skip
        learnt = [t for t, on in zip(*row, strict=True) if on]
        assert learnt.count(helped.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_a_trainer_says_that_its_template_ends_answers_in_pieces(fresh, capsys):
    keywords._said.clear()
    trainer(fresh, tiny_chat.TEXTS, get_chat_template(fresh.tokenizer, "llama-3"))
    assert "ends answers with '<|eot_id|>'" in capsys.readouterr().out
