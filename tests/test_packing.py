"""Documents that share a row leave each other alone; how rows are laid out changes no step."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from unsloth_jax import data, lora, train
from unsloth_jax.data import Row
from workflows import objective
from workflows.batching import Batches

SIZES = (21, 34, 26)
WIDTH = 96
# Full attention, windows shorter than a document, rope that depends on a document's length.
KINDS = ["llama", "mistral", "qwen2_yarn_window", "llama_dynamic", "qwen3_biased"]


def scores(name: str, documents: list[list[int]]) -> np.ndarray:
    """float32 [tokens, V] of documents that share a row."""
    b = data.collate([[Row(d, [1] * len(d)) for d in documents]], 1, WIDTH)
    pair = tiny.pair(name)
    out = tiny.logits(*pair[1:], *map(jnp.asarray, (b.tokens, b.positions, b.segments)))
    return np.asarray(out)[0, : sum(map(len, documents))]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("changed", range(3))
def test_a_changed_token_leaves_the_other_documents_scores_bitwise_as_they_were(name, changed):
    documents = [tiny.draw(n, size) for n, size in enumerate(SIZES)]
    before = scores(name, documents)
    at = 5
    documents[changed][at] = documents[changed][at] % 200 + 7
    after = scores(name, documents)
    numbers = np.repeat(np.arange(3), SIZES)
    np.testing.assert_array_equal(after[numbers != changed], before[numbers != changed])
    own = [part[numbers == changed] for part in (before, after)]
    np.testing.assert_array_equal(own[0][:at], own[1][:at])
    assert (own[0][at] != own[1][at]).any()


def ragged() -> list[Row]:
    """13 rows of different lengths and masks: three short of a step of sixteen."""
    rows = []
    for n, size in enumerate([24, 9, 17, 5, 12, 21, 7, 14, 19, 3, 30, 11, 6]):
        first = 1 + n % (size - 2)
        rows.append(Row(tiny.draw(n, size), [int(i >= first) for i in range(size)]))
    return rows


@cache
def step():
    """A step that moves each weight by its negative gradient."""
    pair = tiny.pair("llama")
    return train.make_step(objective.loss(pair.family, pair.config, 2.0), optax.sgd(1.0))


def step_of_rows(batch: int, accumulation: int, packing: bool, rows: list[Row]):
    """(gradients, loss, supervised tokens) of the one step that all rows make."""
    pair = tiny.pair("llama")
    found = Batches(rows, batch, accumulation, 40, packing, 0)
    (made,) = found.epoch(0)
    made = jax.tree.map(jnp.asarray, made)
    adapters = lora.init(jax.random.key(1), pair.params, 2, ("q_proj", "down_proj"))
    rng = np.random.default_rng(4)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)
    adapters = jax.tree.map(draw, adapters)
    state, report = step()(train.start(adapters, optax.sgd(1.0)), pair.params, made)
    grads = jax.tree.map(lambda old, new: np.asarray(old - new), adapters, state.trainable)
    return grads, float(report.loss), float(report.tokens)


@pytest.fixture(scope="module")
def whole():
    return step_of_rows(16, 1, False, ragged())


def assert_same(got, wanted, tolerance=1e-5):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted[0]))
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance * largest, rtol=0)
    jax.tree.map(close, got[0], wanted[0])
    assert abs(got[1] - wanted[1]) <= tolerance * wanted[1] and got[2] == wanted[2]


LAID_OUT = {
    "4 x 4": (4, 4, False),
    "1 x 16": (1, 16, False),
    "packed": (2, 4, True),
}


@pytest.mark.parametrize("way", LAID_OUT)
def test_accumulation_and_packing_of_ragged_rows_give_the_same_step(whole, way):
    assert whole[2] == sum(sum(row.mask) for row in ragged())
    assert_same(step_of_rows(*LAID_OUT[way], ragged()), whole)


def test_a_row_more_or_less_is_another_step(whole):
    with pytest.raises(AssertionError):
        assert_same(step_of_rows(4, 4, False, ragged()[:-1]), whole)
