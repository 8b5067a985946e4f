"""Rollouts: slots that are refilled, against each completion alone and the forward pass."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
import tiny

from unsloth_jax import rollout as core
from unsloth_jax import sample
from unsloth_jax.sample import Sampling
from workflows import generate, rollout
from workflows.sampling_params import SamplingParams

NEW = 12
RAGGED = [tiny.draw(n, 1 + (7 * n) % 43) for n in range(15)] + [tiny.draw(15, 70)]
HOT = SamplingParams(temperature=1.4, max_tokens=NEW)
FAMILIES = ("gemma2", "qwen3_5_text", "mixtral", "falcon_h1", "llama4_text")


@cache
def model(name: str = "llama") -> tuple:
    """(family, config, float32 parameters)."""
    if name != "llama":
        return tiny.ours(tiny.reference(name))
    return tiny.ours(tiny.reference("llama", num_hidden_layers=2, head_dim=16))


def ask(prompts: list, settings: Any = HOT, name: str = "llama", **more: Any) -> rollout.Rollout:
    return rollout.run(*model(name), prompts, settings, **more)


def tokens(found: rollout.Rollout) -> list[list[list[int]]]:
    return [[one.tokens for one in group] for group in found.completions]


def all_of(found: rollout.Rollout) -> list[rollout.Completion]:
    return [one for group in found.completions for one in group]


def test_greedy_completions_are_those_of_generate():
    want = generate.answers(
        *model(), RAGGED, max_new_tokens=NEW, stop_ids=[7], sampling=Sampling(temperature=0.0)
    )
    found = ask(RAGGED, SamplingParams(temperature=0, max_tokens=NEW), stop_ids=[7], slots=6)
    assert tokens(found) == [[answer.tokens] for answer in want]
    assert [one.finish_reason == "stop" for one in all_of(found)] == [a.stopped for a in want]
    for one, answer in zip(all_of(found), want, strict=True):
        np.testing.assert_allclose(one.logprobs, answer.logprobs, atol=1e-5)
        assert set(one.sampled_logprobs) == {0.0}


@pytest.mark.parametrize(
    "slots, steps",
    [(5, 3), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((64, 32), (16, 1)))],
)
def test_a_completion_is_the_same_alone_in_a_batch_and_in_a_slot_that_was_used(slots, steps):
    settings = [SamplingParams(n=2, temperature=1.4, max_tokens=5 + n % 9, seed=n)
                for n in range(len(RAGGED))]  # fmt: skip
    found = ask(RAGGED, settings, slots=slots, steps=steps)
    for n in (0, 6, 15):
        alone = ask([RAGGED[n]], settings[n])
        assert tokens(alone)[0] == tokens(found)[n]
        for one, other in zip(alone.completions[0], found.completions[n], strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert [len(one) for group in tokens(found) for one in group] == [
        5 + n % 9 for n in range(len(RAGGED)) for _ in range(2)
    ]
    assert found.counts.prompt_tokens == sum(map(len, RAGGED))
    assert found.counts.tokens == sum(len(one.tokens) for one in all_of(found))


def learners(prompts: list, found: rollout.Rollout, temperature: float, name: str = "llama"):
    """Pairs of a completion and its tokens' log-probabilities by the forward pass."""
    flat = [(p, one) for p, group in zip(prompts, found.completions, strict=True) for one in group]
    rows = [p + one.tokens for p, one in flat]
    logits = tiny.logits(*model(name), *tiny.padded(rows, 96))
    whole = np.asarray(jax.nn.log_softmax(logits / temperature, axis=-1))
    for i, (prompt, one) in enumerate(flat):
        at = np.arange(len(prompt) - 1, len(rows[i]) - 1)
        yield one, whole[i, at, one.tokens]


@pytest.mark.parametrize(
    "temperature", [0.5, *(pytest.param(t, marks=pytest.mark.slow) for t in (1.0, 1.7))]
)
def test_log_probabilities_are_the_learners_at_every_temperature(temperature, figure):
    settings = SamplingParams(n=2, temperature=temperature, top_k=9, max_tokens=NEW)
    found = ask(RAGGED, settings, slots=8)
    gaps = [np.abs(one.logprobs - want) for one, want in learners(RAGGED, found, temperature)]
    figure(f"sampler and learner at {temperature}", np.concatenate(gaps).mean(), 1e-5)
    assert all(np.less_equal(one.logprobs, one.sampled_logprobs).all() for one in all_of(found))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_families_with_windows_states_and_experts_roll_out_alike(name, figure):
    settings = [SamplingParams(n=2, max_tokens=NEW, seed=n) for n in range(len(RAGGED))]
    found = ask(RAGGED, settings, name, slots=7, steps=5)
    gaps = [np.abs(one.logprobs - want) for one, want in learners(RAGGED, found, 1.0, name)]
    figure(f"sampler and learner, {name}", np.concatenate(gaps).mean(), 1e-5)
    assert tokens(ask(RAGGED[9:10], settings[9], name, steps=5))[0] == tokens(found)[9]


FILTERS = {
    "none": dict(),
    "temperature": dict(temperature=1.8),
    "top_k": dict(top_k=4),
    "top_p": dict(top_p=0.7),
    "min_p": dict(min_p=0.1),
    "all": dict(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_first_tokens_follow_the_filtered_distribution(name):
    settings = SamplingParams(n=20_000, max_tokens=1, **FILTERS[name])
    found = ask([RAGGED[3]], settings, slots=2_500)
    drawn = np.asarray([one.tokens[0] for one in found.completions[0]])
    logits = tiny.logits(*model(), *tiny.padded([RAGGED[3]], 64))[0, len(RAGGED[3]) - 1]
    kept = sample.filtered(logits[None], generate.on_device(settings.sampling))[0]
    chances = np.asarray(jax.nn.softmax(kept), np.float64)
    counts = np.bincount(drawn, minlength=len(chances))
    assert not counts[np.asarray(kept) == sample.OUT].any()
    # Tokens too rare for the test stand together.
    often = chances * len(drawn) >= 10
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(chances[often], chances[~often].sum()) * len(drawn)
    whole = expected > 0
    expected = expected[whole] * observed.sum() / expected[whole].sum()
    assert scipy.stats.chisquare(observed[whole], expected).pvalue > 1e-3
    want = np.log(chances[drawn])
    told = [one.sampled_logprobs[0] for one in found.completions[0]]
    np.testing.assert_allclose(told, want, atol=1e-5)


def test_each_prompt_has_its_own_settings():
    settings = [
        SamplingParams(temperature=0, max_tokens=NEW),
        SamplingParams(n=3, temperature=2.0, max_tokens=4),
        SamplingParams(temperature=0, repetition_penalty=1e6, max_tokens=NEW),
    ]
    prompts = [RAGGED[4], RAGGED[4], RAGGED[9]]
    found = ask(prompts, settings)
    assert found.completions[0][0].tokens == tokens(ask([RAGGED[4]], settings[0]))[0][0]
    assert len({tuple(one) for one in tokens(found)[1]}) == 3
    assert {len(one) for one in tokens(found)[1]} == {4}
    unlike = tokens(found)[2][0]
    assert len({*RAGGED[9], *unlike}) == len({*RAGGED[9]}) + NEW
    # The penalty is none of the policy's.
    gaps = [np.abs(one.logprobs - want).max() for one, want in learners(prompts, found, 1.0)]
    assert gaps[0] < 1e-5 and gaps[-1] < 1e-5


def test_stops_end_a_completion_and_say_what_ended_it():
    free = tokens(ask(RAGGED, SamplingParams(temperature=0, max_tokens=NEW)))
    end, own = free[0][0][3], free[5][0][6]
    letters = lambda ids: "".join(chr(97 + i % 26) for i in ids)
    word = letters(free[8][0])[4:7]
    settings = [SamplingParams(temperature=0, max_tokens=NEW)] * len(RAGGED)
    settings[5] = SamplingParams(
        temperature=0, max_tokens=NEW, stop_token_ids=[own], ignore_eos=True
    )
    settings[8] = SamplingParams(temperature=0, max_tokens=NEW, stop=["never that", word])
    found = ask(RAGGED, settings, stop_ids=[end], decode=letters, slots=4)
    for i, ((whole,), (one,)) in enumerate(zip(free, found.completions, strict=True)):
        stops = [own] if i == 5 else [end]
        cut = next((n + 1 for n, t in enumerate(whole) if t in stops), NEW)
        reason = whole[cut - 1] if whole[cut - 1] in stops else None
        if i == 8 and (at := letters(whole).index(word) + 3) < cut:
            cut, reason = at, word
        assert one.tokens == whole[:cut]
        assert len(one.logprobs) == len(one.sampled_logprobs) == cut
        assert one.stop_reason == reason
        assert one.finish_reason == ("length" if reason is None else "stop")
    assert found.completions[8][0].stop_reason == word


def test_seeds_repeat_and_differ():
    one, again, other = (tokens(ask(RAGGED[:4], seed=s)) for s in (1, 1, 2))
    assert one == again != other
    group = tokens(ask([RAGGED[2]], SamplingParams(n=16, temperature=1.5, max_tokens=NEW)))[0]
    assert len(set(map(tuple, group))) == 16


def test_each_token_of_a_completion_is_a_draw_of_its_own():
    """At a temperature that leaves nothing of the model, one key for all would repeat a token."""
    uniform = SamplingParams(n=40, temperature=1e6, max_tokens=NEW)
    drawn = np.asarray(tokens(ask([RAGGED[2]], uniform))[0])
    vocab = model()[1].vocab
    differ = (drawn[:, 1:] != drawn[:, :-1]).mean()
    assert differ > 1 - 10 / vocab
    # And no column of tokens repeats another's order.
    assert len({tuple(column) for column in drawn.T}) == NEW


def test_empty_slots_are_given_up_and_finished_ones_are_not_waited_for():
    settings = [SamplingParams(temperature=0, max_tokens=1 + 20 * (n == 3)) for n in range(16)]
    shapes = []
    family, c, params = model()
    run = rollout.programs(family, c)
    watched = run._replace(
        decode=lambda layers, slots, *rest, **more: (
            shapes.append(len(slots.token)) or run.decode(layers, slots, *rest, **more)
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "programs", lambda *_: watched)
        found = ask(RAGGED, settings, steps=8)
    assert shapes[0] == 16 and shapes[-1] == 1 and len(shapes) <= 5
    assert [len(one.tokens) for one in all_of(found)] == [s.max_tokens for s in settings]


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_completions_that_share_their_prompt_are_what_they_are_without(name):
    """Of more prompts than are held at once, ragged, in slots that are used again."""
    settings = [SamplingParams(n=1 + n % 3, max_tokens=3 + 5 * (n % 4)) for n in range(9)]
    prompts = [RAGGED[n % len(RAGGED)] + [n + 5] for n in range(9)]
    apart = ask(prompts, settings, name, slots=4, steps=8, share=False)
    shared = ask(prompts, settings, name, slots=4, steps=8, share=True)
    assert tokens(shared) == tokens(apart)
    for ours, theirs in zip(all_of(shared), all_of(apart), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_slots_of_a_finished_completion_ask_for_no_filter():
    """A row that ended neither sorts the vocabulary nor draws: its neighbours' settings decide."""
    family, c, params = model()
    run = rollout.programs(family, c)
    slots = core.empty(family, c, 2, 64, 1, np.float32)
    prompts = run.read(params, np.zeros((1, 64), np.int32), np.asarray([3], np.int32), np.float32)
    pair = lambda a, b: np.asarray([a, b])
    sampling = Sampling(*(pair(x, x).astype(np.float32) for x in Sampling(temperature=0.0)))
    sampling = sampling._replace(top_k=pair(0, 5).astype(np.float32))
    requests = core.Requests(
        sampling,
        np.zeros((2, 2), np.uint32),
        pair(6, 1).astype(np.int32),
        np.full((2, 1), -1, np.int32),
    )
    slots = run.place(
        slots, prompts, requests, pair(0, 0).astype(np.int32), pair(0, 1).astype(np.int32),
        np.zeros(1, np.int32),
    )  # fmt: skip
    slots, burst = run.decode(params, slots, np.int32(4), np.int32(9), steps=4)
    assert (np.asarray(burst.tokens[0]) >= 0).all()
    assert (np.asarray(burst.tokens[1]) >= 0).tolist() == [True, False, False, False]
    assert np.asarray(slots.live).tolist() == [True, False]
    assert int(slots.cache.used[1]) == 0, "it would be read for nothing"


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("n", 0, "a whole number, at least 1"),
        ("temperature", -1, "finite and at least 0"),
        ("temperature", float("nan"), "finite"),
        ("top_p", 0, r"in \(0, 1\]"),
        ("top_k", -2, "a whole number"),
        ("min_p", 1.5, r"in \[0, 1\]"),
        ("repetition_penalty", 0, "over 0"),
        ("max_tokens", 0, "at least 1"),
        ("stop", "", "not empty"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(field, value, rule):
    with pytest.raises(ValueError, match=f"^{field} must .*{rule}"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "prompts, settings, more, message",
    [
        ([], HOT, {}, "every prompt needs at least one token"),
        ([[3], []], HOT, {}, r"2 prompts, empty: \[1\]"),
        ([[3]], [HOT, HOT], {}, "2 sampling parameters for 1 prompts"),
        ([[3]], HOT, {"slots": 0}, "slots and steps must be at least 1"),
        ([[3]], SamplingParams(stop="x"), {}, "stop strings need a tokenizer"),
        ([[999]], HOT, {}, "outside 0 to 255"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(prompts, settings, more, message):
    with pytest.raises(ValueError, match=message):
        ask(prompts, settings, **more)


def test_vllms_ways_to_keep_all_tokens_and_to_name_one_stop():
    assert SamplingParams(top_k=-1).sampling == SamplingParams(top_k=0).sampling == Sampling()
    assert SamplingParams(stop="x").stops == SamplingParams(stop=["x"]).stops == ("x",)
