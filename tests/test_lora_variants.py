"""Dropout on an adapter's input and DoRA: the leaves, the whole model, and PEFT on torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch

from unsloth_jax import decoder, leaves, lora, losses, quant, tree
from unsloth_jax.leaves import Apart, Lora, dense, layer
from unsloth_jax.quant import nf4
from unsloth_jax.remat import PLAIN, Memory

OUT, IN, RANK, SCALE, RATE = 128, 64, 4, 1.5, 0.25
NAMES = ("q_proj", "k_proj")
IDS = [tiny.draw(31, 12), tiny.draw(32, 12)]


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def whole(layers: int = 3):
    """({q_proj, k_proj} whose adapters give back their input, the adapters)."""
    weights = {f"layers.*.{name}.weight": jnp.zeros((layers, IN, IN)) for name in NAMES}
    one = jnp.broadcast_to(jnp.eye(IN)[None], (layers, IN, IN))
    pairs = {f"layers.*.{name}.{side}": one for name in NAMES for side in "ab"}
    return tree.unflatten(weights), tree.unflatten(pairs)


def masks(key, rate=RATE, rows=200) -> dict[str, np.ndarray]:
    """[layers, rows, IN] of each module: what an input of ones becomes on its way to A."""
    params, pairs = whole()
    found = tree.flatten(lora.attach(params, pairs, 1.0, rate, key))
    ones = jnp.ones((rows, IN))
    return {
        path: np.stack([leaves.linear({"weight": layer(leaf, i)}, ones) for i in range(3)])
        for path, leaf in found.items()
    }


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_inputs_are_dropped_at_their_rate_and_the_rest_is_scaled_up(key, rate):
    for found in masks(key, rate).values():
        assert set(np.unique(found)) == {np.float32(0), np.float32(1 / (1 - rate))}
        share = (found == 0).mean()
        assert abs(share - rate) < 5 * (rate * (1 - rate) / found.size) ** 0.5
        for axes in ((0, 1), (0, 2), (1, 2)):
            part = (found == 0).mean(axes)
            assert abs(part - rate).max() < 6 * (rate * (1 - rate) * part.size / found.size) ** 0.5


def test_every_module_layer_and_key_draws_its_own_mask(key):
    drawn = [*masks(key).values(), *masks(jax.random.key(1)).values()]
    flat = [one.reshape(-1) == 0 for each in drawn for one in each]
    for i, one in enumerate(flat):
        for other in flat[:i]:
            together = (one & other).mean()
            assert abs(together - RATE**2) < 6 * (RATE**2 / one.size) ** 0.5
    for path, again in masks(key).items():
        np.testing.assert_array_equal(again, masks(key)[path])


def test_a_layer_draws_the_same_mask_in_a_stack_of_some_layers(key):
    params, pairs = whole()
    some = tree.map_paths(lambda _, x: leaves.Stacks((x[jnp.asarray([0, 2])],), ((0, 2),)), pairs)
    found = tree.flatten(lora.attach(params, some, 1.0, RATE, key))
    for path, leaf in found.items():
        for i in (0, 2):
            got = leaves.linear({"weight": layer(leaf, i)}, jnp.ones((200, IN)))
            np.testing.assert_array_equal(got, masks(key)[path][i])
        assert not isinstance(layer(leaf, 1), Lora)


def test_parts_of_an_input_can_draw_masks_of_their_own(key):
    node, x = {"weight": single("dense", False, key)}, random(5, 6, IN)
    plain = {"weight": single("dense", True)}
    draws = [leaves.linear(leaves.folded(node, n), x) for n in (0, 1, 1)]
    np.testing.assert_array_equal(draws[1], draws[2])
    assert all(
        np.abs(np.asarray(draws[1] - y)).max() > 0.1 for y in (draws[0], leaves.linear(node, x))
    )
    np.testing.assert_array_equal(
        leaves.linear(leaves.folded(plain, 1), x), leaves.linear(plain, x)
    )


def single(kind: str, magnitude: bool, key=None, rate: float = RATE):
    """A weight [OUT, IN] with an adapter whose parts are all drawn."""
    base = random(1, OUT, IN) / 8
    base = nf4.quantize(base) if kind == "nf4" else base
    m = jnp.abs(random(2, OUT)) + 0.5 if magnitude else None
    apart = Apart(base, m, key, rate) if magnitude or key is not None else base
    return Lora(apart, random(3, RANK, IN) / 8, random(4, OUT, RANK), jnp.float32(SCALE))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_mean_over_keys_is_the_product_without_dropout(kind, magnitude):
    x, keys = random(5, 3, IN), jax.random.split(jax.random.key(2), 4000)
    run = lambda key: leaves.linear({"weight": single(kind, magnitude, key)}, x)
    ys = np.asarray(jax.jit(jax.vmap(run))(keys))
    want = np.asarray(leaves.linear({"weight": single(kind, magnitude)}, x))
    error = np.abs(ys.mean(0) - want) / (ys.std(0) / len(keys) ** 0.5)
    assert error.max() < 5 and ys.std(0).min() > 0.01


def mask_of(leaf: Lora, rows: int) -> jax.Array:
    """The factors 0 and 1 / (1 - rate) that the leaf's key draws for inputs [rows, IN]."""
    shown = Lora(Apart(jnp.zeros((IN, IN)), None, leaf.base.key, leaf.base.rate),
                 jnp.eye(IN), jnp.eye(IN), jnp.float32(1.0))  # fmt: skip
    return leaves.linear({"weight": shown}, jnp.ones((rows, IN)))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gradients_are_those_of_the_formula_with_the_same_mask(key, kind):
    leaf, x, dy = single(kind, False, key), random(5, 6, IN), random(6, 6, OUT)
    run = lambda a, b, x: leaves.linear({"weight": leaf.replace(a=a, b=b)}, x)
    y, back = jax.vjp(run, leaf.a, leaf.b, x)
    da, db, dx = (np.asarray(g, np.float64) for g in back(dy))
    w, a, b, x, dy, z = (
        np.asarray(v, np.float64)
        for v in (dense(leaf.base), leaf.a, leaf.b, x, dy, mask_of(leaf, 6))
    )
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, x @ w.T + SCALE * (z * x) @ a.T @ b.T)
    close(da, SCALE * (dy @ b).T @ (z * x))
    close(db, SCALE * dy.T @ (z * x @ a.T))
    close(dx, dy @ w + SCALE * z * (dy @ b @ a))
    assert (z == 0).any() and (z > 1).any()


class Masked(torch.nn.Module):
    """Dropout with a mask that is given, in the place of PEFT's."""

    def __init__(self, mask: np.ndarray):
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask


def in_peft(leaf: Lora, mask: np.ndarray | None) -> torch.nn.Module:
    """PEFT's layer around a torch Linear with the leaf's numbers, in training mode."""
    linear = torch.nn.Linear(IN, OUT, bias=False)
    base = leaf.base.base if isinstance(leaf.base, Apart) else leaf.base
    linear.weight.data = torch.tensor(np.asarray(dense(base)))
    dora = isinstance(leaf.base, Apart) and leaf.base.magnitude is not None
    fields = peft.LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=["0"], use_dora=dora)
    model = peft.get_peft_model(torch.nn.Sequential(linear), fields).train()
    own = model.base_model.model[0]
    own.lora_A["default"].weight.data = torch.tensor(np.asarray(leaf.a))
    own.lora_B["default"].weight.data = torch.tensor(np.asarray(leaf.b))
    if dora:
        own.lora_magnitude_vector["default"].weight.data = torch.tensor(
            np.asarray(leaf.base.magnitude)
        )
    if mask is not None:
        own.lora_dropout["default"] = Masked(mask)
    return own


@pytest.mark.parametrize(("magnitude", "dropout"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_layer_and_its_gradients_are_those_of_peft(key, kind, magnitude, dropout):
    leaf, x, dy = (
        single(kind, magnitude, key if dropout else None),
        random(5, 6, IN),
        random(6, 6, OUT),
    )
    theirs = in_peft(leaf, np.asarray(mask_of(leaf, 6)) if dropout else None)
    there = torch.tensor(np.asarray(x), requires_grad=True)
    y_there = theirs(there)
    y_there.backward(torch.tensor(np.asarray(dy)))

    def run(a, b, m, x):
        base = leaf.base.replace(magnitude=m)
        return leaves.linear({"weight": leaf.replace(a=a, b=b, base=base)}, x)

    y, back = jax.vjp(run, leaf.a, leaf.b, leaf.base.magnitude, x)
    da, db, dm, dx = back(dy)
    pairs = [(y, y_there), (dx, there.grad), (da, theirs.lora_A["default"].weight.grad)]
    pairs.append((db, theirs.lora_B["default"].weight.grad))
    if magnitude:
        pairs.append((dm, theirs.lora_magnitude_vector["default"].weight.grad))
    for ours, want in pairs:
        want = want.detach().numpy()
        assert np.abs(np.asarray(ours) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.fixture(scope="module", params=["dense", "nf4"])
def model(request):
    """(base, adapters on some layers with `b` drawn)."""
    params = tiny.pair("qwen3").params
    if request.param == "nf4":
        params = quant.quantize(params, "nf4", lambda path: path.endswith("_proj.weight"))
    adapters = lora.init(jax.random.key(1), params, 2, layers=(1, 2))
    fill = lambda x: random(5, *x.shape) * 0.1
    return params, tree.map_paths(
        lambda path, x: jax.tree.map(fill, x) if path.endswith(".b") else x, adapters
    )


@partial(jax.jit, static_argnames="memory")
def loss(adapters, base, key, memory=PLAIN):
    pair, (tokens, positions, segments) = tiny.pair("qwen3"), tiny.padded(IDS, 12)
    params = lora.attach(base, adapters, 0.5, RATE, key)
    hidden = decoder.forward(pair.family, pair.config, params, tokens, positions, segments, memory)
    head = pair.family.head(pair.config, params)
    return -losses.token_logprobs(hidden, head, jnp.roll(tokens, -1, 1)).sum()


gradient = jax.jit(jax.value_and_grad(loss), static_argnames="memory")
WAYS = [Memory("none"), Memory("full", unroll=True), Memory("mlp", unroll=True)]


def relative(x, y) -> float:
    """The largest difference of two trees over the largest value of the second."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    far = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    return far / max(float(np.abs(np.asarray(b)).max()) for _, b in pairs)


@pytest.mark.parametrize("memory", WAYS, ids=str)
def test_masks_are_the_same_however_layers_are_run_and_kept(model, key, memory):
    base, adapters = model
    want, expected = gradient(adapters, base, key)
    found, got = gradient(adapters, base, key, memory=memory)
    assert abs(float(found - want)) < 1e-5 * float(want)
    assert relative(got, expected) < 1e-4
    other, _ = gradient(adapters, base, jax.random.key(7), memory=memory)
    assert abs(float(other - want)) > 1e-3 * float(want)


def test_the_backward_pass_sees_the_masks_of_the_forward_pass(model, key):
    base, adapters = model
    _, grads = gradient(adapters, base, key)
    flat, size = tree.flatten(adapters), 1e-2
    for path, g in tree.flatten(grads).items():
        norm = np.sqrt(sum(float((x * x).sum()) for x in jax.tree.leaves(g)))
        there, back = (
            flat | {path: jax.tree.map(lambda w, d, by=by: w + by * d, flat[path], g)}
            for by in (size / norm, -size / norm)
        )
        up, down = (loss(tree.unflatten(x), base, key) for x in (there, back))
        assert abs(float(up - down) / (2 * size) - norm) <= 0.02 * norm, path


def test_a_rate_of_zero_leaves_the_program_as_it_is(model, key):
    base, adapters = model
    trace = lambda *how: str(jax.make_jaxpr(lambda a: lora.attach(base, a, 0.5, *how))(adapters))
    assert trace() == trace(0.0, key) == trace(0.0, None)
    is_apart = lambda leaf: isinstance(leaf, Apart)
    found = lambda *how: jax.tree.leaves(lora.attach(base, adapters, 0.5, *how), is_leaf=is_apart)
    assert not any(map(is_apart, found(0.0, key))) and any(map(is_apart, found(0.1, key)))


@pytest.mark.parametrize(
    ("rate", "key"), [(1.0, jax.random.key(0)), (-0.1, jax.random.key(0)), (0.1, None)]
)
def test_a_share_that_is_none_or_has_no_key_is_refused(rate, key):
    with pytest.raises(ValueError, match=f"dropout is a share.*got {rate}, key"):
        lora.attach({}, {}, 1.0, rate, key)
