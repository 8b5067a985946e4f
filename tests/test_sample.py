"""Sampling: filters against transformers' own, and a generation against itself in other shapes."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import scipy.stats
import tiny
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unsloth_jax import sample
from unsloth_jax.sample import Sampling
from workflows import generate

filtered, drawn = jax.jit(sample.filtered), jax.jit(sample.draw)
on_device = generate.on_device
GREEDY = Sampling(temperature=0.0)
NEW = 16
# The last, beyond the first bucket of lengths, gives all others more padding than they have alone.
RAGGED = [tiny.draw(n, 1 + (7 * n) % 43) for n in range(15)] + [tiny.draw(15, 70)]
FILTERS = {
    "temperature": dict(temperature=0.7),
    "hot": dict(temperature=2.5),
    "a whole number": dict(temperature=2),
    "top_k": dict(top_k=5),
    "one": dict(top_k=1),
    "top_k beyond the vocabulary": dict(top_k=1000),
    "top_p": dict(top_p=0.6),
    "hardly any top_p": dict(top_p=1e-6),
    "min_p": dict(min_p=0.2),
    "min_p of all": dict(min_p=1.0),
    "penalty": dict(repetition_penalty=1.8),
    "reward": dict(repetition_penalty=0.6),
    "top_k, top_p": dict(top_k=12, top_p=0.7),
    "top_p, min_p": dict(top_p=0.9, min_p=0.1),
    "all": dict(repetition_penalty=1.3, temperature=1.7, top_k=20, top_p=0.85, min_p=0.05),
}
INVALID = {
    "temperature": [-0.1, float("nan")],
    "top_k": [-1, 2.5],
    "top_p": [0.0, 1.1, float("nan")],
    "min_p": [-0.1, 1.5],
    "repetition_penalty": [0.0, -1.0],
}


@cache
def model() -> tuple:
    """(family, config, float32 parameters) of a llama of 2 layers, 64 wide."""
    return tiny.ours(tiny.reference("llama", num_hidden_layers=2, head_dim=16))


def ask(prompts: list, **settings: Any) -> list[generate.Answer]:
    """Answers of NEW tokens, greedy and without an end unless `settings` say otherwise."""
    plain = dict(max_new_tokens=NEW, stop_ids=[], sampling=GREEDY)
    return generate.answers(*model(), prompts, **(plain | settings))


def pieces(prompts: list, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of all pieces, [B, n]."""
    plain = dict(max_new_tokens=NEW, stop_ids=[], sampling=GREEDY)
    found = list(generate.stream(*model(), prompts, **(plain | settings)))
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))


def scores_and_seen(decimals: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 scores [8, 60], rounded so that few decimals make ties, and token ids [8, 6]."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 3, (8, 60)).round(decimals).astype(np.float32)
    return scores, rng.integers(0, 60, (8, 6))


def theirs(scores: np.ndarray, ids: np.ndarray, s: Sampling) -> np.ndarray:
    """transformers' scores after its processors, in the order in which `generate` applies them."""
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))])
    chain.append(TemperatureLogitsWarper(float(s.temperature)))
    if s.top_k:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        chain.append(MinPLogitsWarper(s.min_p))
    return chain(torch.tensor(ids), torch.tensor(scores)).numpy()


def ours(scores: np.ndarray, ids: np.ndarray, s: Sampling) -> np.ndarray:
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    s = on_device(s)
    penalized = sample.penalize(jnp.asarray(scores), jnp.asarray(seen), s.repetition_penalty)
    return np.asarray(filtered(penalized, s))


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
def test_filters_equal_transformers(settings):
    s = Sampling(**settings)
    scores, ids = scores_and_seen(6)
    want, got = theirs(scores, ids, s), ours(scores, ids, s)
    np.testing.assert_array_equal(got > sample.OUT, np.isfinite(want))
    chances = np.asarray(jax.nn.softmax(got, axis=-1))
    np.testing.assert_allclose(chances, torch.tensor(want).softmax(-1).numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["top_k", "one", "min_p", "min_p of all", "penalty"])
def test_filters_keep_the_ties_that_transformers_keeps(name):
    s = Sampling(**FILTERS[name])
    scores, ids = scores_and_seen(0)
    want, got = theirs(scores, ids, s), ours(scores, ids, s)
    assert name == "penalty" or (np.isfinite(want).sum(-1) > (s.top_k or 1)).any()
    np.testing.assert_array_equal(got > sample.OUT, np.isfinite(want))


def test_top_p_keeps_all_tokens_as_likely_as_the_last_kept():
    s = Sampling(top_p=0.8)
    scores, ids = scores_and_seen(0)
    want, got = np.isfinite(theirs(scores, ids, s)), ours(scores, ids, s) > sample.OUT
    least = np.where(want, scores, np.inf).min(-1, keepdims=True)
    np.testing.assert_array_equal(got, scores >= least)
    assert (got & ~want).any()


@pytest.mark.parametrize("top_p, kept", [(0.49, 1), (0.51, 2), (0.74, 2), (0.76, 4), (0.99, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    scores = jnp.log(jnp.asarray([[0.125, 0.5, 0.125, 0.25]]))
    got = np.asarray(filtered(scores, on_device(Sampling(top_p=top_p))))
    assert (got > sample.OUT).sum() == kept


def test_the_defaults_drop_no_token_however_unlikely():
    scores = jnp.asarray([[40.0, *[0.0] * 5000, -60.0]])
    got = filtered(scores, on_device(Sampling()))
    np.testing.assert_array_equal(got, scores)


def draw(seed: int, scores: Any, seen: Any, s: Sampling) -> sample.Drawn:
    return drawn(jax.random.split(jax.random.key(seed), len(scores)), scores, seen, on_device(s))


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_draw_tells_its_chance_before_and_after_penalty_and_filters(temperature):
    s = Sampling(temperature, top_k=3, top_p=0.5, repetition_penalty=1.5)
    scores, ids = scores_and_seen(6)
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    found = draw(5, jnp.asarray(scores), jnp.asarray(seen), s)
    at = lambda scores: np.take_along_axis(
        torch.tensor(scores).log_softmax(-1).numpy(), np.asarray(found.token)[:, None], axis=1
    )[:, 0]
    np.testing.assert_allclose(found.logprob, at(scores / (temperature or 1.0)), atol=2e-6)
    if temperature == 0:
        penalized = theirs(scores, ids, Sampling(repetition_penalty=1.5))
        np.testing.assert_array_equal(found.token, penalized.argmax(-1))
        assert not found.sampled_logprob.any()
    else:
        np.testing.assert_allclose(found.sampled_logprob, at(theirs(scores, ids, s)), atol=2e-6)
        assert np.abs(found.sampled_logprob - found.logprob).max() > 0.1


def test_each_row_is_drawn_by_its_own_settings_and_key():
    scores, ids = scores_and_seen(6)
    seen = np.zeros(scores.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    rows = [Sampling(), GREEDY, *(Sampling(**FILTERS[n]) for n in ("hot", "top_k", "top_p", "all"))]
    rows += [Sampling(**FILTERS["penalty"]), Sampling(**FILTERS["min_p"])]
    mixed = Sampling(*(jnp.asarray(x, jnp.float32) for x in zip(*rows, strict=True)))
    keys = jax.random.split(jax.random.key(2), len(rows))
    together = drawn(keys, jnp.asarray(scores), jnp.asarray(seen), mixed)
    for n, s in enumerate(rows):
        one = slice(n, n + 1)
        alone = drawn(keys[one], jnp.asarray(scores[one]), jnp.asarray(seen[one]), on_device(s))
        assert alone.token[0] == together.token[n]
        for field in ("logprob", "sampled_logprob"):
            assert abs(getattr(alone, field)[0] - getattr(together, field)[n]) < 1e-6


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(), [0, 1, 2, 3, 4]),
        (dict(temperature=2.0), [0, 1, 2, 3, 4]),
        (dict(top_k=3), [0, 2, 4]),
        (dict(min_p=0.3), [0, 2, 4]),
    ],
)
def test_draws_follow_the_filtered_distribution(settings, kept):
    chances = np.asarray([0.35, 0.08, 0.25, 0.02, 0.3])
    scores = jnp.broadcast_to(jnp.log(jnp.asarray(chances, jnp.float32)), (4000, 5))
    token, *_ = draw(0, scores, jnp.zeros(scores.shape, bool), Sampling(**settings))
    counts = np.bincount(np.asarray(token), minlength=5)
    want = chances[kept] ** (1 / settings.get("temperature", 1.0))
    assert counts[kept].sum() == 4000
    assert scipy.stats.chisquare(counts[kept], 4000 * want / want.sum()).pvalue > 1e-3


def test_a_ragged_batch_answers_as_each_prompt_alone():
    together = ask(RAGGED)
    for prompt, answer in zip(RAGGED, together, strict=True):
        alone = ask([prompt])[0]
        assert answer.tokens == alone.tokens
        np.testing.assert_allclose(answer.logprobs, alone.logprobs, atol=1e-5)
    assert len({tuple(a.tokens) for a in together}) > 8


@pytest.mark.parametrize("s", [GREEDY, Sampling(1.3, top_k=9, top_p=0.9)], ids=["greedy", "drawn"])
def test_log_probabilities_equal_those_of_the_forward_pass(s):
    found = ask(RAGGED, sampling=s)
    rows = [p + a.tokens for p, a in zip(RAGGED, found, strict=True)]
    logits = tiny.logits(*model(), *tiny.padded(rows, 96))
    whole = np.asarray(jax.nn.log_softmax(logits / (s.temperature or 1.0), axis=-1))
    for i, (prompt, answer) in enumerate(zip(RAGGED, found, strict=True)):
        at = np.arange(len(prompt) - 1, len(rows[i]) - 1)
        np.testing.assert_allclose(answer.logprobs, whole[i, at, answer.tokens], atol=2e-5)
        if s is GREEDY:
            np.testing.assert_array_equal(answer.tokens, whole[i, at].argmax(-1))


def test_a_stop_token_ends_its_row_and_no_other():
    free = ask(RAGGED)
    stops = [free[0].tokens[3], free[5].tokens[6]]
    tokens, logprobs = pieces(RAGGED, stop_ids=stops)
    ended = ask(RAGGED, stop_ids=stops)
    for i, (all_of_it, answer) in enumerate(zip(free, ended, strict=True)):
        at = [n for n, token in enumerate(all_of_it.tokens) if token in stops]
        end = at[0] + 1 if at else NEW
        assert answer.tokens == all_of_it.tokens[:end]
        assert answer.stopped == bool(at)
        assert (tokens[i, end:] == -1).all() and (logprobs[i, end:] == 0).all()
    assert {a.stopped for a in ended} == {True, False}


@pytest.mark.parametrize("limit, steps", [(5, 5), (64, 9)], ids=["limit", "stop"])
def test_the_loop_runs_no_longer_than_it_must(limit, steps):
    prompt = RAGGED[3]
    family, c, params = model()
    answer = ask([prompt])[0].tokens
    steps = answer.index(answer[steps - 1]) + 1 if limit == 64 else steps
    run, knobs = generate.programs(family, c), on_device(GREEDY)
    tokens = jnp.zeros((1, 64), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
    lengths = jnp.asarray([len(prompt)])
    draft = run.prefill(
        params, tokens, lengths, knobs, jax.random.key(0), slots=64, dtype=jnp.float32
    )
    keys = [draft.key]
    for _ in range(64):
        keys.append(jax.random.split(keys[-1])[1])
    keys = [jax.random.key_data(key).tolist() for key in keys]
    stop = jnp.asarray([answer[8] if limit == 64 else -2], jnp.int32)
    draft, new, _ = run.decode(params, draft, stop, knobs, jnp.int32(limit), steps=64)
    # One key is split off at each step, so the last key counts the steps.
    assert keys.index(jax.random.key_data(draft.key).tolist()) == steps
    np.testing.assert_array_equal(new[0, :steps], answer[:steps])
    assert (new[0, steps:] == -1).all()


def letters(tokens: list[int]) -> str:
    return "".join(chr(97 + token % 26) for token in tokens)


@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_ends_a_row_with_the_token_that_completes_it(length):
    free = ask(RAGGED[:1], max_new_tokens=40)[0]
    stop = letters(free.tokens)[20 - length : 20]
    end = letters(free.tokens).index(stop) + length
    seen = []
    answer = ask(
        RAGGED[:1],
        max_new_tokens=40,
        stop_strings=["never that", stop],
        decode=letters,
        watch=lambda piece: seen.extend(piece[0].tolist()),
    )[0]
    assert answer.tokens == free.tokens[:end] and answer.stopped
    assert answer.logprobs == free.logprobs[:end]
    assert [token for token in seen if token >= 0] == answer.tokens


def test_stop_strings_need_something_to_decode_with():
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        ask(RAGGED[:1], stop_strings=["x"])


@pytest.mark.parametrize("s", [GREEDY, Sampling(temperature=1.5)], ids=["greedy", "drawn"])
def test_short_pieces_join_to_the_whole_answer(s):
    whole = pieces(RAGGED[1:2], sampling=s, seed=3, max_new_tokens=21)
    cut = pieces(RAGGED[1:2], sampling=s, seed=3, max_new_tokens=21, burst=generate.BURST)
    assert whole[0].shape == (1, 21) and generate.BURST < 21
    np.testing.assert_array_equal(whole[0], cut[0])
    np.testing.assert_array_equal(whole[1], cut[1])


def test_only_a_filter_sorts_the_vocabulary():
    scores = jnp.zeros((2, 7000))
    closed = jax.make_jaxpr(sample.draw)(
        jax.random.split(jax.random.key(0), 2), scores, scores > 0, on_device(Sampling())
    )
    made = lambda jaxpr: {eqn.primitive.name for eqn in programs.equations(jaxpr)}
    (choice,) = [e for e in programs.equations(closed.jaxpr) if e.primitive.name == "cond"]
    greedy, plain, penalized, filters = (made(branch.jaxpr) for branch in choice.params["branches"])
    assert "sort" in filters and "sort" not in greedy | plain | penalized
    assert "sort" not in {eqn.primitive.name for eqn in closed.jaxpr.eqns}


def test_a_seed_repeats_its_answer_and_another_gives_another():
    hot = dict(sampling=Sampling(temperature=1.5))
    same = [RAGGED[3]] * 16
    first, again, other = (ask(same, seed=seed, **hot) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(a.tokens) for a in first}) == 16


def test_the_repetition_penalty_acts_on_prompt_and_answer():
    prompt = tiny.draw(4, 30)
    answer = ask([prompt], sampling=Sampling(temperature=0.0, repetition_penalty=1e6))[0].tokens
    assert len({*prompt, *answer}) == len({*prompt}) + NEW
    free = ask([prompt])[0].tokens
    assert len({*prompt, *free}) < len({*prompt}) + NEW


def test_only_a_new_bucket_of_lengths_compiles_anything():
    family, c, params = model()
    mine = dataclasses.replace(c, eps=c.eps * 2)
    run = generate.programs(family, mine)
    compiled = lambda: (run.prefill._cache_size(), run.decode._cache_size())

    def go(length: int, **settings):
        settings = dict(stop_ids=[], max_new_tokens=4) | settings
        generate.answers(family, mine, params, [tiny.draw(0, length)], **settings)

    go(5)
    assert compiled() == (1, 1)
    for settings in FILTERS.values():
        go(60, sampling=Sampling(**settings), seed=7)
    go(9, sampling=GREEDY, stop_ids=[5], max_new_tokens=40)
    assert compiled() == (1, 1)
    go(61)
    assert compiled() == (2, 2)
    go(64)
    assert compiled() == (2, 2)


@pytest.mark.parametrize("name, value", [(n, v) for n, values in INVALID.items() for v in values])
def test_a_setting_that_means_nothing_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}"):
        ask(RAGGED[:1], sampling=Sampling(**{name: value}))


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "every prompt needs at least one token; 0 prompts"),
        ([[3], []], {}, r"2 prompts, empty: \[1\]"),
        ([[3], [256]], {}, r"prompts \[1\] hold token ids outside 0 to 255"),
        ([[3], [-1]], {}, r"prompts \[1\] hold token ids outside 0 to 255"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_a_prompt_or_length_that_means_nothing_is_refused(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(prompts, **settings)
