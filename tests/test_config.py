"""Reading config.json: every field is used, known to be harmless, or refused by name."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from hub_configs import HUB
from hub_families import DENSE

from unsloth_jax import decoder, rope
from unsloth_jax.models import FAMILIES, family

PLAIN = tiny.PLAIN | dict(tie_word_embeddings=False)


def parameters(module, c) -> int:
    """How many numbers the weights hold."""
    held = getattr(module, "layers_of", lambda c, path: range(c.layers))
    each = lambda path: len(held(c, path)) if ".*." in path else 1
    return sum(math.prod(s) * each(path) for path, (s, _) in module.weights(c).items())


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub_are_read_with_the_right_sizes(name):
    sample = HUB[name]
    module = family(sample.hf["model_type"])
    c = module.config(sample.hf)
    assert parameters(module, c) == sample.parameters
    found = dataclasses.asdict(c.rope) | {"rope_width": c.rope.width} | vars(c)
    assert {k: found[k] for k in sample.expected} == sample.expected


def test_every_dense_family_has_a_config_of_the_hub():
    assert {*DENSE} <= {sample.hf["model_type"] for sample in HUB.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_transformers_has_as_many_parameters_for_the_configs_of_the_hub(name):
    hf = {k: v for k, v in HUB[name].hf.items() if k != "quantization_config"}
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**hf)
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == HUB[name].parameters


NEEDED = {
    "ministral3": {"rope_parameters": tiny.YARN | {"llama_4_scaling_beta": 0.5}},
    "deepseek_v3": dict(num_attention_heads=2, num_key_value_heads=2, first_k_dense_replace=1),
    "qwen3_5_text": {"full_attention_interval": 2},
    "qwen3_next": {"full_attention_interval": 2},
}
# Projections that a family has joined, or never gives a bias, or has of experts alone.
WITHOUT = {
    "phi3": ("qkv_bias", "o_bias", "mlp_bias"), "glm4": ("mlp_bias",),
    "gpt_oss": ("mlp_bias",), "llama4_text": ("mlp_bias",), "mixtral": ("mlp_bias", "mlp_width"),
    "qwen3_moe": ("mlp_bias", "mlp_width"), "qwen3_next": ("mlp_bias", "mlp_width"),
}  # fmt: skip


def read(model_type: str, **changes):
    needed = NEEDED.get(model_type, {})
    return family(model_type).config(PLAIN | needed | dict(model_type=model_type) | changes)


CHANGES = {
    "vocab": 512, "width": 128, "layers": 6, "heads": 8, "kv_heads": 4, "head_width": 32,
    "mlp_width": 256, "eps": 0.1, "activation": "gelu", "tied": True, "qkv_bias": None,
    "o_bias": None, "mlp_bias": None, "windows": (4, 4, 4),
}  # fmt: skip


def scores(module, c, params) -> np.ndarray:
    return np.asarray(tiny.logits(module, c, params, *tiny.padded([tiny.draw(0, 12)], 12)))


@pytest.fixture(scope="module")
def qwen3_scores():
    pair = tiny.pair("qwen3")
    return scores(*pair[1:])


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_config_field_changes_the_weights_or_the_result(model_type, field, qwen3_scores):
    """Results are compared for one family, since all share the functions that read these."""
    module, c = family(model_type), read(model_type)
    value = not getattr(c, field) if CHANGES[field] is None else CHANGES[field]
    changed = dataclasses.replace(c, **{field: value})
    assert changed != c
    if (module.weights(c), c.layers) != (module.weights(changed), changed.layers):
        return
    assert field in ("eps", "activation", "windows") or field in WITHOUT[model_type]
    if model_type == "qwen3":
        pair = tiny.pair("qwen3")
        other = dataclasses.replace(pair.config, **{field: value})
        found = scores(module, other, pair.params)
        assert np.abs(found - qwen3_scores).max() > 0.01 * qwen3_scores.std()


ROPES = {
    "default": rope.Rope("default", 1e4, 32),
    "linear": rope.Rope("linear", 1e4, 32, factor=2.0),
    "dynamic": rope.Rope("dynamic", 1e4, 32, factor=2.0, context=8),
    "llama3": rope.Rope("llama3", 1e4, 32, factor=8.0, context=32, low=1.0, high=4.0),
    "yarn": rope.Rope(
        "yarn", 1e4, 32, factor=4.0, context=64, beta_fast=4.0, attention_factor=1.1
    ),
    "longrope": rope.Rope(
        "longrope", 1e4, 32, context=32, short=(1.5,) * 16, long=(3.0,) * 16, attention_factor=1.1
    ),
}  # fmt: skip
READ = {
    "default": "theta width attention_factor",
    "linear": "kind theta width factor attention_factor",
    "dynamic": "kind theta width factor context attention_factor",
    "llama3": "kind theta width factor context low high attention_factor",
    "yarn": "kind theta width factor context beta_fast beta_slow truncate attention_factor",
    "longrope": "kind theta context attention_factor short long",
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_field_changes_the_angles_of_the_kinds_that_read_it(kind):
    positions = jnp.arange(40, dtype=jnp.int32)[None]
    lengths = jnp.where(positions < 20, 20, 40)
    turn = lambda r: np.stack(rope.angles(r, positions, lengths))
    own = ROPES[kind]
    change = {"kind": "default", "truncate": False}
    for field in dataclasses.fields(own):
        if (kind, field.name) == ("longrope", "width"):
            continue  # its lists have a number for each pair
        value = getattr(own, field.name)
        if isinstance(value, tuple):
            value = tuple(2 * x for x in value) or (2.0,)
        elif field.name in change:
            value = change[field.name]
        else:
            value = (value or type(value)(1)) * 2
        other = turn(dataclasses.replace(own, **{field.name: value}))
        same = other.shape == turn(own).shape and np.allclose(other, turn(own), atol=1e-4)
        assert same != (field.name in READ[kind].split()), field.name


@pytest.mark.parametrize("field, value", [
    ("attn_output_gate", False), ("output_gate_type", "sigmoid"), ("mamba_ssm_dtype", "bfloat16"),
    ("mlp_only_layers", [1]),
])  # fmt: skip
def test_what_qwen3_5s_files_say_is_refused_where_it_says_something_else(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*is not supported"):
        read("qwen3_5_text", **{field: value})


YARN = {"rope_type": "yarn", "rope_theta": 1e4}
SLIDING = dict(use_sliding_window=True, sliding_window=8)
REFUSED = {
    "a field nobody knows": ("llama", dict(logit_scale=2.0), "logit_scale=2.0", "hidden_size"),
    "a field of another family": ("llama", dict(sliding_window=8), "sliding_window=8", "mlp_bias"),
    "a switch of others": ("qwen2", dict(attention_bias=True), "attention_bias", "layer_types"),
    "dropout": ("llama", dict(attention_dropout=0.1), "attention_dropout=0.1", "(0, None)"),
    "interleaved rope": ("llama", dict(rope_interleaved=True), "rope_interleaved=True", "False"),
    "part of a head": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5", "1"),
    "both directions": ("llama", dict(is_causal=False), "is_causal=False", "True"),
    "activation": ("qwen3", dict(hidden_act="swish2"), "'swish2'", "silu"),
    "biases of joined projections": ("phi3", dict(attention_bias=True), "attention_bias", "False"),
    "full layers only now and then": ("phi3", dict(full_attn_mod=2), "full_attn_mod=2", "(1,)"),
    "biases of a head": ("phi3", dict(lm_head_bias=True), "lm_head_bias=True", "False"),
    "no gate": ("cohere2", dict(use_gated_activation=False), "use_gated_activation=False", "True"),
    "one after another": ("cohere2", dict(use_parallel_block=False), "use_parallel_block", "True"),
    "two epsilons": (
        "starcoder2", dict(layer_norm_epsilon=1e-3), "layer_norm_epsilon=0.001", "1e-05"),
    "two activations": ("gemma2", dict(hidden_act="silu"), "'silu'", "gelu_pytorch_tanh"),
    "two windows": ("gemma2", dict(sliding_window_size=8), "sliding_window_size=8", "4096"),
    "another kind of norm": ("starcoder2", dict(norm_type="rms"), "norm_type='rms'", "layer_norm"),
    "a share of a head": ("cohere2", dict(rotary_pct=0.5), "rotary_pct=0.5", "1"),
    "full layers first": (
        "cohere2", dict(order_of_interleaved_layers="global_attn_first"), "global_attn_first",
        "local_attn_first"),
    "rope type": ("llama", dict(rope_scaling={"type": "ntk", "factor": 2.0}), "'ntk'", "llama3"),
    "longrope": ("llama", dict(rope_parameters={"rope_type": "longrope"}), "'longrope'", "short_"),
    "rope key": (
        "llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "alpha": 1.0}),
        "alpha", "factor"),
    "rope key of another type": (
        "llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}),
        "beta_fast", "'linear'"),
    "part of a head in rope": (
        "llama", dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        "partial_rotary_factor=0.5", "only 1"),
    "ropes by layer": (
        "qwen3", dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "full_attention", "rope_type"),
    "two ropes": (
        "llama", dict(rope_parameters=YARN | {"factor": 2.0}, rope_scaling={"type": "linear"}),
        "rope_scaling", "rope_parameters"),
    "no linear factor": ("llama", dict(rope_scaling={"type": "linear"}), "'factor'", "linear"),
    "no dynamic factor": (
        "llama", dict(rope_scaling={"type": "dynamic", "factor": None}), "'factor'", "dynamic"),
    "no yarn factor": ("qwen3", dict(rope_parameters=YARN), "'factor'", "yarn"),
    "no llama3 factors": (
        "llama", dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "low_freq_factor", "high_freq_factor"),
    "layer types": (
        "qwen3", SLIDING | dict(layer_types=["full_attention", "chunked_attention"] * 2),
        "chunked_attention", "sliding_attention"),
    "too few layer types": (
        "qwen2", SLIDING | dict(layer_types=["full_attention"] * 2), "got 2", "3 of"),
    "layer types without window": (
        "qwen3", dict(layer_types=["sliding_attention"] * 3), "sliding_window", "not set"),
    "no heads": ("llama", dict(num_attention_heads=0), "num_attention_heads=0", "over 0"),
    "a size in quotes": ("qwen2", dict(vocab_size="512"), "vocab_size='512'", "whole number"),
    "half a layer": ("llama", dict(num_hidden_layers=2.5), "num_hidden_layers=2.5", "over 0"),
    "fewer than no layers": ("llama", dict(num_hidden_layers=-1), "num_hidden_layers=-1", "over 0"),
    "heads that share nothing": (
        "llama", dict(num_key_value_heads=3), "num_key_value_heads=3", "multiple"),
    "heads of no whole width": (
        "llama", dict(num_attention_heads=6), "hidden_size=64", "num_attention_heads=6"),
    "an odd head": ("llama", dict(head_dim=7), "7 wide", "even head_dim"),
    "a switch in quotes": (
        "llama", dict(tie_word_embeddings="true"), "tie_word_embeddings='true'", "true or false"),
    "no epsilon": ("llama", dict(rms_norm_eps=None), "rms_norm_eps=None", "over 0"),
    "no activation": ("llama", dict(hidden_act=None), "hidden_act None", "silu"),
    "a window of nothing": ("mistral", dict(sliding_window=0), "sliding_window=0", "over 0"),
    "rope in words": ("llama", dict(rope_parameters="x"), "rope_parameters='x'", "rope_theta"),
    "factor zero": (
        "llama", dict(rope_scaling={"type": "linear", "factor": 0}), "factor=0", "over 0"),
    "factor in quotes": (
        "qwen3", dict(rope_scaling={"type": "dynamic", "factor": "2"}), "factor='2'", "over 0"),
    "factor not a number": (
        "llama", dict(rope_scaling={"type": "linear", "factor": math.nan}), "factor=nan", "over 0"),
    "theta below zero": ("llama", dict(rope_theta=-1.0), "rope_theta=-1.0", "over 0"),
    "truncate in quotes": (
        "llama", dict(rope_parameters=YARN | {"factor": 2.0, "truncate": "no"}),
        "truncate='no'", "true or false"),
    "llama3 factors swapped": (
        "llama", dict(rope_parameters=tiny.LLAMA3 | {"low_freq_factor": 8.0}),
        "low_freq_factor=8.0", "got 4.0"),
    "fewer keys than queries": (
        "deepseek_v3", dict(num_attention_heads=4), "num_attention_heads=4", "as many"),
    "a head of another width": (
        "deepseek_v3", dict(head_dim=32), "head_dim=32", "qk_rope_head_dim=64"),
    "routing by softmax": ("deepseek_v3", dict(scoring_func="softmax"), "'softmax'", "sigmoid"),
    "another choice of experts": ("deepseek_v3", dict(topk_method="greedy"), "greedy", "noaux_tc"),
    "mixtures with gaps": ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq=2", "1"),
    "two predicted tokens": (
        "deepseek_v3", dict(num_nextn_predict_layers=2), "num_nextn_predict_layers=2", "(0, 1"),
    "uneven groups": ("deepseek_v3", dict(n_group=7), "n_group=7", "equal groups"),
    "groups of one": ("glm4_moe", dict(n_group=128), "n_group=128", "2 or more"),
    "too many groups": ("glm4_moe", dict(topk_group=2), "topk_group=2", "room in"),
    "no room in groups": (
        "glm4_moe", dict(n_group=32, topk_group=1), "num_experts_per_tok=8", "room in"),
    "dense layers below zero": (
        "glm4_moe", dict(first_k_dense_replace=-1), "first_k_dense_replace=-1", "from 0 on"),
    "no shared experts": ("glm4_moe", dict(n_shared_experts=0), "n_shared_experts=0", "over 0"),
    "a context that rope is not from": (
        "gpt_oss", dict(initial_context_length=2048), "initial_context_length=2048", "4096"),
    "two numbers of a token's experts": (
        "gpt_oss", dict(experts_per_token=2), "experts_per_token=2", "num_experts_per_tok=4"),
    "another gate": ("gpt_oss", dict(hidden_act="gelu"), "hidden_act='gelu'", "silu"),
    "a limit in quotes": ("gpt_oss", dict(swiglu_limit="7"), "swiglu_limit='7'", "over 0"),
    "windows of no length": (
        "gpt_oss", dict(sliding_window=None), "sliding_window is null", "layer_types"),
    "no chunk": (
        "llama4_text", dict(attention_chunk_size=None), "attention_chunk_size=None", "over 0"),
    "windows for chunks": (
        "llama4_text", dict(layer_types=["sliding_attention"] * 3), "sliding_attention",
        "chunked_attention"),
    "layers that are not there": (
        "llama4_text", dict(moe_layers=[0, 3]), "[0, 3]", "the 3 layers"),
    "rope here and there": ("llama4_text", dict(no_rope_layers=[1, 0]), "[1, 0]", "3 of 0 and 1"),
    "tuning by a number": (
        "llama4_text", dict(attn_temperature_tuning=4), "attn_temperature_tuning=4",
        "true or false"),
    "experts as modules": (
        "llama4_text", dict(for_llm_compressor=True), "for_llm_compressor=True", "False"),
    "more experts than there are": (
        "llama4_text", dict(num_local_experts=2, num_experts_per_tok=3), "num_experts_per_tok=3",
        "no more"),
    "head of its own": ("qwen2", dict(head_dim=64), "head_dim=64", "qwen2"),
}  # fmt: skip


@pytest.mark.parametrize("model_type, changes, given, known", REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_name(model_type, changes, given, known):
    with pytest.raises(ValueError) as error:
        read(model_type, **changes)
    assert given in str(error.value) and known in str(error.value)


def test_defaults_of_gpt_oss_are_those_of_transformers():
    sizes = dict(num_hidden_layers=6, hidden_size=64, intermediate_size=32, vocab_size=99)
    given = sizes | dict(num_attention_heads=16, model_type="gpt_oss")
    theirs = transformers.GptOssConfig(**given).to_dict()
    assert family("gpt_oss").config(given) == family("gpt_oss").config(theirs)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'gpt2'.*llama.*mistral.*qwen2.*qwen3"):
        family("gpt2")


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_size_is_refused_by_name(missing):
    hf = {k: v for k, v in PLAIN.items() if k != missing} | {"model_type": "llama"}
    with pytest.raises(ValueError, match=rf"lacks \['{missing}'\]"):
        family("llama").config(hf)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts():
    scaling = YARN | {"original_max_position_embeddings": 16}
    assert read("llama", rope_parameters=scaling).rope.factor == 4.0


def test_a_bias_switch_adds_its_weights_and_no_others():
    plain = family("llama").weights(read("llama"))
    names = lambda **on: {
        p.split(".")[-2] for p in set(family("llama").weights(read("llama", **on))) - set(plain)
    }
    assert names(attention_bias=True) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names(mlp_bias=True) == {"gate_proj", "up_proj", "down_proj"}


def test_layers_of_llama_4_follow_their_lists_or_their_steps():
    by_step = read("llama4_text", num_hidden_layers=8, interleave_moe_layer_step=2)
    assert by_step.sparse == (False, True) * 4
    assert by_step.turned == by_step.chunked == ((True,) * 3 + (False,)) * 2
    assert read("llama4_text", no_rope_layers=[]) == read("llama4_text")
    lists = dict(no_rope_layers=[1, 0, 0], moe_layers=[], layer_types=["full_attention"] * 3)
    c = read("llama4_text", **lists, attention_chunk_size=None)
    assert (c.turned, c.sparse, c.chunk) == ((True, False, False), (False,) * 3, None)
    assert not any(
        "expert" in path or "router" in path for path in family("llama4_text").weights(c)
    )


def test_windows_start_at_max_window_layers():
    assert read("qwen2", **SLIDING, max_window_layers=2).windows == (None, None, 8)
    assert read("qwen2", **SLIDING).windows == (None, None, None)
    assert read("qwen3", **SLIDING, max_window_layers=0).windows == (8, 8, 8)


def test_all_layers_of_qwen3_moe_have_the_window():
    """transformers' `qwen3_moe` has neither max_window_layers nor layer_types."""
    own = SLIDING | dict(max_window_layers=2)
    assert read("qwen3_moe", **own).windows == (8, 8, 8)
    assert read("qwen3_moe", **own, layer_types=["sliding_attention"] * 3).windows == (8, 8, 8)
    assert read("qwen3_moe", use_sliding_window=True).windows == (4096,) * 3
    assert read("qwen3_moe", sliding_window=8).windows == (None,) * 3
    assert read("qwen2", use_sliding_window=True, max_window_layers=1).windows[1:] == (4096,) * 2
    with pytest.raises(ValueError, match="'full_attention'.* expected all layers alike"):
        read("qwen3_moe", **own, layer_types=["sliding_attention"] * 2 + ["full_attention"])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("given", ["0", 1, ["0"], [True]])
def test_layers_without_a_mixture_are_named_by_number(name, given):
    with pytest.raises(ValueError, match="mlp_only_layers=.*expected a list"):
        read(name, mlp_only_layers=given)


@pytest.mark.parametrize("name, field", [
    ("qwen3_moe", "layer_types"), ("qwen3_5_text", "layer_types"), ("gemma2", "layer_types"),
    ("llama4_text", "moe_layers"), ("smollm3", "no_rope_layers"), ("qwen3_next", "mlp_only_layers"),
])  # fmt: skip
def test_what_is_said_of_layers_is_a_list(name, field):
    with pytest.raises(ValueError, match=f"{field}=7, expected a list"):
        read(name, **{field: 7})


def test_document_lengths_count_each_segment_of_each_row():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]], jnp.int32)
    want = [[2, 2, 3, 3, 3, 1], [6] * 6]
    assert decoder.document_lengths(segments).tolist() == want
