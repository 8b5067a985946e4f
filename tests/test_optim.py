"""Schedules and optimizers against transformers and torch, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_scheduler

from unsloth_jax import optim

PEAK = 3e-3
rng = np.random.default_rng(0)
PARAMS = {"a": rng.normal(0, 1, (4, 6)).astype(np.float32), "b": np.zeros((6, 2), np.float32)}
GRADS = [
    {k: rng.normal(0, 3.0**n, v.shape).astype(np.float32) for k, v in PARAMS.items()}
    for n in range(-2, 4)
]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (3, 20), (7, 7), (1, 60)])
@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_rates_are_those_of_transformers_at_every_step(name, warmup, steps):
    torch_optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = get_scheduler(name, torch_optimizer, warmup, steps)
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        torch_optimizer.step()
        scheduler.step()
    got = jax.vmap(optim.schedule(name, PEAK, warmup, steps))(jnp.arange(steps))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-10)


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


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optim.schedule("polynomial", PEAK, 0, 1),
            r"'polynomial' .*supported: \['constant'",
        ),
        (lambda: optim.make("lion", lambda step: step), r"'lion' .*supported: \['adamw_torch'"),
    ],
    ids=["schedule", "optimizer"],
)
def test_unknown_names_are_refused_with_the_known_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()
