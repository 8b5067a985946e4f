"""Each family against transformers on tiny checkpoints, and proof that a mistake would show."""

import copy
import dataclasses
from functools import partial
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers.activations import ACT2FN

from bridge.places import places
from unsloth_jax import decoder, decoding, rope, tree
from unsloth_jax.layers import ACTIVATIONS
from unsloth_jax.leaves import map_stacks
from unsloth_jax.models import fields, llama

LENGTH = 96  # beyond every window and every rope context of TINY
TOLERANCE = 1e-4  # of the logits' standard deviation
NOTICED = 20 * TOLERANCE
NEW = 16
LONG, SHORT = tiny.draw(1, LENGTH), tiny.draw(2, 40)
PROMPTS = [tiny.draw(3, 24), tiny.draw(4, 5), tiny.draw(5, 13)]


@pytest.fixture(scope="module", params=tiny.entries(tiny.TINY))
def pair(request):
    return tiny.pair(request.param)


def theirs(model: torch.nn.Module, row: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


def score(pair: tiny.Pair, rows: list[list[int]], c=None, params=None) -> np.ndarray:
    """Our logits [B, LENGTH, V] with a config or weights other than the pair's, if given."""
    c, params = c or pair.config, params or pair.params
    return np.asarray(tiny.logits(pair.family, c, params, *tiny.padded(rows, LENGTH)))


@tiny.shared_jit
def logits_turned(family, c, params, tokens, positions, segments, by):
    """Logits under given angles, so that one compiled function serves every rope."""
    turned = ModuleType(family.__name__)
    vars(turned).update(vars(family), angles=lambda c, positions, lengths: by)
    hidden = decoder.forward(turned, c, params, tokens, positions, segments)
    return decoder.logits(turned, c, params, hidden)


@tiny.shared_jit
def start(family, c, params, tokens, lengths):
    """Scores [B, V] after each row's last token, and a cache with room for NEW more."""
    slots = tokens.shape[1] + NEW
    hidden, room = decoding.prefill(family, c, params, tokens, lengths, slots, jnp.float32)
    last = hidden[jnp.arange(len(lengths)), lengths - 1]
    return decoder.logits(family, c, params, last), room


@tiny.shared_jit
def more(family, c, params, room, tokens):
    """Scores [B, V] after one more token a row, and the cache; one shape serves all steps."""
    hidden, room = decoding.step(family, c, params, room, tokens, jnp.ones_like(tokens))
    return decoder.logits(family, c, params, hidden), room


def answer(pair: tiny.Pair, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """NEW greedy tokens of each row and the scores that chose them, [B, NEW] and [B, NEW, V]."""
    tokens, _, _ = tiny.padded(rows, max(map(len, rows)))
    scores, room = start(*pair[1:], tokens, jnp.asarray([len(row) for row in rows], jnp.int32))
    seen = [np.asarray(scores)]
    for _ in range(NEW - 1):
        scores, room = more(*pair[1:], room, scores.argmax(-1).astype(jnp.int32))
        seen.append(np.asarray(scores))
    scores = np.stack(seen, 1)
    return scores.argmax(-1), scores


@pytest.mark.parametrize("name", tiny.TINY)
def test_logits_equal_transformers(name, figure):
    """Also that each row's length decides its own dynamic factor: one is within the context."""
    pair = tiny.pair(name)
    found = score(pair, [LONG, SHORT])
    for ours, row in zip(found, (LONG, SHORT), strict=True):
        want = theirs(pair.model, row)
        off = np.abs(ours[: len(row)] - want).max() / want.std()
        said = f"logits against transformers, {pair.model.config.model_type}, {len(row)} tokens"
        figure(f"{said}, share of std", off, TOLERANCE)


def test_packed_rows_equal_separate_rows(pair, figure):
    first, second = LONG[:70], SHORT[:26]
    alone = score(pair, [first, second])
    lengths = [len(first), len(second)]
    tokens = jnp.asarray([first + second, second + first], jnp.int32)
    positions = [np.r_[: lengths[0], : lengths[1]], np.r_[: lengths[1], : lengths[0]]]
    segments = [np.repeat([1, 2], lengths), np.repeat([1, 2], lengths[::-1])]
    arrays = (jnp.asarray(np.stack(x), jnp.int32) for x in (positions, segments))
    packed = np.asarray(tiny.logits(*pair[1:], tokens, *arrays))
    want = np.concatenate([alone[0, :70], alone[1, :26]])
    both = np.stack([want, np.concatenate([want[70:], want[:70]])])
    said = f"packed rows against separate ones, {pair.model.config.model_type}, share of std"
    figure(said, np.abs(packed - both).max() / want.std(), 1e-5)
    assert np.abs(score(pair, [first + second])[0, 70:] - want[70:]).max() > NOTICED * want.std()


def weight_mutations(params: dict):
    """(what, changed parameters): biases to 0, no sinks, norms to 1, matrices shifted by a row."""
    flat = tree.flatten(params)
    for path, w in flat.items():
        if path.endswith("bias"):
            wrong = jnp.zeros_like
        elif path.endswith("sinks"):
            wrong = lambda x: jnp.full_like(x, -1e30)
        elif "norm" in path:
            wrong = jnp.ones_like
        else:
            # Of a convolution the taps, of a layer's vectors those of another layer.
            along = "conv1d" in path or "shared_expert_gate" in path
            wrong = partial(jnp.roll, shift=1, axis=-1 if along else -2)
        yield path, tree.unflatten(flat | {path: map_stacks(wrong, w)})


SHARED = {field.name for field in dataclasses.fields(llama.Config)}
CAPPED = tiny.CAPS["final_logit_softcapping"]


def config_mutations(pair):
    """(what, changed config) for every switch that leaves the weights' shapes alone."""
    c = pair.config
    if any(c.windows):
        other = 9 if all(c.windows) else 8
        yield "no window", dataclasses.replace(c, windows=(None,) * c.layers)
        yield "other windows", dataclasses.replace(c, windows=(other,) * c.layers)
    if c.chunk:
        yield "no chunks", dataclasses.replace(c, chunk=None)
        yield "other chunks", dataclasses.replace(c, chunk=2 * c.chunk)
    if c.activation != "silu":
        # Where gelu is exact or not makes little difference: one entry of TINY is about it.
        for other in ("silu", "gelu") if pair.family is llama else ("silu",):
            yield f"activation {other}", dataclasses.replace(c, activation=other)
    if c.eps > 1e-3:
        yield "eps", dataclasses.replace(c, eps=1e-6)
    if not c.tied and c.rope.kind == "default":
        yield "tied", dataclasses.replace(c, tied=True)
    for field in dataclasses.fields(c):
        if field.name not in SHARED and getattr(c, field.name) is not None:
            value = left_out(getattr(c, field.name))
            changed = dataclasses.replace(c, **{field.name: value})
            # What a GGUF file says of images' positions changes nothing of a text's.
            if field.name == "sections":
                continue
            if places(pair.family, changed) == places(pair.family, c):
                yield field.name, changed
    if c.attention_cap is not None:
        yield "attention_cap", dataclasses.replace(c, attention_cap=None)


def left_out(value):
    """What a reader who overlooks this field of a family's own may assume."""
    if isinstance(value, rope.Rope):
        return dataclasses.replace(value, theta=3e4)
    if isinstance(value, tuple):
        return tuple(not one for one in value)
    if isinstance(value, bool):
        return not value
    return None if value == CAPPED else 2 * value


ROPE_MISTAKES = {
    "kind": "default", "theta": 1e4, "factor": 1.0, "context": 64, "low": 2.0, "high": 8.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": 1.0,
    "short": (1.0,) * 6, "long": (1.0,) * 6,
}  # fmt: skip
DECIDES = {
    "default": ["theta"],
    "linear": ["kind", "theta", "factor"],
    "dynamic": ["kind", "theta", "factor", "context"],
    "llama3": ["kind", "theta", "factor", "context", "low", "high"],
    "yarn": ["kind", "theta", "factor", "context", "attention_factor"],
    "longrope": ["kind", "theta", "context", "attention_factor", "short", "long"],
}


def rope_mutations(c):
    """(what, changed config): every field that this rope reads, set to what a reader may assume."""
    names = DECIDES[c.rope.kind]
    if not c.rope.truncate:
        names = [*names, "beta_fast", "beta_slow", "truncate"]
    for name in names:
        mistake = ROPE_MISTAKES[name]
        if name == "context" and c.rope.kind in ("dynamic", "longrope"):
            mistake = 32
        if getattr(c.rope, name) != mistake:
            changed = dataclasses.replace(c.rope, **{name: mistake})
            yield f"rope {name}", dataclasses.replace(c, rope=changed)


def test_every_weight_left_out_is_noticed(pair):
    right = score(pair, [LONG, SHORT])
    far = NOTICED * right.std()
    missed = [
        what
        for what, params in weight_mutations(pair.params)
        if np.abs(score(pair, [LONG, SHORT], params=params) - right)[0].max() <= far
    ]
    assert not missed


def test_every_switch_left_out_is_noticed(pair):
    right = score(pair, [LONG, SHORT])[0]
    missed = [
        what
        for what, c in config_mutations(pair)
        if np.abs(score(pair, [LONG, SHORT], c)[0] - right).max() <= NOTICED * right.std()
    ]
    assert not missed


def test_every_rope_field_left_out_is_noticed(pair):
    rows = tiny.padded([LONG, SHORT], LENGTH)
    lengths = decoder.document_lengths(rows[2])
    real = np.asarray(rows[2] > 0)
    turn = lambda c: np.asarray(
        logits_turned(*pair[1:], *rows, pair.family.angles(c, rows[1], lengths))
    )[real]
    changed = dict(rope_mutations(pair.config))
    if not changed:
        assert pair.config.rope.kind == "default" and pair.config.rope.theta == 1e4
        return
    right = turn(pair.config)
    np.testing.assert_allclose(right, score(pair, [LONG, SHORT])[real], atol=2e-5 * right.std())
    missed = [
        what
        for what, c in changed.items()
        if np.abs(turn(c) - right).max() <= NOTICED * right.std()
    ]
    assert not missed


def test_greedy_answers_of_ragged_prompts_equal_transformers_one_by_one(pair):
    tokens, _ = answer(pair, PROMPTS)
    settings = copy.deepcopy(pair.model.generation_config)
    settings.update(max_new_tokens=NEW, do_sample=False, eos_token_id=pair.config.vocab)
    for ours, prompt in zip(tokens, PROMPTS, strict=True):
        row = pair.model.generate(torch.tensor([prompt]), generation_config=settings)[0]
        assert ours.tolist() == row[len(prompt) :].tolist()


def test_scores_through_the_cache_equal_those_without(pair, figure):
    tokens, scores = answer(pair, PROMPTS)
    rows = [prompt + new.tolist() for prompt, new in zip(PROMPTS, tokens, strict=True)]
    apart = []
    for n, prompt in enumerate(PROMPTS):
        whole = score(pair, [rows[n], rows[n]])[0]
        want = whole[len(prompt) - 1 :][:NEW]
        apart.append(np.abs(scores[n] - want).max() / want.std())
    said = f"scores through the cache, {pair.model.config.model_type}, share of std"
    figure(said, max(apart), 2e-5)


def test_dynamic_factor_is_fixed_when_generation_starts():
    pair = tiny.pair("llama_dynamic")
    prompt = tiny.draw(6, 70)
    assert len(prompt) > pair.config.rope.context
    tokens, scores = answer(pair, [prompt])
    rows = tiny.padded([prompt + tokens[0].tolist()] * 2, LENGTH)
    by = pair.family.angles(pair.config, rows[1], jnp.full_like(rows[1], len(prompt)))
    want = np.asarray(logits_turned(*pair[1:], *rows, by))[0, len(prompt) - 1 :][:NEW]
    assert np.abs(scores[0] - want).max() <= 2e-5 * want.std()


LAYER_TYPES = [name for name, (_, fields) in tiny.TINY.items() if "layer_types" in fields]


def spelled_as_transformers_4(hf: dict, kind: str) -> dict:
    """The same config.json as transformers 4 wrote it, the rope's type under the key `kind`."""
    if "full_attention" in hf["rope_parameters"]:
        hf = dict(hf)
        two = hf.pop("rope_parameters")
        hf["rope_local_base_freq"] = two["sliding_attention"]["rope_theta"]
        hf["rope_parameters"] = two["full_attention"]
    old = {k: v for k, v in hf.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    scaling = dict(hf["rope_parameters"])
    name = scaling.pop("rope_type")
    old |= {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": "float32"}
    if name == "default" and "partial_rotary_factor" in scaling:
        old["partial_rotary_factor"] = scaling["partial_rotary_factor"]
    return old | {"rope_scaling": None if name == "default" else {kind: name} | scaling}


@pytest.mark.parametrize("kind", ["type", "rope_type"])
# Qwen3.5 came with transformers 5.
@pytest.mark.parametrize("name", [name for name in tiny.TINY if name != "qwen3_5_text"])
def test_transformers_4_spelling_gives_the_same_config(name, kind):
    pair = tiny.pair(name)
    old = spelled_as_transformers_4(pair.model.config.to_dict(), kind)
    if name in LAYER_TYPES:
        old["layer_types"] = pair.model.config.layer_types
    assert pair.family.config(old) == pair.config
    # transformers 5 reads Gemma 3's old `type` as no scaling.
    if (name, kind) != ("gemma3_text", "type"):
        again = type(pair.model.config)(**old).to_dict()
        assert pair.family.config(again) == pair.config


ROPES = {
    "plain": dict(rope_type="default", rope_theta=5e5),
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
    "llama-3.1": dict(
        rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=2048),
    "llama-3.2": dict(
        rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=2048),
    "qwen2.5 yarn": dict(
        rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=2048),
    "llama-4": dict(
        rope_type="llama3", rope_theta=5e5, factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0,
        original_max_position_embeddings=2048),
    "yarn, attention factor": dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=2048,
        attention_factor=0.7),
    "yarn, betas": dict(
        rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=1024,
        beta_fast=16, beta_slow=2, truncate=False),
    "yarn, mscale": dict(
        rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=1024,
        mscale=0.7, mscale_all_dim=1.3),
    "yarn, one mscale": dict(
        rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=1024,
        mscale=0.7),
    "yarn, no scaling": dict(
        rope_type="yarn", rope_theta=1e4, factor=1.0, original_max_position_embeddings=8192),
}  # fmt: skip


@pytest.mark.parametrize("length", [100, 20000])
@pytest.mark.parametrize("settings", ROPES.values(), ids=ROPES)
def test_angles_equal_transformers_at_real_sizes(settings, length):
    hf = dict(hidden_size=256, num_attention_heads=2, max_position_embeddings=8192)
    config = transformers.LlamaConfig(**hf, rope_parameters=dict(settings), num_key_value_heads=2)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    positions = np.unique(np.r_[0, 1, 2, length // 3, length - 1])[None]
    want = [x[0, :, :64].numpy() for x in rotary(torch.zeros(1), torch.tensor(positions))]

    r = fields.rope(hf | {"rope_parameters": settings}, 128)
    lengths = jnp.full(positions.shape, length, jnp.int32)
    for ours, other in zip(rope.angles(r, jnp.asarray(positions), lengths), want, strict=True):
        # One ulp of the frequency, times the position.
        np.testing.assert_allclose(ours[0, :, 0], other, atol=2e-7 * length + 1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    want = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), want, atol=2e-6)
