"""config.json of more families on the hub, as their authors wrote them; see hub_configs.py."""

import math
from typing import Any, NamedTuple


class Sample(NamedTuple):
    hf: dict[str, Any]
    parameters: int  # as the hub counts them, or transformers where it counts a tied head twice
    expected: dict[str, Any]  # fields of our Config


# Families that are neither mixtures of experts nor hybrids.
DENSE = (
    "llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3",
    "granite", "cohere", "cohere2", "olmo2", "smollm3", "starcoder2", "glm4", "exaone4",
)  # fmt: skip
FURTHER = (
    "mixtral", "qwen3_moe", "gpt_oss", "llama4_text", "qwen3_5_text", "qwen3_next", "falcon_h1",
    "glm4_moe", "deepseek_v3",
)  # fmt: skip
COMMON = dict(
    attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, torch_dtype="bfloat16",
    use_cache=True,
)  # fmt: skip
PLAIN = COMMON | dict(attention_bias=False)
GEMMA = PLAIN | dict(
    architectures=["GemmaForCausalLM"], model_type="gemma", bos_token_id=2, eos_token_id=1,
    head_dim=256, max_position_embeddings=8192, pad_token_id=0, rms_norm_eps=1e-06,
    rope_theta=10000.0, vocab_size=256000,
)  # fmt: skip
GEMMA_2 = GEMMA | dict(
    architectures=["Gemma2ForCausalLM"], model_type="gemma2", attn_logit_softcapping=50.0,
    cache_implementation="hybrid", final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096,
)  # fmt: skip
GEMMA_3 = {k: v for k, v in GEMMA_2.items() if k != "hidden_act"} | dict(
    architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", attn_logit_softcapping=None,
    final_logit_softcapping=None, max_position_embeddings=32768, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, vocab_size=262144,
)  # fmt: skip
PHI_3 = PLAIN | dict(
    architectures=["Phi3ForCausalLM"], model_type="phi3", bos_token_id=1, embd_pdrop=0.0,
    eos_token_id=32000, hidden_size=3072, intermediate_size=8192, num_attention_heads=32,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, num_hidden_layers=32,
    original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
    rms_norm_eps=1e-05, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=32064,
)  # fmt: skip
GRANITE = PLAIN | dict(
    architectures=["GraniteForCausalLM"], model_type="granite", bos_token_id=0, eos_token_id=0,
    embedding_multiplier=12.0, max_position_embeddings=131072, mlp_bias=False,
    num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8, pad_token_id=0,
    residual_multiplier=0.22, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000000.0,
    tie_word_embeddings=True,
)  # fmt: skip
COHERE = PLAIN | dict(
    architectures=["CohereForCausalLM"], model_type="cohere", bos_token_id=5, eos_token_id=255001,
    layer_norm_eps=1e-05, max_position_embeddings=8192, pad_token_id=0, rope_scaling=None,
    vocab_size=256000,
)  # fmt: skip
COHERE_2 = COHERE | dict(
    architectures=["Cohere2ForCausalLM"], model_type="cohere2", cache_implementation="hybrid",
    head_dim=128, layer_switch=4, order_of_interleaved_layers="local_attn_first",
    position_embedding_type="rope_gptj", rope_theta=50000, rotary_pct=1.0, sliding_window=4096,
    sliding_window_pattern=4, use_embedding_sharing=True, use_gated_activation=True,
    use_parallel_block=True, use_parallel_embedding=True,
)  # fmt: skip
OLMO_2 = PLAIN | dict(
    architectures=["Olmo2ForCausalLM"], model_type="olmo2", eos_token_id=100257,
    max_position_embeddings=4096, pad_token_id=100277, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=500000, tie_word_embeddings=False, torch_dtype="float32", vocab_size=100352,
)  # fmt: skip
STARCODER_2 = COMMON | dict(
    architectures=["Starcoder2ForCausalLM"], model_type="starcoder2", attention_dropout=0.1,
    bos_token_id=0, embedding_dropout=0.1, eos_token_id=0, hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=16384, mlp_type="default", norm_epsilon=1e-05, norm_type="layer_norm",
    residual_dropout=0.1, sliding_window=4096, use_bias=True, vocab_size=49152,
)  # fmt: skip
GLM_4 = COMMON | dict(
    architectures=["Glm4ForCausalLM"], model_type="glm4", eos_token_id=[151329, 151336, 151338],
    head_dim=128, max_position_embeddings=32768, pad_token_id=151329, partial_rotary_factor=0.5,
    rms_norm_eps=1e-05, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=151552,
)  # fmt: skip
EXAONE_4 = COMMON | dict(
    architectures=["Exaone4ForCausalLM"], model_type="exaone4", bos_token_id=1, eos_token_id=361,
    pad_token_id=0, rms_norm_eps=1e-05, rope_theta=1000000, vocab_size=102400,
    rope_scaling=dict(
        factor=16.0, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3"),
)  # fmt: skip
LOCAL, FULL = "sliding_attention", "full_attention"
# Phi-4-mini's; the lists of Phi-3.5 have other numbers, as many.
PHI_4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip


# Text models of the hub's Qwen3.5, which have images beside them: its `text_config` as other
# projects on GitHub have it in their tests (Qwen3.5-27B) or say that it is (0.8B).
DELTAS = ["linear_attention"] * 3 + ["full_attention"]
QWEN_3_5 = PLAIN | dict(
    model_type="qwen3_5_text", attn_output_gate=True, bos_token_id=248044, eos_token_id=248044,
    dtype="bfloat16", full_attention_interval=4, head_dim=256, linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_num_key_heads=16, linear_value_head_dim=128,
    mamba_ssm_dtype="float32", max_position_embeddings=262144, mtp_num_hidden_layers=1,
    mtp_use_dedicated_embeddings=False, rms_norm_eps=1e-6, vocab_size=248320,
    rope_parameters=dict(
        mrope_interleaved=True, mrope_section=[11, 11, 10], partial_rotary_factor=0.25,
        rope_theta=10000000.0, rope_type="default"),
)  # fmt: skip
MORE: dict[str, Sample] = {
    "google/gemma-2b": Sample(
        GEMMA | dict(
            hidden_act="gelu", hidden_size=2048, intermediate_size=16384, num_attention_heads=8,
            num_hidden_layers=18, num_key_value_heads=1, rope_scaling=None,
        ),
        2_506_172_416,
        dict(kv_heads=1, head_width=256, activation="gelu_pytorch_tanh", tied=True),
    ),
    "google/gemma-7b-it, 1.1": Sample(
        GEMMA | dict(
            hidden_act="gelu", hidden_activation="gelu_pytorch_tanh", hidden_size=3072,
            intermediate_size=24576, num_attention_heads=16, num_hidden_layers=28,
            num_key_value_heads=16,
        ),
        8_537_680_896,
        dict(kv_heads=16, head_width=256, activation="gelu_pytorch_tanh", tied=True),
    ),
    "google/gemma-2-2b-it": Sample(
        GEMMA_2 | dict(
            eos_token_id=[1, 107], hidden_size=2304, intermediate_size=9216, num_attention_heads=8,
            num_hidden_layers=26, num_key_value_heads=4,
        ),
        2_614_341_888,
        dict(windows=(4096, None) * 13, scale=0.0625, attention_cap=50.0, logit_cap=30.0),
    ),
    "google/gemma-2-9b": Sample(
        GEMMA_2 | dict(
            hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
            num_hidden_layers=42, num_key_value_heads=8, sliding_window_size=4096,
        ),
        9_241_705_984,
        dict(windows=(4096, None) * 21, scale=0.0625, head_width=256),
    ),
    "google/gemma-3-1b-it": Sample(
        GEMMA_3 | dict(
            cache_implementation="hybrid", eos_token_id=[1, 106], hidden_size=1152,
            intermediate_size=6912, num_attention_heads=4, num_hidden_layers=26,
            num_key_value_heads=1, rope_local_base_freq=10000, sliding_window_pattern=6,
        ),
        999_885_952,
        dict(windows=((512,) * 5 + (None,)) * 4 + (512, 512), theta=1e6, scale=0.0625),
    ),
    "google/gemma-3-270m": Sample(
        GEMMA_3 | dict(
            _sliding_window_pattern=6, hidden_size=640, intermediate_size=2048,
            layer_types=([LOCAL] * 5 + [FULL]) * 3, num_attention_heads=4, num_hidden_layers=18,
            num_key_value_heads=1, rope_local_base_freq=10000.0, use_bidirectional_attention=False,
        ),
        268_098_176,
        dict(windows=((512,) * 5 + (None,)) * 3, head_width=256, tied=True),
    ),
    "microsoft/Phi-3-mini-4k-instruct": Sample(
        PHI_3 | dict(
            max_position_embeddings=4096, num_key_value_heads=32, rope_scaling=None,
            sliding_window=2047, transformers_version="4.40.2",
        ),
        3_821_079_552,
        dict(windows=(2047,) * 32, kv_heads=32, head_width=96, kind="default"),
    ),
    "microsoft/Phi-3.5-mini-instruct": Sample(
        PHI_3 | dict(
            max_position_embeddings=131072, num_key_value_heads=32, sliding_window=262144,
            rope_scaling=dict(long_factor=PHI_4_LONG, short_factor=[1.0] * 48, type="longrope"),
        ),
        3_821_079_552,
        dict(kind="longrope", context=4096, rope_width=96, attention_factor=math.sqrt(17 / 12)),
    ),
    "microsoft/phi-4": Sample(
        PHI_3 | dict(
            bos_token_id=100257, eos_token_id=100265, hidden_size=5120, intermediate_size=17920,
            max_position_embeddings=16384, num_attention_heads=40, num_hidden_layers=40,
            num_key_value_heads=10, original_max_position_embeddings=16384, pad_token_id=100349,
            rope_scaling=None, rope_theta=250000, sliding_window=None, vocab_size=100352,
        ),
        14_659_507_200,
        dict(windows=(None,) * 40, kv_heads=10, head_width=128, theta=2.5e5),
    ),
    "microsoft/Phi-4-mini-instruct": Sample(
        PHI_3 | dict(
            bos_token_id=199999, eos_token_id=199999, full_attn_mod=1, interpolate_factor=1,
            lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False,
            num_attention_heads=24, num_key_value_heads=8, pad_token_id=199999,
            partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True,
            rope_scaling=dict(long_factor=PHI_4_LONG, short_factor=[1.0] * 48, type="longrope"),
            vocab_size=200064,
        ),
        3_836_021_760,
        dict(kind="longrope", head_width=128, context=4096, rope_width=96, tied=True),
    ),
    "ibm-granite/granite-3.3-2b-instruct": Sample(
        GRANITE | dict(
            attention_multiplier=0.015625, hidden_size=2048, intermediate_size=8192,
            logits_scaling=8.0, vocab_size=49159,
        ),
        2_533_539_840,
        dict(scale=0.015625, embedding_scale=12.0, residual_scale=0.22, logit_divisor=8.0),
    ),
    "ibm-granite/granite-3.1-8b-instruct": Sample(
        GRANITE | dict(
            attention_multiplier=0.0078125, hidden_size=4096, intermediate_size=12800,
            logits_scaling=16.0, vocab_size=49155,
        ),
        8_170_848_256,
        dict(scale=0.0078125, logit_divisor=16.0, theta=1e7, head_width=128),
    ),
    "CohereForAI/c4ai-command-r-v01": Sample(
        COHERE | dict(
            hidden_size=8192, intermediate_size=22528, logit_scale=0.0625,
            model_max_length=131072, num_attention_heads=64, num_hidden_layers=40,
            num_key_value_heads=64, pretraining_tp=1, rope_theta=8000000.0, torch_dtype="float16",
        ),
        34_980_831_232,
        dict(logit_scale=0.0625, qk_norm=False, theta=8e6, tied=True),
    ),
    "CohereForAI/c4ai-command-r-plus": Sample(
        COHERE | dict(
            hidden_size=12288, intermediate_size=33792, logit_scale=0.8333333333333334,
            model_max_length=131072, num_attention_heads=96, num_hidden_layers=64,
            num_key_value_heads=8, rope_theta=75000000.0, torch_dtype="float16", use_qk_norm=True,
        ),
        103_810_674_688,
        dict(kv_heads=8, qk_norm=True, theta=7.5e7),
    ),
    "CohereForAI/c4ai-command-r7b-12-2024": Sample(
        COHERE_2 | dict(
            hidden_size=4096, intermediate_size=14336, logit_scale=0.25, num_attention_heads=32,
            num_hidden_layers=32, num_key_value_heads=8,
        ),
        8_028_033_024,
        dict(windows=(4096, 4096, 4096, None) * 8, head_width=128, theta=5e4, logit_scale=0.25),
    ),
    "CohereLabs/tiny-aya-earth": Sample(
        COHERE_2 | dict(
            bos_token_id=2, eos_token_id=3, hidden_size=2048, intermediate_size=11008,
            layer_types=[LOCAL, LOCAL, LOCAL, FULL] * 9, logit_scale=1.0, num_attention_heads=16,
            num_hidden_layers=36, num_key_value_heads=4, use_qk_norm=False, vocab_size=262144,
        ),
        3_349_227_520,
        dict(windows=(4096, 4096, 4096, None) * 9, logit_scale=1.0, kv_heads=4),
    ),
    "allenai/OLMo-2-0425-1B": Sample(
        OLMO_2 | dict(
            hidden_size=2048, intermediate_size=8192, num_attention_heads=16,
            num_hidden_layers=16, num_key_value_heads=16,
        ),
        1_484_916_736,
        dict(kv_heads=16, head_width=128, theta=5e5, tied=False),
    ),
    "allenai/OLMo-2-1124-7B": Sample(
        OLMO_2 | dict(
            hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
            num_hidden_layers=32, num_key_value_heads=32,
        ),
        7_298_617_344,
        dict(kv_heads=32, head_width=128, eps=1e-6),
    ),
    "HuggingFaceTB/SmolLM3-3B": Sample(
        PLAIN | dict(
            architectures=["SmolLM3ForCausalLM"], model_type="smollm3", bos_token_id=None,
            eos_token_id=128012, hidden_size=2048, intermediate_size=11008,
            layer_types=[FULL] * 36, max_position_embeddings=65536, max_window_layers=28,
            mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9,
            num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=4,
            pad_token_id=128004, pretraining_tp=2, rms_norm_eps=1e-06, rope_scaling=None,
            rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, vocab_size=128256,
        ),
        3_075_098_624,
        dict(turned=(True, True, True, False) * 9, windows=(None,) * 36, theta=5e6, tied=True),
    ),
    "bigcode/starcoder2-3b": Sample(
        STARCODER_2 | dict(
            hidden_size=3072, initializer_range=0.018042, intermediate_size=12288,
            num_attention_heads=24, num_hidden_layers=30, num_key_value_heads=2,
            rope_theta=999999.4420358813,
        ),
        3_030_371_328,
        dict(kv_heads=2, windows=(4096,) * 30, mlp_bias=True, tied=True),
    ),
    "bigcode/starcoder2-7b": Sample(
        STARCODER_2 | dict(
            hidden_size=4608, initializer_range=0.018042, intermediate_size=18432,
            num_attention_heads=36, num_hidden_layers=32, num_key_value_heads=4,
            rope_theta=1000000,
        ),
        7_173_923_840,
        dict(kv_heads=4, windows=(4096,) * 32, head_width=128),
    ),
    "zai-org/GLM-4-9B-0414": Sample(
        GLM_4 | dict(
            attention_bias=True, hidden_size=4096, intermediate_size=13696,
            num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=2,
        ),
        9_400_279_040,
        dict(kv_heads=2, rope_width=64, qkv_bias=True, o_bias=False),
    ),
    "zai-org/GLM-4-32B-0414": Sample(
        GLM_4 | dict(
            attention_bias=False, hidden_size=6144, intermediate_size=23040,
            num_attention_heads=48, num_hidden_layers=61, num_key_value_heads=2,
        ),
        32_566_081_536,
        dict(kv_heads=2, rope_width=64, qkv_bias=False),
    ),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": Sample(
        EXAONE_4 | dict(
            head_dim=64, hidden_size=2048, intermediate_size=4096, layer_types=[FULL] * 30,
            max_position_embeddings=65536, num_attention_heads=32, num_hidden_layers=30,
            num_key_value_heads=8, sliding_window=None, sliding_window_pattern=None,
            tie_word_embeddings=True,
        ),
        1_279_391_488,
        dict(windows=(None,) * 30, turned=(True,) * 30, kind="llama3", factor=16.0, tied=True),
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": Sample(
        EXAONE_4 | dict(
            head_dim=128, hidden_size=5120, intermediate_size=27392,
            layer_types=[LOCAL, LOCAL, LOCAL, FULL] * 16, max_position_embeddings=131072,
            num_attention_heads=40, num_hidden_layers=64, num_key_value_heads=8,
            sliding_window=4096, sliding_window_pattern="LLLG", tie_word_embeddings=False,
        ),
        32_003_216_384,
        dict(windows=(4096, 4096, 4096, None) * 16, turned=(True, True, True, False) * 16),
    ),
    "mistralai/Devstral-2-123B-Instruct-2512": Sample(
        COMMON | dict(
            architectures=["Ministral3ForCausalLM"], model_type="ministral3", bos_token_id=1,
            eos_token_id=2, head_dim=128, hidden_size=12288, intermediate_size=28672,
            max_position_embeddings=262144, num_attention_heads=96, num_hidden_layers=88,
            num_key_value_heads=8, pad_token_id=11, rms_norm_eps=1e-05, sliding_window=None,
            rope_parameters=dict(
                beta_fast=4.0, beta_slow=1.0, factor=64.0, llama_4_scaling_beta=0.0, mscale=1.0,
                mscale_all_dim=0.0, original_max_position_embeddings=4096, rope_theta=1000000.0,
                rope_type="yarn", type="yarn"),
            tie_word_embeddings=False, vocab_size=131072,
        ),
        125_025_988_608,
        dict(kind="yarn", factor=64.0, beta=0.0, context=4096, beta_fast=4.0),
    ),
    "Qwen/Qwen3.5-27B, its text model": Sample(
        QWEN_3_5 | dict(
            architectures=["Qwen3_5ForConditionalGeneration"], hidden_size=5120,
            intermediate_size=17408, layer_types=DELTAS * 16, linear_num_value_heads=48,
            num_attention_heads=24, num_hidden_layers=64, num_key_value_heads=4,
            output_gate_type="swish", pad_token_id=None, partial_rotary_factor=0.25,
            tie_word_embeddings=False,
        ),
        26_895_998_464,
        dict(
            delta=(True, True, True, False) * 16, value_heads=48, taps=4, rope_width=64,
            theta=1e7, sections=(11, 11, 10, 0), tied=False, qkv_bias=False,
        ),
    ),
    "Qwen/Qwen3.5-0.8B, its text model": Sample(
        QWEN_3_5 | dict(
            hidden_size=1024, intermediate_size=3584, layer_types=DELTAS * 6,
            linear_num_value_heads=16, mlp_only_layers=[], num_attention_heads=8,
            num_hidden_layers=24, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        752_393_024,
        dict(delta=(True, True, True, False) * 6, value_heads=16, rope_width=64, tied=True),
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Sample(
        PLAIN | dict(
            architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", bos_token_id=151643,
            decoder_sparse_step=1, eos_token_id=151645, full_attention_interval=4, head_dim=256,
            hidden_size=2048, intermediate_size=5120, linear_conv_kernel_dim=4,
            linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32,
            linear_value_head_dim=128, max_position_embeddings=262144, mlp_only_layers=[],
            moe_intermediate_size=512, norm_topk_prob=True, num_attention_heads=16,
            num_experts=512, num_experts_per_tok=10, num_hidden_layers=48, num_key_value_heads=2,
            output_router_logits=False, partial_rotary_factor=0.25, rms_norm_eps=1e-6,
            rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.001,
            shared_expert_intermediate_size=512, tie_word_embeddings=False,
            use_sliding_window=False, vocab_size=151936,
        ),
        79_674_391_296,
        dict(
            delta=(True, True, True, False) * 12, sparse=(True,) * 48, experts=512, chosen=10,
            expert_width=512, shared_width=512, rope_width=64,
        ),
    ),
    # As Megatron-Bridge on GitHub has it in its tests, where mamba_d_ssm is missing: heads times
    # their width.
    "tiiuae/Falcon-H1-0.5B-Base": Sample(
        PLAIN | dict(
            architectures=["FalconH1ForCausalLM"], model_type="falcon_h1",
            attention_in_multiplier=1.0, attention_out_multiplier=0.9375, attn_layer_indices=None,
            embedding_multiplier=5.656854249492381, head_dim=64, hidden_size=1024,
            intermediate_size=2048, key_multiplier=0.39062499999999994,
            lm_head_multiplier=0.0390625, mamba_chunk_size=128, mamba_conv_bias=True,
            mamba_d_conv=4, mamba_d_head=64, mamba_d_ssm=1536, mamba_d_state=128, mamba_expand=2,
            mamba_n_groups=1, mamba_n_heads=24, mamba_norm_before_gate=False,
            mamba_proj_bias=False, mamba_rms_norm=False, mamba_use_mlp=True,
            max_position_embeddings=16384, mlp_bias=False,
            mlp_multipliers=[0.8838834764831844, 0.5859375], num_attention_heads=8,
            num_hidden_layers=36, num_key_value_heads=2, projectors_bias=False, rms_norm_eps=1e-5,
            rope_scaling=None, rope_theta=100000000000.0, ssm_in_multiplier=1.25,
            ssm_multipliers=[
                0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
            ssm_out_multiplier=0.23570226039551587, tie_word_embeddings=False, vocab_size=32784,
        ),
        521_411_104,
        dict(
            ssm_heads=24, ssm_head_width=64, state=128, groups=1, taps=4, conv_bias=True,
            norm_first=None, key_scale=0.39062499999999994, logit_scale=0.0390625,
            z_scale=0.3535533905932738, x_scale=0.25, c_scale=0.5, mlp_down_scale=0.5859375,
            theta=1e11,
        ),
    ),
}  # fmt: skip
