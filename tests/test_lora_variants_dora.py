"""DoRA against PEFT on torch: whole models, their gradients, adapter folders and merges."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import peft
import programs
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from bridge import merge, peft_adapter
from bridge.peft_adapter import Settings
from unsloth_jax import decoder, lora, losses, quant, tree, unstack
from unsloth_jax.leaves import Stacks, dense, stacks
from unsloth_jax.quant import nf4

LENGTH = 12
ROWS = [tiny.draw(51, LENGTH), tiny.draw(52, LENGTH)]
DORA = {
    "llama": Settings(4, 8.0, targets=("q_proj", "o_proj", "up_proj", "down_proj"), dora=True),
    "qwen2": Settings(3, 6.0, rslora=True, targets="all-linear", dora=True),
    "qwen3": Settings(4, 6.0, targets=("k_proj", "gate_proj"), layers=(0, 2), dora=True),
    "llama_gelu": Settings(2, 8.0, targets=("lm_head", "v_proj"), dora=True),
}
MAGNITUDE = "lora_magnitude_vector"


def scale(s: Settings) -> float:
    return lora.scaling(s.alpha, s.rank, s.rslora)


def config(s: Settings) -> peft.LoraConfig:
    targets = s.targets if isinstance(s.targets, str) else list(s.targets)
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=s.rank, lora_alpha=s.alpha, use_rslora=s.rslora, use_dora=s.dora,
        target_modules=targets, layers_to_transform=s.layers and list(s.layers),
    )  # fmt: skip


def in_peft(name: str, seed: int = 4, params=None) -> peft.PeftModel:
    """PEFT's DoRA of the settings, B and magnitudes redrawn; the base's matrices from `params`."""
    model = tiny.reference(name)
    if params is not None:
        state = model.state_dict()
        for path, leaf in tree.flatten(params).items():
            value = torch.tensor(np.asarray(dense(leaf)))
            for i in range(3) if "*" in path else (None,):
                state[path.replace("*", str(i))].copy_(value if i is None else value[i])
    model = peft.get_peft_model(model, config(DORA[name])).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.copy_(torch.tensor(rng.normal(0, 0.2, p.shape)))
            if MAGNITUDE in key:
                p.mul_(torch.tensor(rng.uniform(0.7, 1.4, p.shape)))
    return model


@cache
def base(name: str, kind: str):
    params = tiny.pair(name).params
    if kind == "nf4":
        return quant.quantize(params, "nf4", lambda path: path.endswith("_proj.weight"))
    return params


def loss(name: str, adapters, params):
    """Summed cross entropy of every next token."""
    pair, (tokens, positions, segments) = tiny.pair(name), tiny.padded(ROWS, LENGTH)
    params = lora.attach(params, adapters, scale(DORA[name]))
    hidden = decoder.forward(pair.family, pair.config, params, tokens, positions, segments)
    head = pair.family.head(pair.config, params)
    logps = losses.token_logprobs(hidden, head, jnp.roll(tokens, -1, 1))
    return -logps[:, :-1].sum()


def scores(name: str, params) -> np.ndarray:
    pair = tiny.pair(name)
    return np.asarray(tiny.logits(pair.family, pair.config, params, *tiny.padded(ROWS, LENGTH)))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "dense") for name in DORA), ("qwen3", "nf4"), ("llama", "nf4")]
)
def test_losses_and_gradients_are_those_of_peft(name, kind, tmp_path, figure):
    params = base(name, kind)
    model = in_peft(name, params=params if kind == "nf4" else None)
    model.save_pretrained(tmp_path)
    adapters, read = peft_adapter.load(tmp_path, params)
    assert read.dora and jax.tree.structure(adapters) == jax.tree.structure(fresh(name, params))
    ours, grads = jax.jit(jax.value_and_grad(lambda a: loss(name, a, params)))(adapters)
    ids = torch.tensor(ROWS)
    logits = model(ids).logits[:, :-1]
    theirs = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    theirs.backward()
    assert abs(float(ours) - theirs.item()) < 1e-5 * theirs.item()
    want = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    got = peft_adapter.tensors(grads)
    assert len(got) == len(want)
    for key, g in want.items():
        key = key.replace(".default", "").replace(f"{MAGNITUDE}.weight", MAGNITUDE)
        error = np.abs(got[key] - g).max() / np.abs(g).max()
        assert error < 1e-3, (key, error)
    figure(f"DoRA {name} {kind}, gradients: largest difference", error, 1e-3)


def fresh(name: str, params):
    s = DORA[name]
    pairs = lora.init(jax.random.key(3), params, s.rank, s.targets, s.layers)
    return lora.magnitudes(params, pairs, scale(s))


def drawn(name: str, params, seed: int = 8):
    """Adapters with `b` drawn and magnitudes off the norms."""
    rng = np.random.default_rng(seed)
    change = {
        "b": lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32),
        "magnitude": lambda x: x * jnp.asarray(rng.uniform(0.7, 1.4, x.shape), jnp.float32),
        "a": lambda x: x,
    }
    return tree.map_paths(
        lambda path, x: jax.tree.map(change[path.rsplit(".", 1)[1]], x), fresh(name, params)
    )


@pytest.mark.parametrize("name", DORA)
def test_fresh_magnitudes_are_those_of_peft_and_change_nothing(name):
    ours = peft_adapter.tensors(fresh(name, base(name, "dense")))
    model = peft.get_peft_model(tiny.reference(name), config(DORA[name]))
    theirs = {k: v for k, v in peft.get_peft_model_state_dict(model).items() if MAGNITUDE in k}
    assert theirs and {k for k in ours if MAGNITUDE in k} == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value.numpy(), rtol=1e-6)
    attached = lora.attach(base(name, "dense"), fresh(name, base(name, "dense")), 0.5)
    for path, leaf in tree.flatten(attached).items():
        same = dense(tree.flatten(base(name, "dense"))[path])
        for part, ids in zip(stacks(leaf, 3).parts, stacks(leaf, 3).layers, strict=True):
            at = np.asarray(ids) if "*" in path else ...
            np.testing.assert_allclose(dense(part), np.asarray(same)[at], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", DORA)
def test_our_folder_gives_the_same_logits_in_peft_and_comes_back(name, tmp_path):
    params, s = base(name, "dense"), DORA[name]
    adapters = drawn(name, params)
    peft_adapter.save(tmp_path / "ours", adapters, s)
    model = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = model(torch.tensor(ROWS)).logits.numpy()
    got = scores(name, lora.attach(params, adapters, scale(s)))
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()
    plain = {k: x for k, x in tree.flatten(adapters).items() if not k.endswith("magnitude")}
    off = scores(name, lora.attach(params, tree.unflatten(plain), scale(s)))
    assert np.abs(off - expected).max() > 0.1 * expected.std()
    again, read = peft_adapter.load(tmp_path / "ours", params)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), adapters, again)
    assert all(jax.tree.leaves(same)) and read.dora and read.rslora == s.rslora
    model.save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / who / peft_adapter.WEIGHTS)) for who in ("ours", "theirs")]
    assert names[0] == {key for key in names[1] if "base_layer" not in key}


@pytest.mark.parametrize("name", DORA)
def test_merged_weights_are_those_that_peft_merges(name, tmp_path):
    params, s, pair = base(name, "dense"), DORA[name], tiny.pair(name)
    adapters = drawn(name, params)
    peft_adapter.save(tmp_path / "a", adapters, s)
    model = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "a")
    state = model.merge_and_unload().state_dict()
    found = merge.merged(
        pair.family, pair.config, params, adapters, scale(s), None, "float32", merge.DEQUANTIZED
    )
    attached, changed = tree.flatten(lora.attach(params, adapters, scale(s))), 0
    for weight in found.weights:
        expected = state[weight.name].numpy()
        np.testing.assert_allclose(weight.read(), expected, atol=2e-6)
        changed += weight.name in found.adapted
    for path, leaf in attached.items():
        for part, ids in zip(stacks(leaf, 3).parts, stacks(leaf, 3).layers, strict=True):
            for j, i in enumerate(ids) if "*" in path else ((None, 0),):
                got = np.asarray(dense(part) if j is None else dense(part)[j])
                np.testing.assert_allclose(got, state[path.replace("*", str(i))].numpy(), atol=2e-6)
    assert changed == sum(key.endswith("lora_A.weight") for key in peft_adapter.tensors(adapters))


def test_layers_made_for_decoding_have_their_adapters_merged():
    pair, s = tiny.pair("qwen3"), DORA["qwen3"]
    params = base("qwen3", "nf4")
    attached = lora.attach(params, drawn("qwen3", params), scale(s))
    made = unstack.materialized(pair.family, pair.config, attached)
    for i in range(3):
        leaf = tree.flatten(attached)["model.layers.*.mlp.gate_proj.weight"]
        part, ids = next(x for x in zip(leaf.parts, leaf.layers, strict=True) if i in x[1])
        got = made.layers[i]["mlp"]["gate_proj"]["weight"].dequantize()
        np.testing.assert_allclose(got, dense(part)[ids.index(i)], atol=1e-6)
        number, x = unstack.after(i, jnp.ones((2, 64)))
        stored = unstack.layer(pair.family, attached, i, number)["mlp"]["gate_proj"]["weight"]
        np.testing.assert_allclose(dense(stored), got, atol=1e-6)


def test_magnitudes_and_dropout_copy_no_quantized_stack():
    params, s = base("qwen3", "nf4"), DORA["qwen3"]
    adapters, pair = drawn("qwen3", params), tiny.pair("qwen3")
    tokens, positions, segments = tiny.padded(ROWS, LENGTH)

    def value(adapters, params, key):
        params = lora.attach(params, adapters, scale(s), 0.1, key)
        return decoder.forward(pair.family, pair.config, params, tokens, positions, segments).sum()

    jaxpr = jax.jit(jax.grad(value)).trace(adapters, params, jax.random.key(0)).jaxpr
    packed = {w.packed.shape[1:] for w in tree.flatten(params).values() if isinstance(w, nf4.NF4)}
    shapes = [shape for _, shape, dtype in programs.made(jaxpr) if dtype == "uint8"]
    assert any(shape in packed for shape in shapes)
    assert not any(len(x) == 3 and x[0] > 1 and x[1:] in packed for x in shapes)


def test_magnitudes_that_the_config_or_the_file_lacks_are_named(tmp_path):
    params, s = base("qwen3", "dense"), DORA["qwen3"]
    adapters = drawn("qwen3", params)
    with pytest.raises(ValueError, match="4 magnitudes and 4 modules.*DoRA False"):
        peft_adapter.save(tmp_path / "a", adapters, s._replace(dora=False))
    plain = tree.unflatten(
        {k: x for k, x in tree.flatten(adapters).items() if not k.endswith("magnitude")}
    )
    with pytest.raises(ValueError, match="0 magnitudes and 4 modules.*DoRA True"):
        peft_adapter.save(tmp_path / "a", plain, s)
    peft_adapter.save(tmp_path / "a", adapters, s)
    path = tmp_path / "a" / peft_adapter.WEIGHTS
    values = load_file(path)
    key = f"base_model.model.model.layers.2.mlp.gate_proj.{MAGNITUDE}"
    save_file({k: v for k, v in values.items() if k != key}, path)
    with pytest.raises(ValueError, match=rf"missing {key} \(128,\)"):
        peft_adapter.load(tmp_path / "a", params)
    assert isinstance(tree.flatten(adapters)["model.layers.*.mlp.gate_proj.magnitude"], Stacks)
