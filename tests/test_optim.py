"""Schedules and optimizers against transformers and torch, step by step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import SchedulerType, get_scheduler

from unsloth_jax import following, optim

PEAK = 3e-3
rng = np.random.default_rng(0)
PARAMS = {"a": rng.normal(0, 1, (4, 6)).astype(np.float32), "b": np.zeros((6, 2), np.float32)}
GRADS = [
    {k: rng.normal(0, 3.0**n, v.shape).astype(np.float32) for k, v in PARAMS.items()}
    for n in range(-2, 4)
]


SHAPES = {  # schedule and lr_scheduler_kwargs
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.75}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}, {"num_cycles": 2.5}, {"num_cycles": 7}],
    "polynomial": [{}, {"lr_end": 1e-4, "power": 2.5}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 50}],
    "cosine_with_min_lr": [{"min_lr": 1e-4}, {"min_lr_rate": 0.2, "num_cycles": 1.5}],
    "cosine_warmup_with_min_lr": [
        {"min_lr": 1e-4},
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3, "num_cycles": 0.75},
    ],
    "warmup_stable_decay": [
        {"num_decay_steps": 6},
        {"num_decay_steps": 4, "num_stable_steps": 2, "min_lr_ratio": 0.1},
        {"num_decay_steps": 5, "warmup_type": "cosine", "decay_type": "linear"},
        {"num_decay_steps": 90, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
        {"num_decay_steps": 7, "num_cycles": 1.5, "min_lr_ratio": 0.3},
    ],
}
LENGTHS = [(0, 10), (3, 20), (7, 7), (1, 60), (30, 100), (0, 84)]


def rates_of_transformers(name, warmup, steps, kwargs) -> list[float]:
    """Of half as many steps again as there are."""
    torch_optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler, out = get_scheduler(name, torch_optimizer, warmup, steps, kwargs), []
    for _ in range(steps + steps // 2 + 5):
        out.append(scheduler.get_last_lr()[0])
        torch_optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize(
    ("name", "kwargs", "warmup", "steps"),
    [
        (name, kwargs, *length)
        for name in SHAPES
        for kwargs in SHAPES[name]
        for length in LENGTHS
        # transformers divides by zero where no steps are between warm-up and end.
        if name != "polynomial" or length[0] != length[1]
    ],
)
def test_rates_are_those_of_transformers_at_every_step(name, kwargs, warmup, steps):
    expected = rates_of_transformers(name, warmup, steps, kwargs)
    rate = optim.schedule(name, PEAK, warmup, steps, **kwargs)
    got = jax.vmap(rate)(jnp.arange(len(expected)))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6 * PEAK)


def test_every_schedule_of_transformers_is_here():
    names = {kind.value for kind in SchedulerType}
    assert names == set(SHAPES) | {name for name, _ in FOLLOWED}
    assert set(SHAPES) == set(optim.SCHEDULES)


FOLLOWED = [  # lr_scheduler_type and lr_scheduler_kwargs of rates that follow a metric
    ("reduce_lr_on_plateau", {}),
    ("reduce_lr_on_plateau", dict(factor=0.5, patience=0, min_lr=PEAK / 5)),
    ("reduce_lr_on_plateau", dict(factor=0.3, patience=2, cooldown=3, mode="max")),
    ("reduce_lr_on_plateau", dict(patience=1, threshold=0.2, threshold_mode="abs", eps=PEAK / 200)),
    ("reduce_lr_on_plateau", dict(patience=1, threshold=0.1, mode="max", cooldown=1)),
    ("greedy", {}),
    ("greedy", dict(patience=1, min_lr=PEAK / 2, max_lr=2 * PEAK, warmup=2, cooldown=1)),
    ("greedy", dict(patience=0, min_lr=PEAK / 2, reset_start=3, factor=0.7, cooldown=2)),
    ("greedy", dict(patience=2, min_lr=0, smooth=True, window_size=4, threshold_mode="rel")),
    ("greedy", dict(patience=1, min_lr=0, mode="max", threshold=0.05, eps=PEAK / 50)),
]
METRICS = np.concatenate([
    np.linspace(3, 1, 15), [1.0] * 14, np.linspace(1, 2, 20), rng.uniform(0.5, 1.5, 80),
    [np.nan, np.inf], np.linspace(1, -1, 30), rng.normal(-1, 0.3, 40),
])  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), FOLLOWED)
def test_rates_follow_a_metric_as_those_of_torch_and_transformers(name, kwargs):
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = get_scheduler(name, theirs, scheduler_specific_kwargs=kwargs)
    ours, rates = optim.schedule(name, PEAK, 7, 100, **kwargs), []
    # transformers' mean never forgets a metric that is not a number.
    metrics = METRICS[np.isfinite(METRICS)] if "smooth" in kwargs else METRICS
    for n, metric in enumerate(metrics):
        theirs.step()
        scheduler.step(metric)
        ours.see(float(metric))
        if n % 10 == 9:  # as a checkpoint keeps it
            again = optim.schedule(name, PEAK, 7, 100, **kwargs)
            again.take_up(json.loads(json.dumps(ours.state())))
            ours = again
        rates.append((ours.rate, theirs.param_groups[0]["lr"]))
    got, expected = zip(*rates, strict=True)
    assert got == expected and len(set(got)) > 1


def test_an_optimizer_takes_the_rate_that_its_state_holds():
    plateau = optim.schedule("reduce_lr_on_plateau", PEAK, 0, 1)
    optimizer = optim.make("sgd", plateau)
    state, traced = optimizer.init(PARAMS), []

    @jax.jit
    def step(state):
        traced.append(1)
        return optimizer.update(GRADS[0], state, PARAMS)

    for rate in (PEAK, PEAK / 2, 0.0):
        updates, state = step(following.held(state, rate))
        np.testing.assert_allclose(updates["a"], -np.float32(rate) * GRADS[0]["a"], rtol=1e-6)
    assert len(traced) == 1


@pytest.mark.parametrize("cycles", [2, 3, 7, 13, 30])
@pytest.mark.parametrize("steps", [210, 999, 1260, 4096])
def test_restarts_come_at_the_step_at_which_transformers_has_them(cycles, steps):
    rate = optim.schedule("cosine_with_restarts", PEAK, 0, steps, num_cycles=cycles)
    got = np.asarray(jax.vmap(rate)(jnp.arange(steps)))
    torch_optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=PEAK)
    kwargs = {"num_cycles": cycles}
    scheduler = get_scheduler("cosine_with_restarts", torch_optimizer, 0, steps, kwargs)
    expected = np.asarray([PEAK * scheduler.lr_lambdas[0](n) for n in range(steps)])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)
    assert (np.diff(got) > 0).sum() == cycles - 1


def tensors(tree):
    return {k: torch.tensor(v, requires_grad=True) for k, v in tree.items()}


@pytest.mark.parametrize("limit", [0.5, 1.0, 1e6])
def test_clipping_is_torchs_clip_grad_norm(limit):
    for grads in GRADS:
        leaves = tensors(PARAMS)
        for key, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[key])
        torch.nn.utils.clip_grad_norm_(leaves.values(), limit)
        clip = optim.clip_by_norm(limit)
        got, _ = clip.update(grads, clip.init(PARAMS))
        for key, leaf in leaves.items():
            np.testing.assert_allclose(got[key], leaf.grad.numpy(), rtol=1e-6)


def in_torch(*, weight_decay, max_grad_norm, name="linear", **fields) -> list[dict]:
    leaves = tensors(PARAMS)
    optimizer = torch.optim.AdamW(leaves.values(), lr=PEAK, weight_decay=weight_decay, **fields)
    scheduler, out = get_scheduler(name, optimizer, 2, 8), []
    for grads in GRADS:
        for key, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[key])
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(leaves.values(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        out.append({k: v.detach().numpy().copy() for k, v in leaves.items()})
    return out


CASES = {
    "plain": dict(weight_decay=0.0, max_grad_norm=0.0),
    "decay": dict(weight_decay=0.1, max_grad_norm=0.0),
    "clip": dict(weight_decay=0.01, max_grad_norm=1.0),
    "no_momentum": dict(weight_decay=0.0, max_grad_norm=0.0, betas=(0.0, 0.999)),
    "betas": dict(weight_decay=0.01, max_grad_norm=0.3, betas=(0.8, 0.95), eps=1e-3),
}


ADAMW = [name for name in optim.OPTIMIZERS if "adamw" in name]


@pytest.mark.parametrize("name", ADAMW)
@pytest.mark.parametrize("case", CASES)
def test_adamw_takes_the_steps_of_torchs(case, name):
    fields = dict(CASES[case])
    expected = in_torch(**fields)
    b1, b2 = fields.pop("betas", (0.9, 0.999))
    rate = optim.schedule("linear", PEAK, 2, 8)
    optimizer = optim.make(name, rate, b1=b1, b2=b2, **fields)
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads, wanted in zip(GRADS, expected, strict=True):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for key in PARAMS:
            np.testing.assert_allclose(params[key], wanted[key], rtol=1e-5, atol=1e-6)
    assert np.abs(params["a"] - PARAMS["a"]).max() > 2 * PEAK


def test_adamw_8bit_keeps_8_bits_of_leaves_of_4096_elements_and_more():
    leaves = {"below": jnp.ones((63, 65)), "at": jnp.ones((64, 64)), "above": jnp.ones((241, 17))}
    adam, *_ = optim.make("adamw_8bit", lambda step: step).init(leaves)
    for moment in (adam.mu, adam.nu):
        dtypes = {name: {x.dtype.name for x in jax.tree.leaves(moment[name])} for name in leaves}
        assert dtypes == {"below": {"float32"}} | dict.fromkeys(
            ("at", "above"), {"uint8", "float32"}
        )
        assert moment["above"].codes.shape == (241, 17) and moment["above"].absmax.shape == (17,)


RATE = lambda step: step
REFUSALS = {
    "schedule": (
        lambda: optim.schedule("cosine_min_lr", PEAK, 0, 1),
        r"'cosine_min_lr' is not supported; nearest: cosine_with_min_lr.*; supported: \['const",
    ),
    "plateau's keyword": (
        lambda: optim.schedule("reduce_lr_on_plateau", PEAK, 0, 1, patients=2),
        r"'reduce_lr_on_plateau': option 'patients' is not supported; nearest: patience",
    ),
    "plateau's factor": (
        lambda: optim.schedule("reduce_lr_on_plateau", PEAK, 0, 1, factor=1.0),
        r"reduce_lr_on_plateau: factor=1.0; expected a number above 0 and below 1",
    ),
    "plateau's mode": (
        lambda: optim.schedule("greedy", PEAK, 0, 1, mode="least"),
        r"greedy: mode='least'; expected one of \('min', 'max'\)",
    ),
    "plateau's list": (
        lambda: optim.schedule("reduce_lr_on_plateau", PEAK, 0, 1, min_lr=[0.1, 0.2]),
        r"reduce_lr_on_plateau: min_lr=\[0.1, 0.2\]; expected one number",
    ),
    "keyword": (
        lambda: optim.schedule("cosine", PEAK, 0, 1, num_cycle=2),
        r"'cosine': option 'num_cycle' is not supported; nearest: num_cycles; supp.*\['num_cyc",
    ),
    "keyword of another": (
        lambda: optim.schedule("constant", PEAK, 0, 1, num_cycles=2),
        r"'constant': option 'num_cycles' is not supported; supported: \[\]",
    ),
    "missing": (
        lambda: optim.schedule("warmup_stable_decay", PEAK, 0, 1),
        r"'warmup_stable_decay' needs \['num_decay_steps'\]; it takes \['decay_type'",
    ),
    "type": (
        lambda: optim.schedule(
            "warmup_stable_decay", PEAK, 0, 1, num_decay_steps=1, decay_type="cosin"
        ),
        r"decay_type 'cosin' is not supported; nearest: cosine; supported: \['1-sqrt'",
    ),
    "both": (
        lambda: optim.schedule("cosine_with_min_lr", PEAK, 0, 1, min_lr=0.1, min_lr_rate=0.1),
        r"one of min_lr and min_lr_rate, got min_lr=0.1 and min_lr_rate=0.1",
    ),
    "neither": (
        lambda: optim.schedule("cosine_warmup_with_min_lr", PEAK, 0, 1),
        r"one of min_lr and min_lr_rate, got min_lr=None and min_lr_rate=None",
    ),
    "end": (
        lambda: optim.schedule("polynomial", PEAK, 0, 1, lr_end=1.0),
        r"lr_end=1.0 must be below the learning rate, which is 0.003",
    ),
    "optimizer": (
        lambda: optim.make("adamw_hf", RATE),
        r"'adamw_hf' is not supported; nearest: adamw_.*; supported: \['adafactor'",
    ),
    "option": (
        lambda: optim.make("sgd", RATE, options={"momentun": 0.9}),
        r"'sgd': option 'momentun' is not supported; nearest: momentum; supported: \['mom",
    ),
    "option of another": (
        lambda: optim.make("adamw_8bit", RATE, options={"momentum": 0.9}),
        r"'adamw_8bit': option 'momentum' is not supported; supported: \[\]",
    ),
    "muon": (
        lambda: optim.make("muon", RATE, options={"adjust_lr_fn": "rms"}),
        r"adjust_lr_fn 'rms' is not supported; supported: \['original', 'match_rms_adamw'\]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_unknown_is_refused_with_what_is_known(case):
    make, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        make()
