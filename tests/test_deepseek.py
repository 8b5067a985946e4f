"""DeepSeek-V3's kind of mixture and its latent attention: what the tests of all families leave."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from bridge import hf, merge
from bridge.places import places
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import experts, tree
from unsloth_jax.lora import trained
from unsloth_jax.models import family

BOTH = ("glm4_moe", "deepseek_v3")
CORRECTION = "model.layers.*.mlp.gate.e_score_correction_bias"


def router(groups: int, kept: int, renormalized: bool) -> torch.nn.Module:
    """transformers' router of 16 experts, 4 of them for a token."""
    config = transformers.DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=groups,
        topk_group=kept, norm_topk_prob=renormalized, routed_scaling_factor=1.7,
    )  # fmt: skip
    out = DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(out.weight, std=0.3)
    torch.nn.init.normal_(out.e_score_correction_bias, std=0.3)
    return out


@pytest.mark.parametrize("renormalized", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (2, 1), (4, 2), (8, 2), (4, 4)])
def test_tokens_go_where_transformers_sends_them(groups, kept, renormalized):
    theirs, x = router(groups, kept, renormalized), torch.randn(200, 32)
    with torch.no_grad():
        _, weights, chosen = theirs(x)
        want = torch.zeros(200, 16).scatter(1, chosen, weights).numpy()
    node = {"weight": jnp.asarray(theirs.weight.detach().numpy())}
    correction = jnp.asarray(theirs.e_score_correction_bias.numpy())
    scores = experts.router_scores(node, jnp.asarray(x.numpy()))
    route = experts.sigmoid_route(scores, correction, 4, renormalized, groups, kept, 1.7)
    got = np.zeros((200, 16), np.float32)
    np.put_along_axis(got, np.asarray(route.experts), np.asarray(route.weights), 1)
    np.testing.assert_allclose(got, want, atol=1e-6)
    uncorrected = experts.sigmoid_route(scores, 0 * correction, 4, renormalized, groups, kept)
    assert (np.sort(uncorrected.experts, 1) != np.sort(route.experts, 1)).any(1).mean() > 0.2


@pytest.mark.parametrize("name", BOTH)
def test_the_correction_keeps_float32_through_16_bits_and_back(name, tmp_path):
    model = tiny.reference(name)
    source = SafetensorsSource(tiny.save(model, tmp_path))
    module, c, params = hf.load(source, dtype=jnp.bfloat16, quantize="nf4")
    assert tree.flatten(params)[CORRECTION].parts[0].dtype == jnp.float32
    for dtype, where in ((None, source), ("bfloat16", source), ("bfloat16", None)):
        kept = merge.merged(module, c, params, None, 1.0, where, dtype)
        found = {w.name: w for w in kept.weights}
        for i in (1, 2):
            w, own = found[CORRECTION.replace("*", str(i))], model.model.layers[i].mlp.gate
            np.testing.assert_array_equal(w.read(), own.e_score_correction_bias.numpy())
            assert w.dtype == np.float32
        assert found["model.norm.weight"].dtype != np.float32


def test_the_correction_is_not_trained_with_all_weights():
    params = tiny.pair("deepseek_v3").params
    whole = tree.flatten(trained.init(params, trained.EVERYTHING))
    assert set(tree.flatten(params)) - set(whole) == {CORRECTION}
    left = trained.vacated(params, tree.unflatten(whole))
    assert tree.flatten(left)[CORRECTION] is tree.flatten(params)[CORRECTION]


def with_more(folder, *names: str) -> SafetensorsSource:
    """The checkpoint with further tensors."""
    file = folder / "model.safetensors"
    more = {name: np.ones((2, 2), np.float32) for name in names}
    save_file(load_file(file) | more, file, {"format": "pt"})
    return SafetensorsSource(folder)


@pytest.mark.parametrize("name", BOTH)
def test_layers_that_predict_further_tokens_are_left_out_and_nothing_else(name, tmp_path):
    folder = tiny.save(tiny.reference(name), tmp_path)
    behind = ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight")
    _, c, params = hf.load(with_more(folder, *behind))
    again = jax.tree.map(lambda x, y: bool((x == y).all()), params, tiny.pair(name).params)
    assert c.layers == 3 and all(jax.tree.leaves(again))
    with pytest.raises(ValueError, match="unexpected model.layers.4.eh_proj.weight"):
        hf.load(with_more(folder, "model.layers.4.eh_proj.weight"))


def test_a_layer_too_many_is_refused_where_no_layer_predicts_further_tokens(tmp_path):
    folder = tiny.save(tiny.reference("qwen3_moe"), tmp_path)
    with pytest.raises(ValueError, match="unexpected model.layers.3.eh_proj.weight"):
        hf.load(with_more(folder, "model.layers.3.eh_proj.weight"))


ROPE = dict(
    type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
    original_max_position_embeddings=4096,
)  # fmt: skip
ONCE = dict(
    hidden_act="silu", attention_bias=False, norm_topk_prob=True, num_nextn_predict_layers=1,
    initializer_range=0.02, use_cache=True, tie_word_embeddings=False, attention_dropout=0.0,
)  # fmt: skip
DEEPSEEK = ONCE | dict(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
    num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, ep_size=1,
    moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
    n_group=8, topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, seq_aux=True,
    aux_loss_alpha=0.001, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc",
    rms_norm_eps=1e-6, max_position_embeddings=163840, rope_theta=10000, rope_scaling=ROPE,
    pretraining_tp=1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
REAL = {
    "DeepSeek-V3": DEEPSEEK,
    "Moonlight": DEEPSEEK | dict(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, moe_intermediate_size=1408,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1,
        first_k_dense_replace=1, routed_scaling_factor=2.446, q_lora_rank=None, rope_theta=5e4,
        rope_scaling=None, num_nextn_predict_layers=0, max_position_embeddings=8192),
    "GLM-4.5-Air": ONCE | dict(
        model_type="glm4_moe", vocab_size=151552, hidden_size=4096, intermediate_size=10944,
        num_hidden_layers=46, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        moe_intermediate_size=1408, n_routed_experts=128, n_shared_experts=1,
        num_experts_per_tok=8, n_group=1, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=1.0, use_qk_norm=False, partial_rotary_factor=0.5,
        rms_norm_eps=1e-5, rope_theta=1e6, rope_scaling=None, max_position_embeddings=131072),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_weights_of_real_sizes_are_those_of_transformers(name):
    module = family(REAL[name]["model_type"])
    ours = {n: p.shape for n, p in places(module, module.config(REAL[name])).items()}
    config = transformers.AutoConfig.for_model(**REAL[name])
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    alike = {n: tuple(x.shape) for n, x in theirs.items() if ".experts." not in n}
    assert {n: s for n, s in ours.items() if ".experts." not in n} == alike
    count = sum(map(math.prod, ours.values()))
    assert count == sum(x.numel() for x in theirs.values())


def test_yarn_of_real_sizes_scales_scores_as_transformers_does():
    c = family("deepseek_v3").config(DEEPSEEK)
    config = transformers.AutoConfig.for_model(**DEEPSEEK | dict(num_hidden_layers=1))
    with torch.device("meta"):
        attention = transformers.AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    np.testing.assert_allclose(c.score_scale, attention.scaling, rtol=1e-12)
    assert c.score_scale > 1.8 * 192**-0.5 and c.rope.attention_factor == 1.0


def test_checkpoints_in_fp8_are_refused_by_name(tmp_path):
    model = tiny.reference("deepseek_v3")
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model.config.save_pretrained(tmp_path)
    torch_free = {"model.norm.weight": np.ones(64, np.float32)}
    save_file(torch_free, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="quant_method 'fp8'"):
        hf.load(SafetensorsSource(tmp_path))
