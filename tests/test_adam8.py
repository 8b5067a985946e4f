"""Adam with 8-bit moments against bitsandbytes: its maps, its codes, twenty of its steps.

bitsandbytes' CUDA kernel takes the nearest code and keeps the first moment's sign, which
`nearest` writes out. Its CPU kernel, which runs here, looks codes up in 65,536 equal cells of
[-1, 1], so its code is the nearest of some value up to half a cell away.
"""

from functools import cache, partial

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from bridge.checkpoint import Checkpoints
from pallas_kernels import adam8_update
from pallas_kernels.adam8_update import Moment
from unsloth_jax import adam8, data, lora, optim, train
from unsloth_jax.dims import Batch, Total
from workflows import objective

MAPS = {True: adam8_update.SIGNED, False: adam8_update.UNSIGNED}
VALUES = {
    signed: bitsandbytes.functional.create_dynamic_map(signed=signed).numpy() for signed in MAPS
}
HALF_CELL = 0.51 * 2 / 65535
B1, B2, RATE, DECAY = 0.9, 0.999, 1e-3, 0.5
# 24 whole blocks; 27 blocks and a short one; too few elements for 8 bits.
SHAPES = {"whole": (3, 16, 128), "short": (70, 100), "small": (45, 91)}
DEQUANTIZE, QUANTIZE = (
    {signed: jax.jit(partial(f, table=table)) for signed, table in MAPS.items()}
    for f in (adam8_update.dequantize, adam8_update.quantize)
)


def bounds(values: np.ndarray) -> np.ndarray:
    """Midpoints of neighbouring values, in float64."""
    wide = values.astype(np.float64)
    return (wide[:-1] + wide[1:]) / 2


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Codes of the nearest values; what is negative does not become zero."""
    codes = np.searchsorted(bounds(values), x)
    return np.where((x < 0) & (values[codes] == 0), codes - 1, codes)


def assert_nearest(codes, x, values):
    """Every code is the nearest of its x, or x lies within float32's rounding of a midpoint."""
    at = codes != nearest(x, values)
    gap = np.abs(bounds(values)[:, None] - x[at][None]).min(0, initial=1.0)
    assert (gap <= 1e-6 * np.abs(x[at])).all() and at.mean() < 1e-3


def drawn(signed: bool) -> np.ndarray:
    """float32 [200, 256]: nine decades, blocks of every scale, zeros; block 7 is all zeros."""
    rng = np.random.default_rng(0)
    x = 10.0 ** rng.uniform(-9, 0, (200, 256)) * 10.0 ** rng.uniform(-12, 3, (200, 1))
    x *= rng.choice([-1, 1], x.shape) if signed else 1
    x[:, :5], x[7] = 0, 0
    return x.astype(np.float32)


@pytest.mark.parametrize("signed", MAPS)
def test_codes_stand_for_the_values_of_bitsandbytes_map(signed):
    codes = jnp.arange(256, dtype=jnp.uint8)[None]
    got = DEQUANTIZE[signed](Moment(codes, jnp.ones(1)))[0]
    np.testing.assert_allclose(got, VALUES[signed], rtol=5e-7)
    assert got[MAPS[signed].zero] == 0 and got[255] == 1
    np.testing.assert_array_equal(QUANTIZE[signed](jnp.asarray(VALUES[signed])[None]).codes, codes)


@pytest.mark.parametrize("signed", MAPS)
def test_codes_are_the_nearest_over_all_decades(signed):
    x, values = drawn(signed), VALUES[signed]
    got = QUANTIZE[signed](jnp.asarray(x))
    np.testing.assert_array_equal(got.absmax, np.abs(x).max(1))
    scaled = x.astype(np.float64) / np.where(x.any(1), np.abs(x).max(1), 1)[:, None]
    assert_nearest(np.asarray(got.codes), scaled, values)
    assert (DEQUANTIZE[signed](got)[7] == 0).all()
    assert len(np.unique(got.codes)) == 256


def gradient(step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of other scales, other ones each step, and zeros."""
    rng = np.random.default_rng(step)
    scale = 10.0 ** rng.uniform(-4, 0, (shape[0],) + (1,) * (len(shape) - 1))
    return (rng.normal(0, 1, shape) * scale * (rng.random(shape) > 0.1)).astype(np.float32)


def spread(absmax: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every element's own maximum."""
    return np.repeat(np.asarray(absmax, np.float64), 256)[: np.prod(shape)].reshape(shape)


def decoded(moment: Moment, signed: bool) -> np.ndarray:
    codes = np.asarray(moment.codes)
    return VALUES[signed][codes] * spread(moment.absmax, codes.shape)


def assert_same_codes(ours: Moment, theirs: Moment, exact: np.ndarray, signed: bool):
    """Ours are the nearest of the exact moment, theirs of one at most half a cell away."""
    np.testing.assert_allclose(ours.absmax, theirs.absmax, rtol=1e-6)
    starts = range(0, exact.size, 256)
    maxima = np.maximum.reduceat(np.abs(exact).reshape(-1), starts)
    x, mids = exact / spread(maxima, exact.shape), bounds(VALUES[signed])
    assert_nearest(np.asarray(ours.codes), x, VALUES[signed])
    assert (np.searchsorted(mids, x - HALF_CELL) <= theirs.codes).all()
    assert (np.searchsorted(mids, x + HALF_CELL) >= theirs.codes).all()
    assert (np.asarray(ours.codes) == theirs.codes).mean() > 0.5


@pytest.mark.parametrize("case", SHAPES)
def test_twenty_steps_are_those_of_bitsandbytes(case):
    """Each step starts from bitsandbytes' moments; the weights have the size of an update."""
    shape, fields = SHAPES[case], dict(weight_decay=DECAY, eps=1e-6)
    weights = np.random.default_rng(99).normal(0, RATE, shape).astype(np.float32)
    leaf = torch.tensor(weights.copy(), requires_grad=True)
    theirs = bitsandbytes.optim.AdamW8bit([leaf], lr=RATE, betas=(B1, B2), **fields)
    ours = optim.make("adamw_8bit", lambda n: RATE, b1=B1, b2=B2, **fields)
    update, state = jax.jit(ours.update), ours.init(weights)
    for step in range(20):
        g, before = gradient(step, shape), leaf.detach().numpy().copy()
        leaf.grad = torch.tensor(g)
        theirs.step()
        old = state[0]
        updates, state = update(g, state, before)
        after = leaf.detach().numpy()
        np.testing.assert_allclose(updates, after - before, rtol=1e-6, atol=2e-6 * RATE)
        kept = theirs.state[leaf]
        if case == "small":
            np.testing.assert_allclose(state[0].mu, kept["state1"], rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(state[0].nu, kept["state2"], rtol=1e-6, atol=1e-12)
            continue
        mu, nu = (
            Moment(kept[f"state{i}"].numpy().copy(), kept[f"absmax{i}"].numpy().copy())
            for i in (1, 2)
        )
        m = B1 * decoded(old.mu, True) + (1 - B1) * g.astype(np.float64)
        v = B2 * decoded(old.nu, False) + (1 - B2) * g.astype(np.float64) ** 2
        assert_same_codes(state[0].mu, mu, m, True)
        assert_same_codes(state[0].nu, nu, v, False)
        state = (state[0]._replace(mu=mu, nu=nu), *state[1:])


LLAMA_8B = {  # adapter shapes of rank 16: a [layers, r, in], b [layers, out, r]
    f"{name}_{side}": (32, 16, sizes[0]) if side == "a" else (32, sizes[1], 16)
    for name, sizes in {
        "q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
        "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096),
    }.items()
    for side in "ab"
}  # fmt: skip


def adapters_8b():
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LLAMA_8B.items()}


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_moments_take_a_quarter_of_float32s():
    sizes = {
        name: bytes_of(jax.eval_shape(optim.make(name, lambda n: RATE).init, adapters_8b()))
        for name in optim.OPTIMIZERS
    }
    assert bytes_of(adapters_8b()) == 4 * 41_943_040
    assert 0.25 < sizes["adamw_8bit"] / sizes["adamw_torch"] < 0.255


def total(trainable, frozen, batch) -> Total:
    """A loss whose gradient is each weight less a number of the batch."""
    target = batch.weights.sum()
    value = sum(0.5 * ((w - target) ** 2).sum() for w in trainable.values())
    return Total(value, jnp.ones(()))


def batch(value: float) -> Batch:
    whole = jnp.zeros((1, 1, 1), jnp.int32)
    return Batch(whole, whole, jnp.full((1, 1, 1), value), whole, whole)


@cache
def toy():
    """(step, optimizer) with clipping, a schedule and decay."""
    rate = optim.schedule("linear", 1e-2, 2, 8)
    optimizer = optim.make("adamw_8bit", rate, weight_decay=0.1, max_grad_norm=1.0)
    return train.make_step(total, optimizer), optimizer


def toy_weights():
    rng = np.random.default_rng(3)
    return {k: rng.normal(0, 1, shape).astype(np.float32) for k, shape in SHAPES.items()}


def toy_run(state: train.State, steps: range) -> train.State:
    for n in steps:
        state, report = toy()[0](state, {}, batch(np.sin(n)))
        assert bool(report.finite)
    return state


def assert_bitwise(one, other):
    for (path, x), (_, y) in zip(*map(jax.tree.leaves_with_path, (one, other)), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_a_resumed_run_equals_a_whole_one_bitwise(tmp_path):
    whole = toy_run(train.start(toy_weights(), toy()[1]), range(6))
    half = toy_run(train.start(toy_weights(), toy()[1]), range(3))
    folder = Checkpoints(tmp_path)
    folder.save(3, half, {})
    restored = folder.restore(train.start(toy_weights(), toy()[1])).state
    folder.close()
    assert_bitwise(toy_run(restored, range(3, 6)), whole)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole.opt)} == {"uint8", "float32", "int32"}


def test_a_step_that_is_not_finite_keeps_the_moments():
    state = toy_run(train.start(toy_weights(), toy()[1]), range(2))
    before = jax.tree.map(np.array, state)
    after, report = toy()[0](state, {}, batch(np.nan))
    assert not bool(report.finite)
    assert_bitwise(after, before)


def test_a_step_is_given_the_state_to_write_into():
    state = train.start(toy_weights(), toy()[1])
    memory = toy()[0].lower(state, {}, batch(0.0)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of(state)


STEPS, RANK = 60, 32
LENGTHS = [24, 9, 17, 13]


def lines(n: int) -> Batch:
    """Two of four rows in turn, on the device, as one micro-batch."""
    rows = [
        data.Row(tiny.draw(i, LENGTHS[i]), [0, *[1] * (LENGTHS[i] - 1)])
        for i in (2 * (n % 2), 2 * (n % 2) + 1)
    ]
    return jax.tree.map(lambda x: jnp.asarray(x)[None], data.collate([[r] for r in rows], 2, 24))


def losses(name: str) -> np.ndarray:
    """Losses of training adapters of a tiny llama, none of whose leaves is small."""
    pair = tiny.pair("llama")
    adapters = lora.init(jax.random.key(1), pair.params, RANK, lora.TARGETS)
    assert min(leaf.size for leaf in jax.tree.leaves(adapters)) >= adam8.SMALLEST
    rate = optim.schedule("linear", 5e-3, 5, STEPS)
    optimizer = optim.make(name, rate, weight_decay=0.01, max_grad_norm=1.0)
    step = train.make_step(objective.loss(pair.family, pair.config, 1.0), optimizer)
    state, out = train.start(adapters, optimizer), []
    for n in range(STEPS):
        state, report = step(state, pair.params, lines(n))
        out.append(float(report.loss))
    return np.asarray(out)


def test_training_adapters_takes_the_losses_of_float32_moments(figure):
    wanted, got = losses("adamw_torch"), losses("adamw_8bit")
    assert wanted[-1] < 0.01 * wanted[0] and (got != wanted).any()
    figure("adamw_8bit: a step's loss from float32's, share", abs(got / wanted - 1).max(), 0.02)
