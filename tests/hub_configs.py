"""config.json of models on the hub as their authors wrote them, with what they must be read as.

Llama, Mistral and Qwen stand here, the other families in hub_families.py.
"""

from typing import Any

from hub_families import MORE, Sample

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False,
    attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, pretraining_tp=1,
    rope_scaling=None, rms_norm_eps=1e-05, tie_word_embeddings=False, torch_dtype="bfloat16",
    use_cache=True,
)  # fmt: skip
# The text model of Llama-4-Scout-17B-16E: a text_config of the hub's, which has images beside it.
LLAMA_4 = dict(
    model_type="llama4_text", _attn_implementation_autoset=True, attention_bias=False,
    attention_chunk_size=8192, attention_dropout=0.0, attn_scale=0.1,
    attn_temperature_tuning=True, bos_token_id=200000, cache_implementation="hybrid",
    eos_token_id=[200001, 200007, 200008], floor_scale=8192, for_llm_compressor=False,
    head_dim=128, hidden_act="silu", hidden_size=5120, initializer_range=0.02,
    interleave_moe_layer_step=1, intermediate_size=8192, intermediate_size_mlp=16384,
    max_position_embeddings=10485760, moe_layers=list(range(48)), no_rope_layers=[],
    num_attention_heads=40, num_experts_per_tok=1, num_hidden_layers=48, num_key_value_heads=8,
    num_local_experts=16, output_router_logits=False, pad_token_id=200018, rms_norm_eps=1e-05,
    rope_scaling=dict(
        factor=16.0, high_freq_factor=1.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3"),
    rope_theta=500000.0, router_aux_loss_coef=0.001, router_jitter_noise=0.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_qk_norm=True,
    vocab_size=202048,
)  # fmt: skip
LLAMA_3 = LLAMA | dict(
    bos_token_id=128000, eos_token_id=128001, max_position_embeddings=131072, mlp_bias=False,
    num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0, vocab_size=128256,
)  # fmt: skip
MISTRAL = dict(
    architectures=["MistralForCausalLM"], model_type="mistral", bos_token_id=1, eos_token_id=2,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
    max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=8, rms_norm_eps=1e-05, tie_word_embeddings=False, torch_dtype="bfloat16",
    use_cache=True,
)  # fmt: skip
QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", attention_dropout=0.0,
    bos_token_id=151643, eos_token_id=151643, hidden_act="silu", initializer_range=0.02,
    max_position_embeddings=32768, rms_norm_eps=1e-06, rope_theta=1000000.0,
    torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
)  # fmt: skip
QWEN3 = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False,
    attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645, head_dim=128,
    hidden_act="silu", initializer_range=0.02, max_position_embeddings=40960,
    num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
    sliding_window=None, torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
    use_sliding_window=False, vocab_size=151936,
)  # fmt: skip


def llama3_scaling(factor: float) -> dict[str, Any]:
    return dict(
        factor=factor, high_freq_factor=4.0, low_freq_factor=1.0,
        original_max_position_embeddings=8192, rope_type="llama3",
    )  # fmt: skip


HUB: dict[str, Sample] = {
    "HuggingFaceTB/SmolLM2-135M": Sample(
        LLAMA | {
            "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
            "is_llama_config": True, "max_position_embeddings": 8192, "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
            "rope_theta": 100000, "tie_word_embeddings": True, "transformers_version": "4.40.1",
            "vocab_size": 49152,
        },
        134_515_008,
        dict(layers=30, heads=9, kv_heads=3, head_width=64, tied=True, theta=1e5),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Sample(
        LLAMA | {
            "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
            "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
            "pad_token_id": 2, "rope_interleaved": False, "rope_theta": 100000,
            "tie_word_embeddings": True, "transformers_version": "4.42.3", "vocab_size": 49152,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        },
        134_515_008,
        dict(layers=30, heads=9, kv_heads=3, head_width=64, tied=True, theta=1e5),
    ),
    "meta-llama/Llama-2-7b-hf": Sample(
        dict(
            _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"],
            bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
            initializer_range=0.02, intermediate_size=11008, max_position_embeddings=4096,
            model_type="llama", num_attention_heads=32, num_hidden_layers=32,
            num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
            tie_word_embeddings=False, torch_dtype="float16",
            transformers_version="4.31.0.dev0", use_cache=True, vocab_size=32000,
        ),
        6_738_415_616,
        dict(layers=32, kv_heads=32, head_width=128, eps=1e-5, theta=1e4),
    ),
    "meta-llama/Llama-3.1-8B": Sample(
        LLAMA_3 | dict(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            rope_scaling=llama3_scaling(8.0), transformers_version="4.43.0.dev0",
        ),
        8_030_261_248,
        dict(layers=32, kv_heads=8, head_width=128, kind="llama3", factor=8.0, context=8192),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": Sample(
        LLAMA_3 | dict(
            eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_size=2048,
            intermediate_size=8192, num_hidden_layers=16, rope_scaling=llama3_scaling(32.0),
            tie_word_embeddings=True, transformers_version="4.45.0.dev0",
        ),
        1_235_814_400,
        dict(layers=16, kv_heads=8, head_width=64, tied=True, kind="llama3", factor=32.0),
    ),
    "meta-llama/Llama-3.2-3B": Sample(
        LLAMA_3 | dict(
            head_dim=128, hidden_size=3072, intermediate_size=8192, num_attention_heads=24,
            num_hidden_layers=28, rope_scaling=llama3_scaling(32.0), tie_word_embeddings=True,
        ),
        3_212_749_824,
        dict(layers=28, heads=24, head_width=128, tied=True, kind="llama3", factor=32.0),
    ),
    "unsloth/Llama-3.2-1B-bnb-4bit": Sample(
        LLAMA_3 | dict(
            _name_or_path="unsloth/Llama-3.2-1B", head_dim=64, hidden_size=2048,
            intermediate_size=8192, num_hidden_layers=16, pad_token_id=128004,
            rope_scaling=llama3_scaling(32.0), tie_word_embeddings=True,
            transformers_version="4.49.0", unsloth_fixed=True, unsloth_version="2024.9",
            quantization_config=dict(
                _load_in_4bit=True, _load_in_8bit=False, bnb_4bit_compute_dtype="bfloat16",
                bnb_4bit_quant_storage="uint8", bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True, llm_int8_enable_fp32_cpu_offload=False,
                llm_int8_has_fp16_weight=False, llm_int8_skip_modules=None,
                llm_int8_threshold=6.0, load_in_4bit=True, load_in_8bit=False,
                quant_method="bitsandbytes",
            ),
        ),
        1_235_814_400,
        dict(layers=16, kv_heads=8, head_width=64, tied=True, kind="llama3", factor=32.0),
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Sample(
        {k: v for k, v in LLAMA.items() if k != "attention_dropout"} | dict(
            bos_token_id=1, eos_token_id=2, hidden_size=2048, intermediate_size=5632,
            max_position_embeddings=2048, num_attention_heads=32, num_hidden_layers=22,
            num_key_value_heads=4, rope_theta=10000.0, transformers_version="4.35.0",
            vocab_size=32000,
        ),
        1_100_048_384,
        dict(layers=22, kv_heads=4, head_width=64, theta=1e4),
    ),
    "01-ai/Yi-1.5-6B": Sample(
        LLAMA | dict(
            bos_token_id=1, eos_token_id=2, hidden_size=4096, intermediate_size=11008,
            max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32,
            num_key_value_heads=4, pad_token_id=0, rms_norm_eps=1e-06, rope_theta=5000000.0,
            transformers_version="4.40.0", use_cache=False, vocab_size=64000,
        ),
        6_061_035_520,
        dict(layers=32, kv_heads=4, head_width=128, eps=1e-6, theta=5e6),
    ),
    "mistralai/Mistral-7B-v0.1": Sample(
        MISTRAL | dict(
            rope_theta=10000.0, sliding_window=4096, transformers_version="4.34.0.dev0",
            vocab_size=32000,
        ),
        7_241_732_096,
        dict(layers=32, kv_heads=8, head_width=128, windows=(4096,) * 32, theta=1e4),
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": Sample(
        MISTRAL | dict(
            attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None,
            transformers_version="4.42.0.dev0", vocab_size=32768,
        ),
        7_248_023_552,
        dict(layers=32, kv_heads=8, head_width=128, windows=(None,) * 32, theta=1e6),
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": Sample(
        MISTRAL | dict(
            attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None,
            transformers_version="4.36.0", vocab_size=32000,
        ),
        7_241_732_096,
        dict(windows=(None,) * 32, theta=1e6),
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": Sample(
        MISTRAL | dict(
            attention_dropout=0.0, head_dim=128, hidden_size=5120, max_position_embeddings=131072,
            num_hidden_layers=40, rope_theta=1000000.0, sliding_window=None,
            transformers_version="4.43.0.dev0", vocab_size=131072,
        ),
        12_247_782_400,
        dict(layers=40, kv_heads=8, head_width=128, windows=(None,) * 40),
    ),
    "Qwen/Qwen2.5-0.5B": Sample(
        QWEN2 | dict(
            hidden_size=896, intermediate_size=4864, max_window_layers=24, num_attention_heads=14,
            num_hidden_layers=24, num_key_value_heads=2, sliding_window=32768,
            tie_word_embeddings=True, transformers_version="4.40.1", use_mrope=False,
            vocab_size=151936,
        ),
        494_032_768,
        dict(layers=24, heads=14, head_width=64, tied=True, qkv_bias=True, windows=(None,) * 24),
    ),
    "Qwen/Qwen2.5-7B-Instruct": Sample(
        QWEN2 | dict(
            eos_token_id=151645, hidden_size=3584, intermediate_size=18944, max_window_layers=28,
            num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
            sliding_window=131072, tie_word_embeddings=False, transformers_version="4.43.1",
            vocab_size=152064,
        ),
        7_615_616_512,
        dict(layers=28, kv_heads=4, head_width=128, qkv_bias=True, windows=(None,) * 28),
    ),
    "Qwen/Qwen2.5-7B-Instruct, long": Sample(
        QWEN2 | dict(
            eos_token_id=151645, hidden_size=3584, intermediate_size=18944, max_window_layers=28,
            num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
            rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn"),
            sliding_window=131072, tie_word_embeddings=False, vocab_size=152064,
        ),
        7_615_616_512,
        dict(kind="yarn", factor=4.0, context=32768, attention_factor=1.1386294361119891),
    ),
    "Qwen/Qwen3-0.6B": Sample(
        QWEN3 | dict(
            hidden_size=1024, intermediate_size=3072, max_window_layers=28,
            num_attention_heads=16, num_hidden_layers=28, tie_word_embeddings=True,
        ),
        596_049_920,
        dict(layers=28, heads=16, kv_heads=8, head_width=128, tied=True, theta=1e6),
    ),
    "Qwen/Qwen3-8B": Sample(
        QWEN3 | dict(
            hidden_size=4096, intermediate_size=12288, max_window_layers=36,
            num_attention_heads=32, num_hidden_layers=36, tie_word_embeddings=False,
        ),
        8_190_735_360,
        dict(layers=36, kv_heads=8, head_width=128, qkv_bias=False, windows=(None,) * 36),
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Sample(
        MISTRAL | dict(
            architectures=["MixtralForCausalLM"], attention_dropout=0.0, model_type="mixtral",
            num_experts_per_tok=2, num_local_experts=8, output_router_logits=False,
            rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
            transformers_version="4.36.0.dev0", vocab_size=32000,
        ),
        46_702_792_704,
        dict(experts=8, chosen=2, expert_width=14336, windows=(None,) * 32, theta=1e6, eps=1e-5),
    ),
    "Qwen/Qwen3-30B-A3B": Sample(
        QWEN3 | dict(
            architectures=["Qwen3MoeForCausalLM"], decoder_sparse_step=1, hidden_size=2048,
            intermediate_size=6144, max_window_layers=48, mlp_only_layers=[],
            model_type="qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True,
            num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
            num_key_value_heads=4, output_router_logits=False, rope_theta=1000000.0,
            router_aux_loss_coef=0.001, tie_word_embeddings=False,
        ),
        30_532_122_624,
        dict(experts=128, chosen=8, expert_width=768, sparse=(True,) * 48, renormalized=True),
    ),
    "openai/gpt-oss-20b": Sample(
        dict(
            architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0,
            eos_token_id=200002, experts_per_token=4, head_dim=64, hidden_act="silu",
            hidden_size=2880, initial_context_length=4096, initializer_range=0.02,
            intermediate_size=2880, layer_types=["sliding_attention", "full_attention"] * 12,
            max_position_embeddings=131072, model_type="gpt_oss", num_attention_heads=64,
            num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8,
            num_local_experts=32, output_router_logits=False, pad_token_id=199999,
            quantization_config=dict(
                modules_to_not_convert=[
                    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                    "lm_head",
                ],
                quant_method="mxfp4",
            ),
            rms_norm_eps=1e-05, rope_scaling=dict(
                beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096,
                rope_type="yarn", truncate=False,
            ),
            rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0,
            tie_word_embeddings=False, transformers_version="4.55.0.dev0", use_cache=True,
            vocab_size=201088,
        ),
        20_914_757_184,
        dict(experts=32, chosen=4, windows=(128, None) * 12, limit=7.0, theta=150000.0),
    ),
    # The hub counts 108_641_793_536, its vision model and projector among them.
    "meta-llama/Llama-4-Scout-17B-16E, its text model": Sample(
        LLAMA_4,
        107_769_861_120,
        dict(
            kind="llama3", low=1.0, high=1.0, factor=16.0, chunk=8192, growth=0.1, floor=8192,
            experts=16, chosen=1, sparse=(True,) * 48, turned=(True, True, True, False) * 12,
        ),
    ),
} | MORE  # fmt: skip
