"""Families with recurrences: what only they have, beside the tests of every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

from bridge import hf
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import decoding, lora
from unsloth_jax.models import falcon_h1, family

HYBRIDS = ("qwen3_5_text", "falcon_h1")
SLOTS = 24
PROMPTS = [tiny.draw(31, 9), tiny.draw(32, 2)]


@tiny.shared_jit
def filled(family, c, params, tokens, lengths):
    return decoding.prefill(family, c, params, tokens, lengths, SLOTS, jnp.float32)[1]


@tiny.shared_jit
def step(family, c, params, cache, tokens, grow):
    return decoding.step(family, c, params, cache, tokens, grow)


@pytest.fixture(scope="module", params=HYBRIDS)
def begun(request):
    """(pair, a cache that has read PROMPTS, the second shorter than the convolution's past)."""
    pair = tiny.pair(request.param)
    lengths = jnp.asarray([len(row) for row in PROMPTS], jnp.int32)
    return pair, filled(*pair[1:], tiny.padded(PROMPTS, 9)[0], lengths)


def test_each_layer_keeps_what_it_needs_and_nothing_else(begun):
    pair, cache = begun
    c, there = pair.config, lambda arrays: [x is not None for x in arrays]
    recurrent = list(getattr(c, "delta", [True] * c.layers))
    attends = [True] * c.layers if pair.family is falcon_h1 else [not one for one in recurrent]
    assert there(cache.keys) == there(cache.values) == attends
    assert there(cache.states) == there(cache.tails) == recurrent
    empty = decoding.empty(pair.family, c, len(PROMPTS), SLOTS, jnp.float32)
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, cache)
    assert empty.slots == SLOTS


def test_a_token_that_does_not_stay_leaves_no_trace(begun):
    pair, cache = begun
    other, token = jnp.asarray([7, 8], jnp.int32), jnp.asarray([11, 12], jnp.int32)
    never, always = jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32)
    first, after = step(*pair[1:], cache, token, always)
    _, passed = step(*pair[1:], cache, other, never)
    second, again = step(*pair[1:], passed, token, always)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(
        np.testing.assert_array_equal, (after.states, after.tails), (again.states, again.tails)
    )
    gone, _ = step(*pair[1:], step(*pair[1:], cache, other, always)[1], token, always)
    assert np.abs(gone - first).max() > 0.01 * first.std()


@pytest.mark.parametrize("first", [True, False])
def test_the_gated_norm_equals_transformers_before_and_after_the_gate(first):
    pair = tiny.pair("falcon_h1")
    c, rng = pair.config, np.random.default_rng(0)
    x, gate = rng.normal(0, 1, (2, 2, 5, c.ssm_width)).astype(np.float32)
    theirs = FalconH1RMSNormGated(c.ssm_width, c.eps, c.groups, norm_before_gate=first)
    w = rng.uniform(0.5, 1.5, c.ssm_width).astype(np.float32)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(w))
        wanted = theirs(torch.tensor(x), torch.tensor(gate)).numpy()
    c = dataclasses.replace(c, norm_first=first)
    found = falcon_h1.gated(
        c, {"norm": {"weight": jnp.asarray(w)}}, jnp.asarray(x), jnp.asarray(gate)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


BAD = {
    "a limit of time steps": ("falcon_h1", dict(time_step_limit=[0.0, 0.1]), "time_step_limit"),
    "heads that don't add up": ("falcon_h1", dict(mamba_d_head=7), "mamba_n_heads=8"),
    "too few factors": ("falcon_h1", dict(ssm_multipliers=[1.0, 2.0]), "expected 5 numbers"),
    "a factor that is none": ("falcon_h1", dict(key_multiplier="2"), "key_scale"),
    "a switch that is none": ("falcon_h1", dict(mamba_rms_norm=1), "mamba_rms_norm"),
    "another kind of layer": ("falcon_h1", dict(layer_types=["mamba", "hybrid"]), "'hybrid'"),
    "no full attention": (
        "qwen3_5_text", dict(layer_types=["linear_attention"] * 4), "a full_attention among them"
    ),
    "an unknown layer": (
        "qwen3_5_text", dict(layer_types=["sliding_attention"] * 4), "sliding_attention"
    ),
    "no taps": ("qwen3_5_text", dict(linear_conv_kernel_dim=0), "linear_conv_kernel_dim=0"),
    "values without a key": (
        "qwen3_5_text", dict(linear_num_value_heads=3), "no multiple of linear_num_key_heads=2"
    ),
    "a section of images": (
        "qwen3_5_text", dict(rope_parameters=tiny.DEFAULT | {"mrope_section": 3}), "mrope_section=3"
    ),
    "an unknown field": ("qwen3_5_text", dict(linear_bias=True), "linear_bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_config_may_not_say_is_named(case):
    name, change, named = BAD[case]
    fields = tiny.pair(name).model.config.to_dict()
    family(name).config(fields)
    with pytest.raises(ValueError, match=named):
        family(name).config(fields | change)


def test_weights_that_transformers_leaves_alone_are_left_alone_and_others_refused(tmp_path):
    folder = tiny.save(tiny.reference("qwen3_5_text"), tmp_path)
    file = folder / "model.safetensors"
    tensors, one = load_file(file), np.ones(3, np.float32)
    save_file(tensors | {"mtp.fc.weight": one, "model.visual.norm.weight": one}, file)
    params = hf.load(SafetensorsSource(folder))[2]
    assert set(params) == {"model", "lm_head"} and "visual" not in params["model"]
    save_file(tensors | {"model.layers.0.linear_attn.D": one}, file)
    with pytest.raises(ValueError, match="unexpected model.layers.0.linear_attn.D"):
        hf.load(SafetensorsSource(folder))


def test_mambas_last_projection_has_no_adapter_since_peft_refuses_it():
    params = tiny.pair("falcon_h1").params
    every = lora.modules(params, "all-linear")
    assert "model.layers.*.mamba.in_proj" in every
    assert "model.layers.*.mamba.out_proj" not in every
    with pytest.raises(ValueError, match="out_proj"):
        lora.modules(params, ("out_proj",))
    delta = lora.modules(tiny.pair("qwen3_5_text").params, ("out_proj",))
    assert delta == {"model.layers.*.linear_attn.out_proj": (0, 1, 3)}


# Another value of each field that a file may hold; of the factors, of the last one in a list too.
OTHER = {
    "falcon_h1": dict(
        mamba_d_state=8, mamba_d_conv=4, mamba_conv_bias=False, mamba_proj_bias=False,
        projectors_bias=False, mamba_rms_norm=False, mamba_norm_before_gate=False, mlp_bias=False,
        mamba_n_groups=4, embedding_multiplier=2.0, lm_head_multiplier=2.0, key_multiplier=2.0,
        attention_in_multiplier=2.0, attention_out_multiplier=2.0, ssm_in_multiplier=2.0,
        ssm_out_multiplier=2.0, mlp_multipliers=[1.4, 2.0],
        ssm_multipliers=[1.3, 0.8, 0.7, 1.2, 2.0], attention_bias=False,
    ),
    "qwen3_5_text": dict(
        linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=4, linear_num_value_heads=8, attention_bias=False,
        layer_types=["full_attention"] * 4, rope_parameters=tiny.DEFAULT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_field_of_a_config_is_read(name):
    fields = tiny.pair(name).model.config.to_dict()
    same = [
        field
        for field, value in OTHER[name].items()
        if family(name).config(fields | {field: value}) == family(name).config(fields)
    ]
    assert not same


def test_sizes_that_others_decide_are_found():
    fields = tiny.pair("falcon_h1").model.config.to_dict()
    read = lambda **changes: falcon_h1.config(fields | changes)
    assert read(mamba_d_head="auto") == read()
    assert read(mamba_d_ssm=None, mamba_d_head="auto", mamba_expand=2) == read()
    with pytest.raises(ValueError, match="mamba_d_ssm=192"):
        read(mamba_d_ssm=None, mamba_expand=3)
    fields = tiny.pair("qwen3_5_text").model.config.to_dict()
    every = family("qwen3_5_text").config(fields | dict(layer_types=None, num_hidden_layers=8))
    assert every.delta == (True, True, True, False) * 2
