"""The demo's data set: seeded, split without overlap, scored exactly."""

import hashlib
import json

import pytest
from small_tokenizers import byte_level

from bridge.chat_templates import get_chat_template
from workflows import demo_data
from workflows.rows import rows


def test_the_data_set_is_the_same_on_every_machine():
    text = json.dumps(demo_data.split(), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "418caabef11cd53d"
    assert demo_data.split(seed=1) != demo_data.split()


def test_no_record_and_no_request_is_held_out_and_trained_on():
    train, held_out = demo_data.split()
    assert (len(train), len(held_out)) == (360, 60)
    for field in ("record", "request"):
        seen = {getattr(e, field) for e in train}
        assert not seen & {getattr(e, field) for e in held_out}


def test_each_record_can_be_read_from_its_request():
    tables = (demo_data.PEOPLE, demo_data.DAYS, demo_data.TIMES)
    for request, record in (e for part in demo_data.split() for e in part):
        place, *rest = record.split(" | ")
        assert place in request
        for table, written in zip(tables, rest, strict=True):
            said = [word for word, short in table.items() if short == written]
            assert len(said) == 1
            assert any(w.lower() in request.lower() for w in [*said, written])


def test_every_word_of_the_tables_is_trained_on():
    seen = {field for e in demo_data.split().train for field in e.record.split(" | ")}
    tables = (demo_data.PEOPLE, demo_data.DAYS, demo_data.TIMES)
    assert seen >= {*demo_data.PLACES, *(word for table in tables for word in table.values())}


def test_no_constant_answer_scores_well():
    records = [e.record for e in demo_data.split().held_out]
    assert demo_data.best_constant(records) < 0.05
    assert demo_data.best_constant(["a", "b", "a", "c"]) == 0.5


def test_score_counts_exact_answers_with_their_end():
    assert demo_data.score(["a<e>", "b<e>", "c", "d<e> "], ["a<e>", "x<e>", "c<e>", "d<e>"]) == 0.25
    assert demo_data.score([(1, 2), (3,)], [(1, 2), (3,)]) == 1
    for answers, expected in ((["a"], []), (["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="got"):
            demo_data.score(answers, expected)
    with pytest.raises(ValueError, match="no expected"):
        demo_data.best_constant([])


def test_conversations_train_the_record_and_its_end():
    tokenizer = get_chat_template(byte_level(), "chatml")
    examples = demo_data.split().train[:5]
    made = rows(
        demo_data.conversations(examples), tokenizer, max_length=None, assistant_only_loss=True
    )
    for example, row in zip(examples, made, strict=True):
        said = tokenizer.decode([t for t, on in zip(*row, strict=True) if on])
        assert said == example.record + "<|im_end|>"
        messages = demo_data.conversations([example])[0]["messages"]
        assert messages[:-1] == demo_data.prompt(example)
