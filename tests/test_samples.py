"""Samples during a run: the model's own greedy answers, and a run that does not notice them."""

import json

import jax
import pytest
import tiny_chat

from bridge import tokenizer as text
from unsloth_jax import SFTConfig, SFTTrainer
from workflows import samples
from workflows.objective import hosted

SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip
PROMPTS = [[{"role": "user", "content": "What is the capital of France?"}], "one two three"]
ASKED = dict(sample_prompts=PROMPTS, sample_max_new_tokens=6)


def trainer(model, held_out=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, eval_dataset=held_out,
        args=SFTConfig(**(SAME | changes)),
    )  # fmt: skip


def drawn(run) -> dict[int, list[dict]]:
    return {row["step"]: row["samples"] for row in run.log_history if "samples" in row}


def test_samples_are_the_models_greedy_answers_and_change_nothing(fresh, tmp_path, capsys):
    start = fresh.adapters
    plain = trainer(fresh, max_steps=4)
    plain.train()
    fresh.adapters = start
    run = trainer(fresh, max_steps=4, sample_steps=2, output_dir=str(tmp_path), **ASKED)
    run.train()
    losses = lambda r: [row["loss"] for row in r.log_history if "loss" in row]
    assert losses(run) == losses(plain)
    found = drawn(run)
    assert sorted(found) == [2, 4]
    assert [s["prompt"] for s in found[4]] == ["What is the capital of France?", "one two three"]
    for sample, prompt in zip(found[4], PROMPTS, strict=True):
        ids = text.ids(fresh.tokenizer, prompt, add_generation_prompt=not isinstance(prompt, str))
        out = fresh.generate([ids], max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
        ends = [i for i, token in enumerate(out) if token in fresh.stop_ids()]
        assert sample["completion"] == fresh.tokenizer.decode(out[: ends[0]] if ends else out)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert lines == run.log_history
    assert f"'one two three' -> {found[4][1]['completion']!r}" in capsys.readouterr().out


def test_drawing_again_compiles_nothing_and_keeps_no_array(fresh):
    draw = samples.sampler(fresh, PROMPTS, 6)
    first, held = draw(), len(jax.live_arrays())
    compiled = []
    listen = lambda name, seconds, **more: compiled.append(name) if "compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(5):
        assert draw() == first
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == [] and len(jax.live_arrays()) <= held


@pytest.mark.parametrize(
    "given, total, every",
    [((None, None), 30, 3), ((None, 5), 30, 5), ((2, 5), 30, 2), ((0.5, None), 30, 15)],
)
def test_samples_come_with_the_evaluations_unless_a_number_is_given(given, total, every):
    assert samples.interval(*given, total) == every


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([""], ValueError, r"sample_prompts\[0\] is empty"),
        (["one", 5], TypeError, r"sample_prompts\[1\] must be a text or a list of messages"),
        ([[{"role": "user"}]], TypeError, r"sample_prompts\[0\] must be"),
        ("one", TypeError, "sample_prompts must be"),
    ],
)
def test_what_cannot_be_a_prompt_is_named(prompts, error, message):
    with pytest.raises(error, match=message):
        SFTConfig(sample_prompts=prompts)


def test_a_prompt_without_room_for_an_answer_is_named(fresh):
    run = trainer(fresh, max_steps=1, sample_prompts=["one", "two " * 200])
    with pytest.raises(ValueError, match=r"sample_prompts\[1\] has \d+ tokens, expected 1 to 64"):
        run.train()


def test_a_table_in_host_memory_is_on_the_device_for_the_answers_alone(fresh):
    draw = samples.sampler(fresh, PROMPTS, 6)
    expected, held = draw(), fresh.params
    fresh.params = hosted(held)
    kept = fresh.params
    assert kept is not held and draw() == expected and fresh.params is kept
    fresh.params = held
