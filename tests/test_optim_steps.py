"""Whole optimizers against torch's, transformers' and bitsandbytes', over 24 steps.

Our trees stack layers; the others get each layer as a parameter of its own.
"""

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from jax.tree_util import tree_leaves, tree_map
from peft.optimizers import create_loraplus_optimizer
from transformers import get_scheduler

from pallas_kernels.adam8_update import SIGNED, Moment, dequantize
from unsloth_jax import directions, optim
from unsloth_jax.leaves import Stacks
from unsloth_jax.tree import flatten, unflatten

PEAK, WARMUP, STEPS = 3e-2, 3, 24
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.*.self_attn.q_proj.a": (3, 4, 12),
    "model.layers.*.self_attn.q_proj.b": (3, 10, 4),
    "model.layers.*.mlp.up_proj.weight": (3, 9, 5),
    "model.layers.*.input_layernorm.weight": (3, 7),
    "model.norm.weight": (7,),
    "lm_head.bias": (11,),
}


def normal(seed: int, scale: float = 1.0, shapes=SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {p: rng.normal(0, scale, shape).astype(np.float32) for p, shape in shapes.items()}


PARAMS = normal(0)
GRADS = [normal(n, 10 ** np.sin(n)) for n in range(1, STEPS + 1)]


def split(flat: dict) -> dict[str, np.ndarray]:
    """One array a layer, `*` being its number."""
    out = {}
    for path, x in flat.items():
        layers = range(len(x)) if "*" in path else [None]
        out |= {path.replace("*", str(i)): np.asarray(x if i is None else x[i]) for i in layers}
    return out


def groups_of(leaves: dict, decay: float) -> list[dict]:
    """transformers' two groups: what decays and what doesn't."""
    free = [k for k in leaves if "norm" in k or "bias" in k]
    return [
        {"params": [x for k, x in leaves.items() if k not in free], "weight_decay": decay},
        {"params": [leaves[k] for k in free], "weight_decay": 0.0},
    ]


def adamw(leaves, decay):
    return [torch.optim.AdamW(groups_of(leaves, decay), lr=PEAK, betas=(0.9, 0.99), eps=1e-7)]


def adafactor(leaves, decay):
    fields = dict(scale_parameter=False, relative_step=False)
    return [transformers.Adafactor(groups_of(leaves, decay), lr=PEAK, **fields)]


def sgd(**fields):
    return lambda leaves, decay: [torch.optim.SGD(groups_of(leaves, decay), lr=PEAK, **fields)]


def lion(leaves, decay):
    return [bitsandbytes.optim.Lion(groups_of(leaves, decay), lr=PEAK, betas=(0.9, 0.99))]


def muon(**fields):
    def make(leaves, decay):
        tables = ("embed_tokens", "lm_head")
        own = [k for k, x in leaves.items() if x.ndim == 2 and not any(t in k for t in tables)]
        matrices = [leaves[k] for k in own]
        rest = {k: x for k, x in leaves.items() if k not in own}
        return [
            torch.optim.Muon(matrices, lr=PEAK, weight_decay=decay, **fields),
            *adamw(rest, decay),
        ]

    return make


ADAMW = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")
SMALL = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")  # all leaves are below 4096 elements
MUON, RMS = 2e-2, {"adjust_lr_fn": "match_rms_adamw"}
CASES = {  # name -> (the same in torch, options, tolerance in peak rates)
    **{name: (adamw, {}, 2e-4) for name in (*ADAMW, *SMALL)},
    "adafactor": (adafactor, {}, 2e-4),
    "sgd": (sgd(), {}, 2e-4),
    "sgd momentum": (sgd(momentum=0.9), {"momentum": 0.9}, 2e-4),
    "sgd nesterov": (
        sgd(momentum=0.8, nesterov=True),
        {"momentum": 0.8, "nesterov": True},
        2e-4,
    ),
    "lion": (lion, {}, 2e-4),
    "lion_32bit": (lion, {}, 2e-4),
    "paged_lion_32bit": (lion, {}, 2e-4),
    "lion_8bit": (lion, {}, 2e-4),
    "paged_lion_8bit": (lion, {}, 2e-4),
    # Sums that end at a bfloat16 rounding's edge come out a rounding apart: 0.4 % of an element.
    "muon": (muon(), {}, MUON),
    "muon rms": (muon(**RMS), RMS, MUON),
    "muon plain": (muon(nesterov=False, momentum=0.8), {"nesterov": False, "momentum": 0.8}, MUON),
}
OWN = ("adafactor", "sgd nesterov", "lion", "muon")  # compared once more without decay and clipping


def in_torch(make, decay: float, limit: float) -> list[dict[str, np.ndarray]]:
    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in split(PARAMS).items()}
    optimizers = make(leaves, decay)
    schedulers, out = [get_scheduler("cosine", o, WARMUP, STEPS) for o in optimizers], []
    for grads in GRADS:
        for key, grad in split(grads).items():
            leaves[key].grad = torch.tensor(grad)
        if limit:
            torch.nn.utils.clip_grad_norm_(leaves.values(), limit)
        for one in (*optimizers, *schedulers):
            one.step()
        out.append({k: v.detach().numpy().copy() for k, v in leaves.items()})
    return out


def in_jax(name: str, params=PARAMS, grads=GRADS, **fields) -> list[dict[str, np.ndarray]]:
    optimizer = optim.make(name, optim.schedule("cosine", PEAK, WARMUP, STEPS), **fields)
    params, out = unflatten(params), []
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(unflatten(grad), state, params)
        params = optax.apply_updates(params, updates)
        out.append(split(flatten(params)))
    return out


@pytest.mark.parametrize(
    ("case", "decay", "limit"),
    [(case, 0.1, 2.0) for case in CASES] + [(case, 0.0, 0.0) for case in OWN],
)
def test_twenty_four_steps_are_the_references(case, decay, limit):
    make, options, tolerance = CASES[case]
    expected = in_torch(make, decay, limit)
    fields = dict(weight_decay=decay, max_grad_norm=limit, options=options)
    got = in_jax(case.split()[0], b2=0.99, eps=1e-7, **fields)
    scale = (
        1.0 if "sgd" not in case else max(1.0, max(np.abs(x).max() for x in expected[-1].values()))
    )
    for ours, theirs in zip(got, expected, strict=True):
        for key, x in theirs.items():
            np.testing.assert_allclose(ours[key], x, atol=tolerance * PEAK * scale, err_msg=key)
    moved = max(np.abs(expected[-1][k] - x).max() for k, x in split(PARAMS).items())
    assert moved > 3 * PEAK


def test_every_name_is_compared():
    assert {case.split()[0] for case in CASES} == set(optim.OPTIMIZERS)
    assert set(optim.OPTIMIZERS) - {n.value for n in transformers.training_args.OptimizerNames} == {
        "lion",
        "muon",
    }


def test_orthogonal_is_torchs_newton_schulz():
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs

    for seed, shape in enumerate([(3, 16, 40), (2, 40, 16), (1, 8, 8)]):
        x = np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)
        wanted = [theirs(torch.tensor(m), (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in x]
        got = np.asarray(directions.orthogonal(jnp.asarray(x)))
        np.testing.assert_allclose(got, np.stack([m.float().numpy() for m in wanted]), atol=2e-3)
        values = np.linalg.svd(got, compute_uv=False)
        assert 0.5 < values.min() and values.max() < 1.35


def test_8_bit_lion_takes_the_steps_of_bitsandbytes():
    """Each step starts from bitsandbytes' moment, since roundings at halves may differ."""
    shape, fields = (48, 100), dict(weight_decay=0.05)
    before = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    leaf = torch.tensor(before.copy(), requires_grad=True)
    theirs = bitsandbytes.optim.Lion8bit([leaf], lr=1e-2, betas=(0.9, 0.99), **fields)
    ours = optim.make("lion_8bit", lambda n: 1e-2, b2=0.99, **fields)
    update, state = jax.jit(ours.update), ours.init(before)
    equal = []
    for step in range(20):
        g = np.random.default_rng(step + 1).normal(0, 1, shape).astype(np.float32)
        before = leaf.detach().numpy().copy()
        leaf.grad = torch.tensor(g)
        theirs.step()
        updates, state = update(g, state, before)
        np.testing.assert_allclose(updates, leaf.detach().numpy() - before, rtol=1e-5, atol=2e-7)
        kept = theirs.state[leaf]
        mu = Moment(*(jnp.asarray(kept[k].numpy().copy()) for k in ("state1", "absmax1")))
        np.testing.assert_allclose(state[0].mu.absmax, mu.absmax, rtol=1e-6)
        equal.append((np.asarray(state[0].mu.codes) == mu.codes).mean())
        gap = np.abs(dequantize(state[0].mu, SIGNED) - dequantize(mu, SIGNED))
        assert gap.max() <= 0.015 * mu.absmax.max()
        state = (state[0]._replace(mu=mu), *state[1:])
    assert min(equal) > 0.5


def sizes(name: str, shapes: dict) -> int:
    params = unflatten({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
    state = jax.eval_shape(optim.make(name, lambda n: 1e-3).init, params)
    return sum(x.size * x.dtype.itemsize for x in tree_leaves(state))


def test_states_are_as_small_as_the_references():
    shapes = {f"model.layers.*.{k}.weight": (4, 256, 512) for k in ("up", "down")}
    count = 2 * 4 * 256 * 512
    counters = 8  # the schedule's steps, and the optimizer's own
    expected = {
        "adamw_torch": 8 * count,
        "adamw_8bit": 2 * (count + count // 64),
        "adafactor": 4 * 2 * 4 * (256 + 512),
        "sgd": 0,
        "lion": 4 * count,
        "lion_8bit": count + count // 64,
        "muon": 4 * count,
    }
    for name, size in expected.items():
        assert size <= sizes(name, shapes) <= size + counters, name


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "lion_8bit", "muon"])
def test_adapters_of_some_layers_train_as_stacks_of_their_own(name):
    """A `Stacks` leaf takes the steps of its part alone."""
    path = "model.layers.*.self_attn.q_proj.a"
    alone = in_jax(name, {path: PARAMS[path]}, [{path: g[path]} for g in GRADS])
    wrapped = lambda x: Stacks((jnp.asarray(x),), ((0, 2, 5),))
    optimizer = optim.make(name, optim.schedule("cosine", PEAK, WARMUP, STEPS))
    params = unflatten({path: wrapped(PARAMS[path])})
    state = optimizer.init(params)
    for grads in GRADS[:3]:
        updates, state = optimizer.update(unflatten({path: wrapped(grads[path])}), state, params)
        params = optax.apply_updates(params, updates)
    got = split({path: flatten(params)[path].parts[0]})
    for key, x in got.items():
        np.testing.assert_allclose(x, alone[2][key], atol=1e-3 * PEAK)


def tiny_llama():
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def path_in_our_tree(name: str) -> str:
    """PEFT's name of a parameter -> the path in our tree, one layer being number n."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for side in "AB":
        name = name.replace(f".lora_{side}.default.weight", f".{side.lower()}")
        name = name.replace(f".lora_embedding_{side}.default", f".{side.lower()}")
    return name


def stacked(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Layers 0 and 1 on a new first axis."""
    out = {}
    for name, x in flat.items():
        if ".layers.0." in name:
            pair = x, flat[name.replace(".layers.0.", ".layers.1.")]
            out[name.replace(".layers.0.", ".layers.*.")] = np.stack(pair)
        elif ".layers." not in name:
            out[name] = x
    return out


def compare_groups(model, theirs, scheduler, highest=1.0, **fields):
    """Takes 24 steps on random gradients there and here; `highest` is a group's rate in peaks."""
    leaves = {path_in_our_tree(k): p for k, p in model.named_parameters() if p.requires_grad}
    start = stacked({k: p.detach().numpy().copy() for k, p in leaves.items()})
    grads, expected = [], []
    for step in range(STEPS):
        grad = normal(step, shapes={k: tuple(p.shape) for k, p in leaves.items()})
        for key, leaf in leaves.items():
            leaf.grad = torch.tensor(grad[key])
        grads.append(stacked(grad))
        theirs.step()
        scheduler.step()
        expected.append({k: p.detach().numpy().copy() for k, p in leaves.items()})
    got = in_jax("adamw_torch", start, grads, **fields)
    for ours, wanted in zip(got, expected, strict=True):
        for key, x in wanted.items():
            np.testing.assert_allclose(ours[key], x, atol=2e-4 * PEAK * highest, err_msg=key)
    return leaves


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_loraplus_is_pefts(ratio):
    lora = dict(target_modules=["q_proj", "down_proj", "embed_tokens"], r=4)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**lora, bias="lora_only"))
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=PEAK,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=1e-3,
    )
    scheduler = get_scheduler("cosine", theirs, WARMUP, STEPS)
    groups = optim.by_path(loraplus=ratio, adapted_embedding=1e-3 / PEAK)
    leaves = compare_groups(model, theirs, scheduler, ratio, weight_decay=0.1, groups=groups)
    assert {k.split(".")[-1] for k in leaves} == {"a", "b", "bias"}


def test_an_embedding_rate_is_a_group_of_its_own_as_in_torch():
    lora = dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], r=4)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**lora))
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    tables = [p for k, p in trained.items() if k.endswith("modules_to_save.default.weight")]
    rest = [p for k, p in trained.items() if not k.endswith("modules_to_save.default.weight")]
    own = [{"params": rest}, {"params": tables, "lr": 1e-3}]
    theirs = torch.optim.AdamW(own, lr=PEAK, weight_decay=0.1)
    scheduler = get_scheduler("cosine", theirs, WARMUP, STEPS)
    groups = optim.by_path(embedding=1e-3 / PEAK)
    leaves = compare_groups(model, theirs, scheduler, weight_decay=0.1, groups=groups)
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(leaves)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3Text", "GPTNeoX"])
def test_what_decays_is_what_decays_in_transformers_trainer(family):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=40, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = transformers.Trainer.get_decay_parameter_names(None, model)
    group = optim.by_path()
    ours = [k for k, p in model.named_parameters() if group(k, p.ndim).decay]
    assert sorted(ours) == sorted(set(theirs) & {k for k, _ in model.named_parameters()})
    assert 0 < len(ours) < len(list(model.named_parameters()))


def test_groups_change_nothing_unless_asked():
    whole = in_jax("adamw_torch", weight_decay=0.1)
    same = in_jax("adamw_torch", weight_decay=0.1, groups=lambda path, axes: optim.Group())
    path = "model.layers.0.self_attn.q_proj.b"
    np.testing.assert_array_equal(whole[-1][path], same[-1][path])
    halved = in_jax("adamw_torch", groups=lambda path, axes: optim.Group(rate=0.5))
    first = lambda steps: tree_map(lambda a, b: a - b, steps[1], split(PARAMS))
    for key, x in first(in_jax("adamw_torch")).items():
        np.testing.assert_allclose(first(halved)[key], 0.5 * x, atol=1e-6)
