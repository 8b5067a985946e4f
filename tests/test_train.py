"""The training step against a plain torch loop with PEFT, and against itself in other shapes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny
import torch
from transformers import get_scheduler

from bridge import peft_adapter
from bridge.peft_adapter import Settings
from unsloth_jax import data, lora, optim, train, tree
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch, Total
from unsloth_jax.remat import Memory
from workflows import objective

NAME, STEPS, WARMUP, PEAK, DECAY, CLIP = "llama", 20, 3, 2e-2, 0.05, 1.0
SETTINGS = Settings(4, 8.0, targets=lora.TARGETS)
FEW = ("q_proj", "down_proj")  # adapted where the layout of a batch is what counts
SCALE = 2.0
WIDTH = 24


def row(seed: int, length: int) -> Row:
    """Random tokens; the loss wants a random stretch of them, never the first."""
    first = 1 + np.random.default_rng(seed).integers(0, length - 2)
    return Row(tiny.draw(seed, length), [int(i >= first) for i in range(length)])


ROWS = [row(100 + n, length) for n, length in enumerate([24, 9, 17, 5, 12, 21, 7, 14])]


def batch(micro: list[list[list[Row]]], lines: int, width: int = WIDTH) -> Batch:
    """[micro-batches, lines, width] on the device; a micro-batch is a list of lines of rows."""
    parts = [data.collate(bins, lines, width) for bins in micro]
    return jax.tree.map(jnp.asarray, data.stacked(parts))


def apart(rows) -> list[list[Row]]:
    """Each row on a line of its own."""
    return [[r] for r in rows]


def batches() -> list[Batch]:
    """Twenty steps over two alternating batches of two micro-batches of two uneven rows."""
    halves = [apart(ROWS[i : i + 2]) for i in (0, 2, 4, 6)]
    pair = batch(halves[:2], 2), batch(halves[2:], 2)
    return [pair[n % 2] for n in range(STEPS)]


def start_adapters(targets=SETTINGS.targets):
    return lora.init(jax.random.key(1), tiny.pair(NAME).params, SETTINGS.rank, targets)


@cache
def adam():
    rate = optim.schedule("linear", PEAK, WARMUP, STEPS)
    return optim.make("adamw_torch", rate, weight_decay=DECAY, max_grad_norm=CLIP)


@cache
def step_of(keep: str = "full", plain: bool = False):
    """The compiled step; `plain` moves each weight by its negative gradient."""
    pair = tiny.pair(NAME)
    loss = objective.loss(pair.family, pair.config, SCALE, Memory(keep))
    return train.make_step(loss, optax.sgd(1.0) if plain else adam())


def run(state, steps, step):
    """(state after these batches, their losses)."""
    out = []
    for b in steps:
        state, report = step(state, tiny.pair(NAME).params, b)
        out.append(float(report.loss))
    return state, np.asarray(out)


@pytest.fixture(scope="module")
def ours():
    """(final state, losses) of our twenty steps."""
    return run(train.start(start_adapters(), adam()), batches(), step_of())


def torch_loss(model, b: Batch, n: int) -> torch.Tensor:
    """Summed cross entropy of micro-batch `n`, straight from torch's logits."""
    part = Batch(*(torch.tensor(np.asarray(x[n])) for x in b[:5]))
    logits = model(input_ids=part.tokens.long(), attention_mask=(part.segments > 0).long()).logits
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), part.targets.long().flatten(), reduction="none"
    )
    return (nll * part.weights.flatten()).sum()


def in_torch(folder, alpha: float):
    """(final adapters by our paths, losses) of a plain torch loop over PEFT's model."""
    settings = SETTINGS._replace(alpha=alpha)
    peft_adapter.save(folder / "start", start_adapters(), settings)
    model = peft.PeftModel.from_pretrained(
        tiny.reference(NAME), folder / "start", is_trainable=True
    )
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=PEAK, weight_decay=DECAY)
    scheduler, out = get_scheduler("linear", optimizer, WARMUP, STEPS), []
    for b in batches():
        count, total = float(b.weights.sum()), 0.0
        for n in range(2):
            part = torch_loss(model, b, n) / count
            part.backward()
            total += part.item()
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        out.append(total)
    model.save_pretrained(folder / "end")
    adapters, _ = peft_adapter.load(folder / "end", tiny.pair(NAME).params)
    return adapters, np.asarray(out)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return in_torch(tmp_path_factory.mktemp("peft"), SETTINGS.alpha)


def furthest(x, y) -> float:
    """The largest difference between two trees of arrays."""
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def test_twenty_steps_are_those_of_a_plain_torch_loop(ours, theirs, figure):
    (state, losses_here), (adapters, losses_there) = ours, theirs
    off = np.abs(losses_here - losses_there).max()
    figure("loss of 20 steps against torch + PEFT, nats", off, 1e-3)
    fallen = losses_there[-2:].mean() / losses_there[:2].mean()
    figure("loss after these 20 steps, share of the first", fallen, 0.7)
    moved = furthest(adapters, start_adapters())
    off = furthest(state.trainable, adapters) / moved
    figure("final adapters against torch + PEFT, share of their way", off, 1e-3)
    assert moved > 5 * PEAK
    assert int(state.step) == STEPS


def shifted(b: Batch) -> Batch:
    """The mask one token late, as if it had been read as one over inputs."""
    return b._replace(weights=jnp.roll(b.weights, 1, axis=-1) * (b.segments > 0))


def test_a_mask_shifted_by_one_token_leaves_the_torch_loop(theirs):
    steps = [shifted(b) for b in batches()]
    _, got = run(train.start(start_adapters(), adam()), steps, step_of())
    assert np.abs(got - theirs[1]).max() > 1e-2


def test_a_torch_loop_whose_scale_is_10_percent_off_leaves_ours(ours, tmp_path):
    adapters, got = in_torch(tmp_path, 1.1 * SETTINGS.alpha)
    assert np.abs(got - ours[1]).max() > 1e-2
    assert furthest(adapters, ours[0].trainable) > 0.1 * furthest(adapters, start_adapters())


def test_twenty_steps_equal_ten_and_ten_through_host_memory_bitwise(ours):
    state, first = run(train.start(start_adapters(), adam()), batches()[:10], step_of())
    shapes, kept = jax.tree.structure(state), [np.array(x) for x in jax.tree.leaves(state)]
    del state
    again = jax.tree.unflatten(shapes, [jnp.asarray(x) for x in kept])
    state, second = run(again, batches()[10:], step_of())
    np.testing.assert_array_equal(np.concatenate([first, second]), ours[1])
    assert furthest(state, ours[0]) == 0


def test_every_b_moves_with_the_first_rate_above_zero_and_no_frozen_weight_does():
    base, before = tiny.pair(NAME).params, tree.flatten(start_adapters())
    frozen = [np.array(x) for x in jax.tree.leaves(base)]
    state, _ = run(train.start(start_adapters(), adam()), batches()[:1], step_of())
    assert furthest(state.trainable, start_adapters()) == 0
    state, _ = run(state, batches()[1:2], step_of())
    for path, leaf in tree.flatten(state.trainable).items():
        assert all((leaf[i] != before[path][i]).any() for i in range(3)), path
    assert furthest(base, frozen) == 0


def test_only_b_has_a_gradient_while_it_is_zero():
    grads, _ = gradients(batch([apart(ROWS[:4])], 4), start_adapters(FEW))
    for path, leaf in tree.flatten(grads).items():
        assert leaf.any() == path.endswith(".b"), path


def drawn():
    """Adapters with `b` random, so that every leaf has a gradient."""
    rng = np.random.default_rng(4)
    fill = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)
    return tree.map_paths(lambda p, x: fill(x) if p.endswith(".b") else x, start_adapters(FEW))


def gradients(b: Batch, adapters=None, keep: str = "full"):
    """(gradients, report) of one step from these adapters, else from `drawn`."""
    adapters = adapters or drawn()
    state = train.start(adapters, optax.sgd(1.0))
    state, report = step_of(keep=keep, plain=True)(state, tiny.pair(NAME).params, b)
    return jax.tree.map(lambda old, new: np.asarray(old - new), adapters, state.trainable), report


@pytest.fixture(scope="module")
def whole():
    """Gradients and report of four uneven rows as one batch."""
    return gradients(batch([apart(ROWS[:4])], 4))


def assert_same_step(got, expected, tolerance):
    (grads, report), (wanted, wanted_report) = got, expected
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert furthest(grads, wanted) <= tolerance * largest
    assert float(report.tokens) == float(wanted_report.tokens)
    for field in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            getattr(report, field), getattr(wanted_report, field), rtol=tolerance
        )


A, B, C, D = ROWS[:4]
# Two micro-batches of four lines of 40 tokens, so that one program runs them all.
SAME = {
    "padded_further_beside_an_empty_window": [[[A], [B], [C], [D]], []],
    "accumulated_unevenly": [[[A]], [[B], [C], [D]]],
    "packed": [[[A, B], [D, C]], []],
    "packed_and_accumulated": [[[C, D], [B]], [[A]]],
    "reordered": [[[D], [], [C]], [[B], [A]]],
}


@pytest.mark.parametrize("case", SAME)
def test_a_step_does_not_depend_on_how_its_rows_are_laid_out(whole, case):
    assert_same_step(gradients(batch(SAME[case], 4, width=40)), whole, 1e-5)


def test_a_step_with_other_rows_is_another_step(whole):
    grads, _ = gradients(batch([apart(ROWS[1:5])], 4))
    assert furthest(grads, whole[0]) > 1e-2


def test_recomputing_layers_changes_nothing(whole):
    assert_same_step(gradients(batch([apart(ROWS[:4])], 4), keep="none"), whole, 1e-6)


def test_the_divisor_is_the_supervised_tokens_of_the_whole_batch(whole):
    assert float(whole[1].tokens) == sum(sum(r.mask[1:]) for r in ROWS[:4])
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(whole[0])))
    np.testing.assert_allclose(whole[1].grad_norm, norm, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_step_that_is_not_finite_keeps_the_state_and_says_so(bad):
    state, _ = run(train.start(start_adapters(), adam()), batches()[:2], step_of())
    before = jax.tree.map(np.array, state)
    b = batches()[0]
    after, report = step_of()(
        state, tiny.pair(NAME).params, b._replace(weights=b.weights.at[1, 0, 3].set(bad))
    )
    assert not bool(report.finite) and furthest(after, before) == 0
    after, report = step_of()(after, tiny.pair(NAME).params, b)
    assert bool(report.finite) and int(after.step) == 3


def test_a_gradient_that_is_not_finite_keeps_the_state_though_the_loss_is_finite():
    root = lambda adapters, frozen, b: Total(jnp.sqrt(adapters["w"]).sum(), jnp.ones(()))
    step = train.make_step(root, adam())
    state = train.start({"w": jnp.zeros(3)}, adam())
    before = jax.tree.map(np.array, state)
    after, report = step(state, {}, batches()[0])
    assert float(report.loss) == 0 and not np.isfinite(report.grad_norm)
    assert not bool(report.finite) and furthest(after, before) == 0


def test_starting_copies_the_adapters_that_steps_donate():
    adapters = start_adapters()
    run(train.start(adapters, adam()), batches()[:1], step_of())
    assert furthest(adapters, start_adapters()) == 0
