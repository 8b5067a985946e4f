"""The host's side of a generation: caches that grow, and the ways to read the weights."""

from functools import cache

import adapted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from unsloth_jax import lora, quant, sample
from unsloth_jax.sample import Sampling
from unsloth_jax.unstack import Unstacked
from workflows import generate

GREEDY = Sampling(temperature=0.0)
PROMPTS = [tiny.draw(n, 1 + 7 * n) for n in range(4)]


@cache
def model() -> tuple:
    """(family, config, parameters in 4 bits with adapters that count) of a llama of 2 layers."""
    family, c, params = tiny.ours(tiny.reference("llama", num_hidden_layers=2, head_dim=16))
    params = quant.quantize(params, "nf4", lambda path: path.endswith("_proj.weight"))
    settings = adapted.LORA["llama"]
    adapters = adapted.drawn(params, settings)
    return family, c, lora.attach(params, adapters, adapted.scale(settings))


def test_a_cache_that_grows_gives_the_same_answer(monkeypatch):
    settings = dict(max_new_tokens=150, stop_ids=[], seed=4, sampling=Sampling(1.5))
    pieces = lambda: list(generate.stream(*model(), PROMPTS, **settings))
    (whole,) = pieces()
    monkeypatch.setattr(generate, "ROOM", 30)
    cut = pieces()
    # Prompts of up to 22 tokens: caches of 64, 128 and 256 slots, 64 tokens a dispatch at most.
    assert [tokens.shape[1] for tokens, _ in cut] == [42, 64, 44]
    tokens, logprobs = (np.concatenate(found, axis=1) for found in zip(*cut, strict=True))
    np.testing.assert_array_equal(tokens, whole[0])
    np.testing.assert_allclose(logprobs, whole[1], atol=1e-5)


def test_buckets_are_powers_of_two_times_a_step():
    assert [generate.bucket(n) for n in (1, 64, 65, 129, 256, 1000)] == [
        64,
        64,
        128,
        256,
        256,
        1024,
    ]


def test_a_roomier_cache_frees_the_one_before():
    family, c, params = model()
    run, knobs = generate.programs(family, c), generate.on_device(GREEDY)
    tokens, lengths, key = jnp.ones((2, 64), jnp.int32), jnp.asarray([5, 9]), jax.random.key(0)
    first = lambda slots: run.prefill(params, tokens, lengths, knobs, key, slots, jnp.float32)
    draft = first(64)
    before = [np.asarray(x) for x in draft.cache.keys]
    wide = sample.roomier(draft, 128)
    assert wide.cache.slots == 128 and all(x.is_deleted() for x in draft.cache.values)
    for new, old in zip(wide.cache.keys, before, strict=True):
        np.testing.assert_array_equal(new[:, :, :64], old)
        assert not np.asarray(new[:, :, 64:]).any()
    with pytest.raises(ValueError, match="64 tokens do not fit in a cache of 63"):
        first(63)


@pytest.mark.parametrize("s", [GREEDY, Sampling(1.3)], ids=["greedy", "drawn"])
def test_every_way_to_read_the_weights_gives_the_same_answers(s):
    settings = dict(stop_ids=[], max_new_tokens=16, sampling=s)
    found = [
        generate.answers(*model(), PROMPTS, weights=weights, **settings)
        for weights in generate.WEIGHTS
    ]
    for answers in found[1:]:
        for ours, theirs in zip(answers, found[0], strict=True):
            assert ours.tokens == theirs.tokens
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_weights_stay_stored_where_plain_ones_do_not_fit_and_it_is_said(capsys):
    family, c, params = model()
    read = lambda weights, growth: generate.readable(family, c, params, weights, growth)
    assert isinstance(read("auto", 0), Unstacked)
    assert capsys.readouterr().out == ""
    assert read("auto", 2**60) is read("stored", 0) is params
    said = capsys.readouterr().out
    assert "decoding reads the weights as they are stored, which is slower" in said
    assert isinstance(read("materialized", 2**60), Unstacked)
    with pytest.raises(ValueError, match="weights must be one of .*'stored'.*, got 'fp8'"):
        generate.answers(*model(), PROMPTS, stop_ids=[], max_new_tokens=2, weights="fp8")


# Fewer rows times experts of a token than experts, so that only the experts in use are read.
MIXTURES = (
    "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "qwen3_next", "gpt_oss", "llama4_text"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_one_row_of_a_mixture_is_continued_as_in_transformers_from_all_weights(name):
    pair, row = tiny.pair(name), tiny.draw(71, 9)
    assert pair.config.chosen < pair.config.experts
    with torch.no_grad():
        want = pair.model.generate(
            torch.tensor([row]), max_new_tokens=5, min_new_tokens=5, do_sample=False
        )[0, 9:].tolist()
    settings = dict(stop_ids=[1, 2], max_new_tokens=5, sampling=GREEDY)
    for weights in generate.WEIGHTS:
        answers = generate.answers(*pair[1:], [row], weights=weights, **settings)
        assert answers[0].tokens == want, weights
