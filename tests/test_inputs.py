"""Settings of a generation and of keywords: what has no meaning is refused by name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from workflows import inputs, keywords

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


@pytest.mark.parametrize("given, texts", [(None, []), ("a", ["a"]), (("a", "b"), ["a", "b"])])
def test_stop_strings_are_read_from_one_or_several(given, texts):
    assert inputs.stop_texts(given) == texts


@pytest.mark.parametrize("value", [math.nan, np.float32("nan")])
def test_not_a_number_is_no_value_of_a_keyword(value):
    with pytest.raises(ValueError, match="here: rate must be a number, got .*nan"):
        keywords.typed("here", {"rate": value}, {"rate": float | None})


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
