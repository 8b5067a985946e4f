"""Each keyword of TRL 1.16 and of Unsloth is in exactly one of three lists, and its page is new."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import test_face
import trl

from unsloth_jax import SFTConfig
from workflows import option_table
from workflows.keywords import neutral

LISTS = option_table.lists()
PAGE = Path(__file__).parents[1] / "docs" / "sft.md"
TRL_CONFIG = {f.name: f for f in dataclasses.fields(trl.SFTConfig)}
TRL_TRAINER = [*inspect.signature(trl.SFTTrainer.__init__).parameters][1:]
# Old-style keywords of Unsloth's SFTTrainer and its config's own (its trainer.py, models/rl.py).
OLD = ["tokenizer", "dataset_text_field", "packing", "max_seq_length", "dataset_num_proc"]
REFERENCE = {
    "FastLanguageModel.from_pretrained": ["model_name", *test_face.LOAD],
    "FastLanguageModel.get_peft_model": [*test_face.PEFT],
    "SFTConfig": [*TRL_CONFIG, *test_face.CONFIG],
    "SFTTrainer": [*TRL_TRAINER, *OLD],
}


def test_the_version_of_trl_is_the_one_that_is_spoken_of():
    assert trl.__version__ == "1.16.0"


@pytest.mark.parametrize("where", LISTS)
def test_every_keyword_is_in_exactly_one_list(where):
    used, ignored, refused = LISTS[where]
    counts = {name: sum(name in part for part in (used, ignored, refused))
              for name in {*used, *ignored, *refused, *REFERENCE[where]}}  # fmt: skip
    assert {name: n for name, n in counts.items() if n != 1} == {}


def default(field) -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


@pytest.mark.parametrize("name", sorted(LISTS["SFTConfig"].refused.keys() & TRL_CONFIG.keys()))
def test_trls_default_of_what_is_refused_is_taken(name):
    SFTConfig(**{name: default(TRL_CONFIG[name])})


@pytest.mark.parametrize(
    "where, name", [(w, n) for w, found in LISTS.items() for n in found.refused]
)
def test_what_is_refused_is_refused_and_its_neutral_values_are_not(where, name):
    values = LISTS[where].refused[name]
    for value in values:
        neutral(where, name, value, values)
    with pytest.raises(ValueError, match=f"{name}=.* is not supported yet; supported"):
        neutral(where, name, object(), values)


def test_reasons_are_told():
    for found in LISTS.values():
        assert all(len(why.split()) > 1 for why in found.ignored.values())


def test_the_page_of_options_is_made_of_the_lists():
    text = PAGE.read_text(encoding="utf-8")
    assert option_table.filled(text) == text, "run python -m workflows.option_table docs/sft.md"
    with pytest.raises(ValueError, match="no part from"):
        option_table.filled("# Another page")
