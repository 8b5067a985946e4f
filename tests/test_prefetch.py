"""The next batch is made while the device works on the one before."""

import jax
import jax.numpy as jnp
import tiny
from test_data import rows_of

from unsloth_jax import train
from workflows.batching import Batches
from workflows.run import Run

SIZE, TURNS = 600, 15  # a tenth of a second on a processor


@jax.jit
def slow(state: train.State, frozen, batch) -> tuple[train.State, train.Report]:
    """A step that multiplies matrices for a while and trains nothing."""
    start = jnp.full((SIZE, SIZE), 1 / SIZE) + batch.tokens.sum() * 0.0
    value = jax.lax.fori_loop(0, TURNS, lambda _, x: x @ start, start).sum() / SIZE
    done = train.State(state.trainable, state.opt, state.step + 1)
    return done, train.Report(value, value, value, jnp.isfinite(value))


class Watched(Batches):
    """Batches that note, when one is made, whether the step before it was still at work."""

    def forever(self, skip=0):
        for number, found in enumerate(super().forever(skip)):
            if number:
                noted.append(not running[-1].loss.is_ready())
            yield found


noted: list[bool] = []
running: list[train.Report] = []


def test_the_next_batch_is_made_while_the_device_works():
    def step(state, frozen, batch):
        state, report = slow(state, frozen, batch)
        running.append(report)
        return state, report

    batches = Watched(rows_of([9] * 6), 1, 1, 64, False, 0)
    state = train.State({}, (), jnp.zeros((), jnp.int32))
    run = Run(step, state, tiny.pair("llama").params, batches, lambda step: 0.0, 5)
    run()
    assert int(run.state.step) == 5 and noted == [True] * 4
