"""Settings of a generation and of keywords: what has no meaning is refused by name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from workflows import adapting, inputs, keywords

GIVEN = (None, None, None, None, None, None)


@pytest.mark.parametrize(
    "setting, value, kind",
    [
        ("max_new_tokens", 2.5, "int | None"),
        ("max_new_tokens", "3", "int | None"),
        ("max_length", True, "int | None"),
        ("do_sample", "yes", "bool | None"),
        ("top_p", "0.9", "float | None"),
        ("temperature", True, "float | None"),
        ("seed", "a", "int"),
        ("seed", None, "int"),
    ],
)
def test_a_setting_of_another_kind_is_refused_with_the_kind_it_has(setting, value, kind):
    with pytest.raises(TypeError) as error:
        inputs.check_settings("generate", {setting: value})
    assert str(error.value) == f"generate: {setting} must be {kind}, got {value!r}"


@pytest.mark.parametrize("given", [7, 0, "down_proj", [7], {"a": 1}])
def test_names_that_are_no_list_are_refused_with_their_keyword(given):
    """The shape checks of the tests come before it in get_peft_model."""
    with pytest.raises(TypeError, match="target_parameters must be a list of names, got"):
        adapting.check_names("target_parameters", given)
    adapting.check_names("target_parameters", None)


def test_padding_on_the_left_and_inside_goes_last():
    tokens = np.asarray([[0, 0, 5, 6], [7, 0, 8, 0], [1, 2, 3, 4]], np.int32)
    front, mask, at = inputs.padded_last(tokens, (tokens > 0).astype(np.int32))
    assert front.tolist() == [[5, 6, 0, 0], [7, 8, 0, 0], [1, 2, 3, 4]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert (np.take_along_axis(front, at, axis=1) == tokens).all()
    assert inputs.padded_last(front, mask)[2] is None


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_that_no_key_is_made_of_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must be from -{2**63} to {2**63 - 1}, got {seed}"):
        inputs.check_settings("generate", {"seed": seed})


@pytest.mark.parametrize("name, value", [("do_sample", "yes"), ("top_p", "1"), ("top_k", [5])])
def test_settings_of_the_checkpoint_are_checked_like_those_given(name, value):
    with pytest.raises(TypeError, match=f"generation_config.json: {name} must be .*, got"):
        inputs.sampling({"do_sample": True} | {name: value}, *GIVEN)


@pytest.mark.parametrize("given", ["x", [1.5], ["2"], True, 2.0, {2}, [[2]]])
def test_what_is_no_token_id_ends_no_answer(given):
    with pytest.raises(TypeError, match="eos_token_id: expected a token id or a list of them"):
        inputs.stops(given)


@pytest.mark.parametrize(
    "given, ids",
    [(2, [2]), ([2, 3], [2, 3]), ((), []), (np.int64(2), [2]), (jnp.asarray([2, 3]), [2, 3])],
)
def test_token_ids_are_read_from_one_or_several(given, ids):
    assert inputs.stops(given) == ids


@pytest.mark.parametrize(
    "given, error, message",
    [
        ("", ValueError, "at least one character, got ''"),
        (["a", ""], ValueError, r"at least one character, got \['a', ''\]"),
        (3, TypeError, "a text or a list of texts, got 3"),
        ([3], TypeError, r"a text or a list of texts, got \[3\]"),
    ],
)
def test_a_stop_string_that_stops_everything_or_nothing_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        inputs.stop_texts(given)


@pytest.mark.parametrize("given", [-1, [2, -1], 2**31, np.int64(2**40)])
def test_a_number_that_is_no_id_ends_no_answer(given):
    with pytest.raises(ValueError, match=f"eos_token_id: expected ids from 0 to {2**31 - 1}, got"):
        inputs.stops(given)


BAD_IDS = [
    (5, TypeError, "input_ids: expected integers .* got 5"),
    (None, TypeError, "input_ids: expected integers .* got None"),
    ("hello", TypeError, "got 'hello'"),
    (b"ab", TypeError, "got b'ab'"),
    ({3}, TypeError, r"got \{3\}"),
    (iter([3]), TypeError, "got a value of list_iterator"),
    ({"input_ids": [[3]]}, TypeError, r"got dict; give .* as keywords: generate\(\*\*inputs\)"),
    ([3, [4]], TypeError, "got a list of int, list"),
    (["ab", "c"], TypeError, "input_ids: expected integers"),
    ([[True]], TypeError, "got bool"),
    ([[2**40]], ValueError, f"lie in {2**40} to {2**40}, expected 32-bit integers"),
    ([[-(2**40)]], ValueError, "expected 32-bit integers"),
    ([[2**70]], TypeError, "got object"),
    ([[1.0]], TypeError, "got float64"),
    ([[[3]]], TypeError, "input_ids: expected integers"),
]


@pytest.mark.parametrize("given, error, message", BAD_IDS)
def test_what_holds_no_token_ids_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        inputs.integers(given)


@pytest.mark.parametrize("mask", [[[5, 1]], [[-1, 0]]])
def test_a_mask_is_of_zeros_and_ones(mask):
    with pytest.raises(ValueError, match="attention_mask must be 0 and 1, got"):
        inputs.masked([[3, 4]], mask)
    tokens, found = inputs.masked([[3, 4]], [[True, False]])
    assert found.tolist() == [[1, 0]] and found.dtype == tokens.dtype == np.int32


ROOM = [
    ({}, None, None, 90),
    ({}, 7, None, 7),
    ({}, None, 17, 7),
    ({}, 7, 12, 7),
    ({"max_new_tokens": 5}, None, None, 5),
    ({"max_new_tokens": 5, "max_length": 50}, None, None, 5),
    ({"max_length": 50}, None, None, 40),
    ({"max_length": 50}, 7, None, 7),
    ({"max_new_tokens": 5}, None, 50, 40),
    ({"max_length": 20}, None, None, 90),  # transformers' own default
    ({"max_length": 4096}, None, None, 90),
    ({"max_new_tokens": 4096}, None, None, 90),
    ({"max_new_tokens": None, "max_length": None}, None, None, 90),
]


@pytest.mark.parametrize("config, new, total, expected", ROOM)
def test_the_length_asked_for_stands_above_the_files_and_that_above_ours(
    config, new, total, expected
):
    assert inputs.room(config, 10, 100, new, total) == expected


NO_ROOM = [
    ({}, 91, None, "a prompt of 10 tokens and 91 new ones pass max_seq_length=100"),
    ({}, None, 101, "a prompt of 10 tokens and 91 new ones pass"),
    ({}, 0, None, "generate: max_new_tokens must be at least 1, got 0"),
    ({}, None, 0, "generate: max_length=0 leaves no room for an answer to 10 tokens"),
    ({}, None, 10, "max_length=10 leaves no room"),
    ({"max_length": 9}, None, None, "generation_config.json: max_length=9 leaves no room"),
    ({"max_new_tokens": -1}, None, None, "generation_config.json: max_new_tokens must be at"),
]


@pytest.mark.parametrize("config, new, total, message", NO_ROOM)
def test_a_length_that_leaves_no_room_is_refused(config, new, total, message):
    with pytest.raises(ValueError, match=message):
        inputs.room(config, 10, 100, new, total)


def test_a_prompt_that_fills_the_model_and_a_file_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="a prompt of 100 tokens leaves no room in max_seq_len"):
        inputs.room({}, 100, 100, None, None)
    with pytest.raises(TypeError, match="generation_config.json: max_new_tokens must be int"):
        inputs.room({"max_new_tokens": "5"}, 10, 100, None, None)


UNSUPPORTED = dict(
    num_beams=4, no_repeat_ngram_size=3, min_new_tokens=5, suppress_tokens=[3], guidance_scale=1.5,
    bad_words_ids=[[3]], penalty_alpha=0.6, forced_eos_token_id=2, stop_strings=["x"],
)  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_decoding_in_the_checkpoints_file_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"generation_config.json: {name}=.* is not supported yet"):
        inputs.sampling({name: UNSUPPORTED[name]}, *GIVEN)


def test_fields_that_act_on_draws_alone_are_refused_where_there_are_draws():
    config = dict(typical_p=0.9)
    assert inputs.sampling(config, *GIVEN).temperature == 0
    with pytest.raises(ValueError, match="generation_config.json: typical_p=0.9 is not supported"):
        inputs.sampling(config | {"do_sample": True}, *GIVEN)


def test_neutral_and_empty_fields_pass_and_unknown_ones_are_said(capsys):
    plain = transformers.GenerationConfig().to_dict()
    inputs.sampling(plain | dict(num_beams=1, suppress_tokens=[], typical_p=1.0), *GIVEN)
    assert capsys.readouterr().out == ""
    inputs.sampling({"chat_format": "chatml", "_private": 1}, *GIVEN)
    assert "generation_config.json: ['chat_format'] have no effect" in capsys.readouterr().out


def test_more_candidates_than_an_id_can_name_are_all():
    given = (True, None, 10**12, None, None, None)
    assert inputs.sampling({}, *given).top_k == 2**31 - 1


def test_a_streamer_takes_tokens_and_a_tokenizer_gives_text():
    inputs.check_objects(None, None)
    with pytest.raises(TypeError, match="streamer must have put and end, got 'x'"):
        inputs.check_objects("x", None)
    with pytest.raises(TypeError, match="tokenizer must have decode, got 5"):
        inputs.check_objects(None, 5)


@pytest.mark.parametrize("given, texts", [(None, []), ("a", ["a"]), (("a", "b"), ["a", "b"])])
def test_stop_strings_are_read_from_one_or_several(given, texts):
    assert inputs.stop_texts(given) == texts


@pytest.mark.parametrize("value", [math.nan, np.float32("nan")])
def test_not_a_number_is_no_value_of_a_keyword(value):
    with pytest.raises(ValueError, match="here: rate must be a number, got .*nan"):
        keywords.typed("here", {"rate": value}, {"rate": float | None})


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_no_setting_is_infinite(value):
    with pytest.raises(ValueError, match="here: rate must be finite, got -?inf"):
        keywords.typed("here", {"rate": value}, {"rate": float | None})


class Heavy:
    """What no error should print."""

    def __repr__(self):
        raise AssertionError("its parameters were printed")


@pytest.mark.parametrize(
    "value, text",
    [
        ("x", "'x'"),
        ("x" * 200, "'" + "x" * 79 + "..."),
        ([1, "a"], "[1, 'a']"),
        ((Heavy(), 1), "a tuple of Heavy, int"),
        (Heavy(), "a value of Heavy"),
        (int, "<class 'int'>"),
    ],
)
def test_an_error_repeats_plain_values_and_names_the_class_of_others(value, text):
    assert keywords.shown(value) == text


@pytest.mark.parametrize("value", ["", "  ", "a\0b"])
def test_a_name_that_names_nothing_is_refused(value):
    with pytest.raises(ValueError, match="here: place must be a text that names something, got"):
        keywords.written("here", {"place": value}, ["place"])
    keywords.written("here", {"place": None, "other": "x"}, ["place", "other"])


@pytest.mark.parametrize(
    "limits, value, span",
    [
        ((0, 1, "below"), 1.0, "from 0 to below 1"),
        ((0, 1), 1.5, "from 0 to 1"),
        ((1, None), 0, "at least 1"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_the_range(limits, value, span):
    with pytest.raises(ValueError, match=f"here: x must be {span}, got {value}"):
        keywords.ranged("here", {"x": value}, {"x": limits})


@pytest.mark.parametrize("limits, value", [((0, 1, "below"), 0.999), ((0, 1), 1), ((1, 2), None)])
def test_a_value_inside_its_range_passes(limits, value):
    keywords.ranged("here", {"x": value}, {"x": limits})
