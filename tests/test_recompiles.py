"""Ragged data compiles nothing once every width has been seen."""

import jax
import numpy as np
import pytest
import tiny

from unsloth_jax import lora, optim, train
from unsloth_jax.data import Row
from workflows import objective
from workflows.batching import Batches
from workflows.run import Run

STEPS, LENGTH = 200, 128


@pytest.mark.slow
@pytest.mark.parametrize("packing, widths", [(True, 1), (False, 2)])
def test_two_hundred_steps_of_ragged_rows_compile_each_width_once(packing, widths):
    pair = tiny.pair("llama")
    rng = np.random.default_rng(0)
    rows = [
        Row(tiny.draw(n, int(size)), [1] * int(size))
        for n, size in enumerate(rng.integers(5, 120, 40))
    ]
    batches = Batches(rows, 2, 1, LENGTH, packing, seed=1)
    rate = optim.schedule("linear", 1e-3, 5, STEPS)
    rule = optim.make("adamw_8bit", rate, max_grad_norm=1.0)
    loss = objective.loss(pair.family, pair.config, 1.0, documents=batches.documents(STEPS))
    step = train.make_step(loss, rule)
    state = train.start(lora.init(jax.random.key(0), pair.params, 4), rule)
    run = Run(step, state, pair.params, batches, rate, STEPS)
    run()
    assert len(run.losses) == STEPS and step._cache_size() == widths
