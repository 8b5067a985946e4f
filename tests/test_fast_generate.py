"""`fast_generate`: vLLM's names, adapters by request, against `generate`."""

import numpy as np
import pytest
import tiny_chat

from unsloth_jax import FastLanguageModel, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
QUESTIONS = [q for q, _ in tiny_chat.PAIRS[:5]]


@pytest.fixture(scope="module")
def model(folder):
    return tiny_chat.adapted(folder)


def tokens(found) -> list[list[list[int]]]:
    return [[output.token_ids for output in one.outputs] for one in found]


def answered(model, text: str) -> list[int]:
    """`generate`'s greedy answer."""
    ids = model.tokenizer(text)["input_ids"]
    out = model.generate([ids], max_new_tokens=12, do_sample=False)[0]
    return out[len(ids) :].tolist()


def test_texts_are_answered_as_generate_answers_them(model):
    found = model.fast_generate(QUESTIONS, sampling_params=GREEDY)
    assert [one.prompt for one in found] == QUESTIONS
    for question, one in zip(QUESTIONS, found, strict=True):
        assert one.prompt_token_ids == model.tokenizer(question)["input_ids"]
        (output,) = one.outputs
        want = answered(model, question)
        assert output.token_ids == want[: len(output.token_ids)]
        assert output.text == model.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        assert output.cumulative_logprob == pytest.approx(sum(output.logprobs))
        assert output.finish_reason == (
            "stop" if output.token_ids[-1] == tiny_chat.EOS else "length"
        )
    assert tokens(model.fast_generate(QUESTIONS[1], GREEDY)) == tokens(found[1:2])


def test_token_ids_and_several_completions(model):
    ids = model.tokenizer(QUESTIONS[0])["input_ids"]
    how = SamplingParams(n=3, temperature=1.3, max_tokens=5)
    forms = (ids, [ids], [{"prompt_token_ids": ids}])
    found = [model.fast_generate(form, how, seed=4) for form in forms]
    assert found[0] == found[1] == found[2]
    outputs = found[0][0].outputs
    assert [one.index for one in outputs] == [0, 1, 2] and found[0][0].prompt is None
    assert len({tuple(one.token_ids) for one in outputs}) == 3


def test_adapters_are_the_models_own_those_asked_for_or_none(model, folder, tmp_path):
    model.save_lora(str(tmp_path / "lora"))
    live = model.fast_generate(QUESTIONS, GREEDY)
    base = model.fast_generate(QUESTIONS, GREEDY, lora_request=None)
    asked = model.load_lora(str(tmp_path / "lora"))
    again = model.fast_generate(QUESTIONS, GREEDY, lora_request=asked)
    assert tokens(again) == tokens(live) != tokens(base)
    plain, _ = tiny_chat.load(folder)
    assert tokens(plain.fast_generate(QUESTIONS, GREEDY)) == tokens(base)
    again = plain.fast_generate(QUESTIONS, GREEDY, lora_request=asked)
    assert tokens(again) == tokens(live)
    assert all(np.asarray(one.outputs[0].logprobs).max() <= 0 for one in live)


def test_a_stop_string_is_left_out_of_the_text(model):
    whole = model.fast_generate(QUESTIONS[0], GREEDY)[0].outputs[0].text
    stop = whole[4:6]
    how = SamplingParams(temperature=0, max_tokens=12, stop=[stop])
    one = model.fast_generate(QUESTIONS[0], how)[0].outputs[0]
    assert one.text == whole[: whole.index(stop)]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)


@pytest.mark.parametrize(
    "prompts, more, error, message",
    [
        ([3.5], {}, ValueError, "prompt 0 must be text, token ids"),
        ("x", dict(lora_request="grpo_lora"), ValueError, "lora_request must be what load_lora"),
        ("x", dict(sampling=GREEDY), TypeError, "sampling.*sampling_params"),
        ([], {}, ValueError, "every prompt needs at least one token"),
    ],
)
def test_what_means_nothing_is_refused(model, prompts, more, error, message):
    with pytest.raises(error, match=message):
        model.fast_generate(prompts, **more)


def test_a_base_that_was_changed_is_not_asked_for_alone(folder):
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=4, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="lora_request=None asks for the base alone"):
        model.fast_generate("x", GREEDY, lora_request=None)
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        model.load_lora("nowhere")
