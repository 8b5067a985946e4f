"""Starts that change the base: PiSSA and LoftQ as PEFT has them, and what is exported of them."""

import copy
import re

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from adapted import read_config
from peft.utils.loftq_utils import _low_rank_decomposition

from bridge import merge, peft_adapter
from bridge.peft_adapter import Settings
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import lora, quant, tree
from unsloth_jax.leaves import Stacks, dense, layer, stacks
from unsloth_jax.lora import starts
from unsloth_jax.quant import nf4

LENGTH = 12
ROWS = [tiny.draw(61, LENGTH), tiny.draw(62, LENGTH)]
PISSA = Settings(4, 8.0, targets=("q_proj", "down_proj", "lm_head"), start="pissa")
RSLORA = Settings(4, 6.0, rslora=True, targets=("v_proj", "up_proj"), layers=(0, 2), start="pissa")
LOFTQ = Settings(4, 4.0, targets=("q_proj", "down_proj"), start="loftq")


def scale(s: Settings) -> float:
    return lora.scaling(s.alpha, s.rank, s.rslora)


def begin(s: Settings, params=None, **other) -> starts.Start:
    params = tiny.pair("llama").params if params is None else params
    key, rest = jax.random.key(2), (s.rank, s.targets, s.layers, s.start)
    return starts.begin(key, params, *rest, scale=scale(s), **other)


def in_peft(s: Settings) -> peft.PeftModel:
    fields = peft.LoraConfig(
        task_type="CAUSAL_LM", r=s.rank, lora_alpha=s.alpha, use_rslora=s.rslora,
        target_modules=list(s.targets), layers_to_transform=s.layers and list(s.layers),
        init_lora_weights=s.start,
    )  # fmt: skip
    return peft.get_peft_model(tiny.reference("llama"), fields).eval()


def scores(params) -> np.ndarray:
    pair = tiny.pair("llama")
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded(ROWS, LENGTH)))


def theirs(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ROWS)).logits.numpy()


def matrices(params) -> dict[str, np.ndarray]:
    """Every weight by its full name, dense."""
    out = {}
    for path, leaf in tree.flatten(params).items():
        for i in range(3) if ".*." in path else (None,):
            value = leaf if i is None else layer(leaf, i)
            out[path if i is None else path.replace("*", str(i))] = np.asarray(dense(value))
    return out


@pytest.mark.parametrize("s", [PISSA, RSLORA], ids=["scale 2", "rslora, two layers"])
def test_pissa_splits_weights_as_peft_does(s):
    got, state = begin(s), in_peft(s).state_dict()
    ours, original, own = matrices(got.params), matrices(tiny.pair("llama").params), 0
    pairs = merge.pairs(got.adapters, scale(s), got.params)
    for name, w in ours.items():
        at = f"base_model.model.{name.removesuffix('.weight')}."
        if name not in pairs:
            np.testing.assert_array_equal(w, original[name])
            continue
        b, a = (state[f"{at}lora_{x}.default.weight"].numpy() for x in "BA")
        delta = pairs[name].delta(w)
        np.testing.assert_allclose(delta, scale(s) * b @ a, atol=2e-5)
        np.testing.assert_allclose(w, state[f"{at}base_layer.weight"].numpy(), atol=2e-5)
        np.testing.assert_allclose(w + delta, original[name], atol=1e-6)
        np.testing.assert_allclose(np.abs(pairs[name].a), np.abs(a), atol=2e-4)
        own += 1
    assert own == len(peft_adapter.tensors(got.adapters)) // 2 > 3


def test_pissa_begins_with_the_model_as_it_was():
    got, want = begin(PISSA), scores(tiny.pair("llama").params)
    found = scores(lora.attach(got.params, got.adapters, scale(PISSA)))
    assert np.abs(found - want).max() <= 1e-4 * want.std()
    assert np.abs(scores(got.params) - want).max() > 0.1 * want.std()


# Targets that some layers have, beside ones that all have.
UNLIKE = {
    "qwen3_5_text": lora.TARGETS,
    "qwen3_next": ("q_proj", "in_proj_ba", "out_proj"),
    "llama4_text": ("q_proj", "shared_expert.up_proj"),
}


SLOW = [(name, start) for name in UNLIKE for start in ("loftq", "pissa")][1:]


@pytest.mark.parametrize(("name", "start"), [
    ("qwen3_5_text", "loftq"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)
])  # fmt: skip
def test_layers_that_differ_start_as_each_does_alone(name, start):
    params, rank, by = tiny.pair(name).params, 3, 2.0
    got = starts.begin(jax.random.key(2), params, rank, UNLIKE[name], None, start, scale=by)
    flat, was, pairs = *map(tree.flatten, (got.params, params)), tree.flatten(got.adapters)
    modules = lora.modules(params, UNLIKE[name])
    assert any(isinstance(pairs[f"{path}.a"], Stacks) for path in modules)
    for path, ids in modules.items():
        for i in ids:
            w, new = (np.asarray(dense(layer(x[f"{path}.weight"], i))) for x in (was, flat))
            a, b = (np.asarray(layer(pairs[f"{path}.{x}"], i)) for x in "ab")
            rest = nf4.quantize(jnp.asarray(w), double=False).dequantize()
            best = w if start == "pissa" else w - np.asarray(rest)
            u, s, v = np.linalg.svd(best, full_matrices=False)
            product = (u[:, :rank] * s[:rank]) @ v[:rank]
            made = by * b @ a if start == "pissa" else b @ a
            np.testing.assert_allclose(made, product, atol=5e-5)
            np.testing.assert_allclose(new, w - product if start == "pissa" else rest, atol=5e-5)
    for path in set(was) - {f"{path}.weight" for path in modules}:
        assert jax.tree.all(jax.tree.map(np.array_equal, flat[path], was[path])), path
    if start == "pissa":
        pair, rows = tiny.pair(name), tiny.padded(ROWS, LENGTH)
        attached = lora.attach(got.params, got.adapters, by)
        want, found = (tiny.logits(*pair[1:3], p, *rows) for p in (params, attached))
        assert np.abs(found - want).max() <= 1e-4 * np.asarray(want).std()


def decaying(height: int, width: int) -> np.ndarray:
    """A matrix whose singular values halve from one to the next."""
    rng = np.random.default_rng(7)
    u, v = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (height, width))
    return ((u * 0.5 ** np.arange(16)) @ v.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)], ids=str)
def test_pissa_by_iteration_finds_what_peft_finds(shape):
    w = decaying(*shape)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = torch.tensor(w)
    fields = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="pissa_niter_8"
    )
    own = peft.get_peft_model(torch.nn.Sequential(linear), fields).base_model.model[0]
    s = Settings(4, 8.0, targets=("p",), start="pissa_niter_8")
    got = begin(s, {"p": {"weight": jnp.asarray(w)}})
    ours = scale(s) * got.adapters["p"]["b"] @ got.adapters["p"]["a"]
    b, a = own.lora_B["default"].weight, own.lora_A["default"].weight
    np.testing.assert_allclose(ours, 2 * (b @ a).detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(got.params["p"]["weight"], own.base_layer.weight.data, atol=1e-5)
    np.testing.assert_allclose(got.params["p"]["weight"] + ours, w, atol=1e-6)


def loftq_in_torch(w: np.ndarray, rank: int, iterations: int):
    """(packed, base, A, B) by bitsandbytes and PEFT's decomposition, as `loftq_init` goes on."""
    w = torch.tensor(w)
    rest = w.clone()
    for _ in range(iterations):
        packed, state = bnb.quantize_4bit(rest, quant_type="nf4")
        base = bnb.dequantize_4bit(packed, state)
        found = _low_rank_decomposition(w - base, rank)
        rest = w - found["L"] @ found["R"]
    return packed.numpy(), base.numpy(), found["R"].numpy(), found["L"].numpy()


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_puts_nf4_and_what_it_loses_in_the_place_of_weights(iterations):
    got, original = begin(LOFTQ, iterations=iterations), matrices(tiny.pair("llama").params)
    flat, ours = tree.flatten(got.params), matrices(got.params)
    pairs = merge.pairs(got.adapters, 1.0, got.params)
    assert len(pairs) == 6 and isinstance(flat["model.layers.*.mlp.down_proj.weight"], nf4.NF4)
    for name, pair in pairs.items():
        packed, base, a, b = loftq_in_torch(original[name], 4, iterations)
        lost = lambda base, delta, name=name: np.linalg.norm(original[name] - base - delta)
        assert lost(ours[name], pair.b @ pair.a) < 0.97 * lost(ours[name], 0)
        here = lost(ours[name], pair.b @ pair.a)
        np.testing.assert_allclose(here, lost(base, b @ a), rtol=1e-3)
        assert np.isclose(ours[name], base, atol=1e-5).mean() > 0.995
        if iterations == 1:
            np.testing.assert_array_equal(ours[name], base)
            np.testing.assert_allclose(pair.b @ pair.a, b @ a, atol=2e-5)
            leaf = flat[re.sub(r"\.\d\.", ".*.", name)].packed[int(name.split(".")[2])]
            np.testing.assert_array_equal(leaf.reshape(-1, 1), packed)


def test_layers_that_loftq_leaves_out_keep_their_numbers():
    got = begin(LOFTQ._replace(layers=(1,)))
    leaf = tree.flatten(got.params)["model.layers.*.self_attn.q_proj.weight"]
    assert isinstance(leaf, Stacks) and {type(p).__name__ for p in leaf.parts} >= {"NF4"}
    original = matrices(tiny.pair("llama").params)
    ours = matrices(got.params)
    for name, w in ours.items():
        same = np.array_equal(w, original[name])
        assert same != (".1." in name and ("q_proj" in name or "down_proj" in name)), name
    found = scores(lora.attach(got.params, got.adapters, 1.0))
    want = scores(tiny.pair("llama").params)
    assert 0 < np.abs(found - want).max() < np.abs(scores(got.params) - want).max() * 1.5


def trained(start: starts.Start):
    """The pairs after some steps."""
    rng = np.random.default_rng(9)
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)
    return jax.tree.map(move, start.adapters)


@pytest.mark.parametrize("s", [PISSA, RSLORA], ids=["scale 2", "rslora, two layers"])
def test_the_exported_difference_on_the_original_base_is_the_trained_model(s, tmp_path):
    got, params = begin(s), tiny.pair("llama").params
    after = trained(got)
    want = scores(lora.attach(got.params, after, scale(s)))
    peft_adapter.save(tmp_path / "a", after, s, got.initial)
    adapters, read = peft_adapter.load(tmp_path / "a", params)
    assert read.rank == 2 * s.rank and read.start is True
    assert scale(read) == pytest.approx(scale(s))
    found = scores(lora.attach(params, adapters, scale(read)))
    assert np.abs(found - want).max() <= 1e-4 * want.std()
    assert np.abs(scores(params) - want).max() > 0.05 * want.std()
    model = peft.PeftModel.from_pretrained(tiny.reference("llama"), tmp_path / "a").eval()
    assert np.abs(theirs(model) - want).max() <= 1e-4 * want.std()


def test_a_saved_loftq_pair_on_the_base_in_nf4_is_the_trained_model(tmp_path):
    got = begin(LOFTQ)
    after = trained(got)
    want = scores(lora.attach(got.params, after, scale(LOFTQ)))
    peft_adapter.save(tmp_path / "a", after, LOFTQ, got.initial)
    base = copy.deepcopy(tiny.reference("llama"))
    for name, weight in base.named_parameters():
        if name.split(".")[-2] in LOFTQ.targets:
            weight.data = bnb.dequantize_4bit(*bnb.quantize_4bit(weight.data, quant_type="nf4"))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert model.peft_config["default"].r == LOFTQ.rank
    assert np.abs(theirs(model) - want).max() <= 1e-4 * want.std()


def test_peft_converts_to_the_same_rank_and_scale(tmp_path):
    model = in_peft(RSLORA)
    model.save_pretrained(tmp_path / "initial")
    model.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    got = begin(RSLORA)
    peft_adapter.save(tmp_path / "ours", got.adapters, RSLORA, got.initial)
    ours, other = (read_config(tmp_path / who) for who in ("ours", "theirs"))
    for field in ("r", "init_lora_weights", "use_rslora"):
        assert ours[field] == other[field]
    assert ours["lora_alpha"] == pytest.approx(other["lora_alpha"])


@pytest.mark.parametrize("base", [merge.ORIGINAL, merge.DEQUANTIZED])
def test_merging_adds_to_the_base_that_each_pair_belongs_to(base, tmp_path):
    pair, got = tiny.pair("llama"), begin(PISSA)
    source = SafetensorsSource(tiny.save(pair.model, tmp_path))
    after = trained(got)
    found = merge.merged(
        pair.family, pair.config, got.params, after, scale(PISSA), source, "float32", base,
        got.initial,
    )  # fmt: skip
    want = matrices(lora.attach(got.params, after, scale(PISSA)))
    assert found.base == base and len(found.adapted) == 7
    for weight in found.weights:
        np.testing.assert_allclose(weight.read(), want[weight.name], atol=5e-6)


def test_loftq_merges_into_what_was_trained_or_its_difference_into_the_original(tmp_path):
    pair, got = tiny.pair("llama"), begin(LOFTQ)
    source = SafetensorsSource(tiny.save(pair.model, tmp_path))
    after = trained(got)
    run = lambda base: {
        w.name: w.read()
        for w in merge.merged(
            pair.family, pair.config, got.params, after, 1.0, source, "float32", base, got.initial
        ).weights
    }
    want, before = matrices(lora.attach(got.params, after, 1.0)), matrices(pair.params)
    start = matrices(lora.attach(got.params, got.initial, 1.0))
    whole, added = run(merge.DEQUANTIZED), run(merge.ORIGINAL)
    for name, w in want.items():
        np.testing.assert_allclose(whole[name], w, atol=5e-6)
        np.testing.assert_allclose(added[name], before[name] + (w - start[name]), atol=5e-6)
    ratios = merge.distances(pair.family, pair.config, got.params, after, 1.0, source, got.initial)
    for name, ratio in ratios.items():
        gap, delta = before[name] - start[name], want[name] - start[name]
        assert ratio == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(delta), rel=1e-3)
    assert len(ratios) == 6


def test_magnitudes_begin_at_the_norms_of_the_weights_as_they_were():
    got = begin(PISSA, dora=True)
    found = got.adapters["model"]["layers"]["*"]["self_attn"]["q_proj"]["magnitude"]
    w = tiny.pair("llama").params["model"]["layers"]["*"]["self_attn"]["q_proj"]["weight"]
    np.testing.assert_allclose(found, np.linalg.norm(w, axis=-1), rtol=1e-5)
    with pytest.raises(ValueError, match="magnitudes can't"):
        lora.difference(got.adapters, got.initial)


@pytest.mark.parametrize("start", [True, "gaussian"])
@pytest.mark.parametrize("dora", [False, True])
def test_other_starts_leave_the_base_as_it_is(start, dora):
    got = begin(PISSA._replace(start=start), dora=dora)
    assert got.initial is None and got.params is tiny.pair("llama").params
    assert ("magnitude" in got.adapters["lm_head"]) == dora


def test_weights_of_two_dtypes_keep_theirs():
    w = jnp.asarray(decaying(16, 16))
    parts = Stacks((w[None].astype(jnp.bfloat16), jnp.stack([w, w])), ((1,), (0, 2)))
    got = begin(PISSA._replace(targets=("p",)), {"l": {"*": {"p": {"weight": parts}}}})
    leaf = got.params["l"]["*"]["p"]["weight"]
    assert [layer(leaf, i).dtype for i in range(3)] == ["float32", "bfloat16", "float32"]
    assert got.adapters["l"]["*"]["p"]["a"].shape == (3, 4, 16)
    assert len(stacks(leaf, 3).parts) == 2


@pytest.mark.parametrize(
    ("s", "other", "message"),
    [
        (PISSA._replace(start="pisa"), {}, r"'pisa' is not supported; supported: .*'pissa'"),
        (PISSA._replace(start="pissa_niter_0"), {}, "'pissa_niter_0' is not supported"),
        (PISSA._replace(rank=65), {}, "ranks up to the smaller side.*the rank 65"),
        (LOFTQ, dict(iterations=0), "one iteration or more, got 0"),
    ],
    ids=str,
)
def test_starts_that_mean_nothing_are_refused(s, other, message):
    with pytest.raises(ValueError, match=message):
        begin(s, **other)


@pytest.mark.parametrize("s", [PISSA, LOFTQ], ids=["pissa", "loftq"])
def test_quantized_weights_are_refused(s):
    where = lambda path: path.endswith("q_proj.weight")
    params = quant.quantize(tiny.pair("llama").params, "nf4", where)
    with pytest.raises(ValueError, match=r"q_proj is NF4: load with load_in_16bit=True"):
        begin(s, params)


def test_pairs_without_those_they_began_from_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="'pissa' changed the base"):
        peft_adapter.save(tmp_path / "a", begin(PISSA).adapters, PISSA)
