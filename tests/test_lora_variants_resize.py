"""Tables with new rows for added tokens, beside transformers' resize_token_embeddings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from bridge import merge
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import tree
from unsloth_jax.lora import trained

LENGTH = 12
ROWS = [tiny.draw(71, LENGTH), tiny.draw(72, LENGTH)]
EMBEDDING = "model.embed_tokens.weight"


def scores(name: str, params) -> np.ndarray:
    pair = tiny.pair(name)
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded(ROWS, LENGTH)))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_new_tokens_lie_at_the_mean_of_the_old_and_change_no_other(name, key, tmp_path):
    pair, more = tiny.pair(name), 40
    params = trained.resize(pair.params, 256 + more, key)
    model = tiny.reference(name)
    torch.manual_seed(0)
    model.resize_token_embeddings(256 + more)
    state = model.state_dict()
    for path in (p for p in (EMBEDDING, "lm_head.weight") if p in tree.flatten(params)):
        ours, other = np.asarray(tree.flatten(params)[path]), state[path].numpy()
        assert ours.shape == other.shape == (256 + more, 64)
        np.testing.assert_array_equal(ours[:256], other[:256])
        np.testing.assert_allclose(ours[256:], other[256:], atol=5e-4 * np.abs(other[:256]).std())
        assert np.unique(ours[256:], axis=0).shape[0] == more
    c = dataclasses.replace(pair.config, vocab=256 + more)
    rows = tiny.padded(ROWS, LENGTH)
    found = np.asarray(tiny.logits(pair.family, c, params, *rows))
    np.testing.assert_allclose(found[..., :256], scores(name, pair.params), atol=1e-4)
    source = SafetensorsSource(tiny.save(pair.model, tmp_path))
    merged = merge.merged(pair.family, c, params, None, 1.0, source, "float32")
    table = next(w for w in merged.weights if w.name == EMBEDDING).read()
    np.testing.assert_array_equal(table, tree.flatten(params)[EMBEDDING])


def test_new_rows_are_spread_as_a_billionth_of_the_covariance(key):
    rng = np.random.default_rng(0)
    old = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)) * 10
    params = {"embed_tokens": {"weight": jnp.asarray(old, jnp.float32)}}
    new = np.asarray(trained.resize(params, 20300, key)["embed_tokens"]["weight"], np.float64)
    apart = (new[300:] - old.mean(0)) / 1e-9**0.5
    want = np.cov(old.T, bias=True)
    assert np.abs(np.cov(apart.T) - want).max() < 0.05 * np.abs(want).max()


def test_other_ways_to_resize(key):
    table = jnp.asarray(np.random.default_rng(0).normal(3, 1, (50, 8)), jnp.bfloat16)
    params = {"embed_tokens": {"weight": table}, "lm_head": {"weight": table, "bias": table[:, 0]}}
    fewer = trained.resize(params, 30, key)
    np.testing.assert_array_equal(fewer["lm_head"]["bias"], table[:30, 0])
    drawn = trained.resize(params, 5050, key, "normal", 0.5)
    new = np.asarray(drawn["embed_tokens"]["weight"][50:], np.float32)
    assert abs(new.std() - 0.5) < 0.01 and abs(new.mean()) < 0.01
    assert drawn["lm_head"]["weight"].dtype == jnp.bfloat16
    assert not np.asarray(drawn["lm_head"]["bias"][50:], np.float32).any()
    bias = np.asarray(trained.resize(params, 60, key)["lm_head"]["bias"][50:], np.float32)
    np.testing.assert_allclose(bias, np.asarray(table[:, 0], np.float32).mean(), rtol=2**-7)
    for count, how, message in ((0, "mean", "1 row or more"), (60, "zero", "'zero'")):
        with pytest.raises(ValueError, match=message):
            trained.resize(params, count, key, how)
    with pytest.raises(ValueError, match="no arrays to resize"):
        trained.resize({"x": table}, 60, key)
