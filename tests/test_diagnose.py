"""A step that is not finite names the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unsloth_jax import data, layers, lora, tree
from unsloth_jax.data import Row
from workflows import diagnose

LAYERS = 3


def setting():
    pair = tiny.pair("llama")
    adapters = lora.init(jax.random.key(0), pair.params, 2)
    # Padding, whose values mean nothing, must not be blamed.
    batch = data.stacked([data.collate([[Row(tiny.draw(n, 9), [1] * 9)]], 1, 12) for n in (1, 2)])
    find = diagnose.first_bad_layer(pair.family, pair.config, 1.0)
    return pair, adapters, batch, find


def poisoned(params, path, layer, value):
    flat = tree.flatten(params)
    at = jnp.asarray(flat[path])
    flat[path] = (at.at[layer] if layer is not None else at.at[3]).set(value)
    return tree.unflatten(flat)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_first_layer_whose_output_is_not_finite_is_named(layer):
    pair, adapters, batch, find = setting()
    path = "model.layers.*.mlp.down_proj.weight"
    bad = poisoned(pair.params, path, layer, jnp.nan)
    assert (
        find(adapters, bad, batch) == f"the output of layer {layer} is the first that is not finite"
    )


def test_the_head_is_named_where_every_layer_is_finite():
    pair, adapters, batch, find = setting()
    bad = poisoned(pair.params, "lm_head.weight", None, jnp.inf)
    assert "the head's scores are not" in find(adapters, bad, batch)


def test_a_finite_step_blames_no_layer():
    pair, adapters, batch, find = setting()
    assert "each micro-batch alone is finite" in find(adapters, pair.params, batch)


def test_gradients_are_blamed_from_the_last_layer_on():
    grads = {"x": {"a": np.ones((LAYERS, 2, 4), np.float32), "b": np.ones((LAYERS, 4, 2))}}
    grads["x"]["b"][1, 0, 0] = np.inf
    grads["x"]["a"][0] = np.nan
    assert diagnose._layers_without_gradient(grads, LAYERS) == {0: "x.a", 1: "x.b"}


def test_the_search_tells_attention_how_many_documents_a_row_holds(monkeypatch):
    pair, adapters, batch, _ = setting()
    told, attend = set(), layers.kernel.attention
    seen = lambda rule, *more, **how: (told.add(rule.documents), attend(rule, *more, **how))[1]
    monkeypatch.setattr(layers.kernel, "attention", seen)
    find = diagnose.first_bad_layer(pair.family, pair.config, 1.0, documents=3)
    assert find(adapters, pair.params, batch) and told == {3}
