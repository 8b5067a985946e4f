"""What llama.cpp's converter writes for each further family: tests/data/gguf_families.json.

    python tests/oracles/gguf_families.py LLAMA_CPP_DIR LIBRARIES [case ...]

Arguments as of gguf_answers.py; with cases named, only these are made anew. Needs torch.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from bridge.places import places
from tests.oracles import gguf_answers as base
from unsloth_jax.models import family

ANSWERS = base.DATA / "gguf_families.json"
SENTENCEPIECE = base.DATA / "tiny_sentencepiece"
PLAIN = {k: v for k, v in base.SMALL.items() if k != "hidden_act"} | dict(dtype="float32")
SMALL, TIED = PLAIN | dict(hidden_act="silu"), base.TIED
WITHOUT_RMS = {k: v for k, v in PLAIN.items() if k != "rms_norm_eps"}


def named(model_type: str, architecture: str) -> dict[str, Any]:
    return dict(model_type=model_type, architectures=[f"{architecture}ForCausalLM"])


def rope(theta: float, **more: Any) -> dict[str, Any]:
    """rope as transformers 5 writes it."""
    return {"rope_type": "default", "rope_theta": theta} | more


GELU = dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
IDS = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0)
GEMMA = PLAIN | GELU | TIED | IDS | dict(head_dim=32, rms_norm_eps=1e-6)
GEMMA2 = GEMMA | dict(
    query_pre_attn_scalar=32,
    sliding_window=32,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=20.0,
)
GEMMA3 = GEMMA | dict(
    num_hidden_layers=7,
    query_pre_attn_scalar=32,
    sliding_window=32,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
LINEAR = rope(1e6, rope_type="linear", factor=8.0)
GRANITE = SMALL | dict(
    embedding_multiplier=3.0,
    attention_multiplier=0.15,
    residual_multiplier=0.4,
    logits_scaling=1.5,
)
LONG = dict(
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.0],
    long_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
)
PHI3 = SMALL | IDS | dict(sliding_window=32, original_max_position_embeddings=256)
COHERE = (
    WITHOUT_RMS
    | TIED
    | dict(hidden_act="silu", layer_norm_eps=1e-5, logit_scale=0.5, rope_theta=1e4)
)
SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=64,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.3,
)
MAMBA = dict(
    head_dim=16,
    mamba_d_ssm=96, mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=32,
    mamba_d_conv=4, mamba_conv_bias=True, mamba_rms_norm=False, mamba_norm_before_gate=False,
    embedding_multiplier=0.6, lm_head_multiplier=0.5, key_multiplier=0.7,
    attention_in_multiplier=1.3, attention_out_multiplier=0.8, ssm_in_multiplier=0.9,
    ssm_out_multiplier=1.2, mlp_multipliers=[1.4, 0.7], ssm_multipliers=[1.3, 0.8, 0.7, 1.2, 0.6],
)  # fmt: skip
DELTA = dict(
    head_dim=32,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
)
MIXED = dict(
    num_experts=12,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
BARE_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
BETAS = dict(beta_fast=32.0, beta_slow=1.0)
LATENT = dict(
    num_hidden_layers=3, num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=12,
    num_experts_per_tok=3, moe_intermediate_size=32, n_shared_experts=2, n_group=3, topk_group=2,
    first_k_dense_replace=1, routed_scaling_factor=1.5, norm_topk_prob=True,
    scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=0, rms_norm_eps=1e-6,
    pad_token_id=0,
)  # fmt: skip
ALTERNATING = [*["linear_attention", "full_attention"] * 2, "linear_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA2 | named("gemma2", "Gemma2") | dict(rope_theta=1e4),
    "gemma3": GEMMA3
    | named("gemma3_text", "Gemma3")
    | dict(rope_theta=5e5, rope_local_base_freq=2e4),
    "gemma3_linear": GEMMA3
    | named("gemma3_text", "Gemma3")
    | dict(rope_parameters=dict(full_attention=LINEAR, sliding_attention=rope(1e4)))
    | dict(tie_word_embeddings=False, final_logit_softcapping=20.0),
    "gemma": GEMMA | named("gemma", "Gemma") | dict(rope_theta=1e4),
    "phi3": PHI3 | named("phi3", "Phi3") | dict(rope_theta=2e4),
    "phi3_long": PHI3
    | named("phi3", "Phi3")
    | dict(max_position_embeddings=512, original_max_position_embeddings=256)
    | dict(sliding_window=None)
    | dict(rope_parameters=rope(2e4, rope_type="longrope", **LONG)),
    "llama_pieces": SMALL | named("llama", "Llama") | IDS,
    "mistral_pieces": SMALL | named("mistral", "Mistral") | IDS | dict(sliding_window=None),
    "granite": GRANITE | named("granite", "Granite") | TIED | dict(rope_theta=2e4),
    "granite_biases": GRANITE
    | named("granite", "Granite")
    | dict(attention_bias=True, mlp_bias=True, rope_theta=1e4),
    "olmo2": SMALL | named("olmo2", "Olmo2") | dict(rope_theta=5e5),
    "smollm3": SMALL
    | named("smollm3", "SmolLM3")
    | dict(pad_token_id=0)
    | TIED
    | dict(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], use_sliding_window=False)
    | dict(rope_theta=2e6),
    "cohere2": COHERE
    | named("cohere2", "Cohere2")
    | dict(num_hidden_layers=4, head_dim=16, rotary_pct=1.0, sliding_window=32)
    | dict(layer_types=SLIDING),
    "cohere": COHERE | named("cohere", "Cohere"),
    "cohere_plus": COHERE
    | named("cohere", "Cohere")
    | dict(num_hidden_layers=64, hidden_size=32, use_qk_norm=True, model_max_length=512),
    "starcoder2": WITHOUT_RMS
    | named("starcoder2", "Starcoder2")
    | TIED
    | dict(hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-5, use_bias=True, sliding_window=32)
    | dict(rope_theta=1e5),
    "glm4": SMALL
    | named("glm4", "Glm4")
    | dict(pad_token_id=0)
    | dict(head_dim=32, attention_bias=True, partial_rotary_factor=0.5, rope_theta=2e4),
    "exaone4": SMALL
    | named("exaone4", "Exaone4")
    | TIED
    | dict(sliding_window=None, layer_types=["full_attention"] * 2, rope_parameters=base.LLAMA3),
    "exaone4_windows": SMALL
    | named("exaone4", "Exaone4")
    | dict(num_hidden_layers=64, hidden_size=32, sliding_window=32, head_dim=8)
    | dict(layer_types=SLIDING * 16, rope_theta=1e6),
    "ministral3": SMALL
    | named("ministral3", "Ministral3")
    | dict(head_dim=32, rope_parameters=rope(1e6, **YARN)),
    "mixtral": SMALL
    | named("mixtral", "Mixtral")
    | dict(num_local_experts=12, num_experts_per_tok=2, sliding_window=None, rope_theta=1e6),
    "llama4": SMALL
    | named("llama4_text", "Llama4")
    | dict(num_hidden_layers=5, head_dim=32, num_local_experts=4, num_experts_per_tok=2)
    | dict(intermediate_size_mlp=128, interleave_moe_layer_step=2, pad_token_id=0)
    | dict(rope_parameters=base.LLAMA3 | dict(low_freq_factor=1.0, high_freq_factor=1.0)),
    "qwen3_moe": SMALL
    | named("qwen3_moe", "Qwen3Moe")
    | dict(head_dim=32, num_experts=12, num_experts_per_tok=4, moe_intermediate_size=32)
    | dict(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], rope_theta=1e6),
    "glm4_moe": SMALL
    | named("glm4_moe", "Glm4Moe")
    | dict(num_hidden_layers=3, head_dim=32, attention_bias=True, use_qk_norm=True)
    | dict(n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=32)
    | dict(n_shared_experts=2, n_group=3, topk_group=2, first_k_dense_replace=1)
    | dict(routed_scaling_factor=1.5, norm_topk_prob=True, partial_rotary_factor=0.5)
    | dict(num_nextn_predict_layers=0, pad_token_id=0, rope_theta=1e6),
    "falcon_h1": SMALL
    | MAMBA
    | named("falcon_h1", "FalconH1")
    | dict(mlp_bias=True, mamba_rms_norm=True, rope_parameters=rope(1e11)),
    "falcon_h1_tied": SMALL
    | MAMBA
    | named("falcon_h1", "FalconH1")
    | TIED
    | dict(rope_parameters=rope(1e6))
    | dict(head_dim=32, mamba_n_groups=1, lm_head_multiplier=0.6, mlp_multipliers=[0.9, 1.1]),
    "qwen3_5": SMALL
    | DELTA
    | named("qwen3_5_text", "Qwen3_5")
    | dict(num_hidden_layers=5, full_attention_interval=2, layer_types=ALTERNATING)
    | dict(rope_parameters=rope(1e7, mrope_section=[2, 1, 1], partial_rotary_factor=0.25)),
    "qwen3_5_tied": SMALL
    | DELTA
    | named("qwen3_5_text", "Qwen3_5")
    | TIED
    | dict(num_hidden_layers=4, linear_num_value_heads=2)
    | dict(rope_parameters=rope(1e4, partial_rotary_factor=0.5)),
    "qwen3_next": SMALL
    | DELTA
    | named("qwen3_next", "Qwen3Next")
    | MIXED
    | dict(num_hidden_layers=5, full_attention_interval=2, layer_types=ALTERNATING)
    | dict(rope_parameters=rope(1e7, partial_rotary_factor=0.25)),
    "gpt_oss": SMALL
    | named("gpt_oss", "GptOss")
    | dict(num_hidden_layers=4, head_dim=32, attention_bias=True, sliding_window=32)
    | dict(num_local_experts=12, num_experts_per_tok=3, pad_token_id=0)
    | dict(layer_types=["sliding_attention", "full_attention"] * 2)
    | dict(rope_parameters=rope(15e4, **BARE_YARN, **BETAS)),
    "gpt_oss_default_rope": SMALL
    | named("gpt_oss", "GptOss")
    | dict(num_hidden_layers=3, head_dim=16, attention_bias=True, sliding_window=16)
    | dict(num_local_experts=8, num_experts_per_tok=4, pad_token_id=0)
    | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    | dict(rope_parameters=rope(15e4)),
    "deepseek_v3": SMALL
    | LATENT
    | named("deepseek_v3", "DeepseekV3")
    | dict(rope_parameters=rope(1e4, **BARE_YARN, **BETAS, mscale=1.0, mscale_all_dim=1.0)),
    "deepseek_v3_lite": SMALL
    | LATENT
    | named("deepseek_v3", "DeepseekV3")
    | dict(num_hidden_layers=27, hidden_size=32, q_lora_rank=None, n_group=1, topk_group=1)
    | dict(v_head_dim=32, n_routed_experts=6, norm_topk_prob=False, rope_parameters=rope(5e4)),
    "qwen3_next_yarn": SMALL
    | DELTA
    | named("qwen3_next", "Qwen3Next")
    | MIXED
    | TIED
    | dict(num_hidden_layers=4, linear_num_value_heads=2)
    | dict(rope_parameters=rope(1e6, partial_rotary_factor=0.5, **BARE_YARN)),
}
WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8)
CONFIGS |= {
    "wide_gemma2": CONFIGS["gemma2"] | WIDE,
    "wide_phi3": CONFIGS["phi3"] | WIDE,
    "wide_cohere2": CONFIGS["cohere2"] | WIDE | dict(layer_types=SLIDING * 2, head_dim=32),
    "wide_starcoder2": CONFIGS["starcoder2"] | WIDE,
    "wide_glm4": CONFIGS["glm4"] | WIDE,
    "wide_mixtral": CONFIGS["mixtral"] | WIDE | dict(num_local_experts=8),
    "wide_glm4_moe": CONFIGS["glm4_moe"] | WIDE | dict(moe_intermediate_size=256),
    "wide_llama4": CONFIGS["llama4"] | WIDE | TIED | dict(intermediate_size_mlp=768),
    "wide_falcon_h1": CONFIGS["falcon_h1"]
    | WIDE
    | dict(head_dim=32, mamba_d_ssm=512, mamba_n_heads=16, mamba_d_head=32),
    "wide_qwen3_5": CONFIGS["qwen3_5"]
    | WIDE
    | dict(layer_types=ALTERNATING[:2] * 4, linear_num_value_heads=16, linear_num_key_heads=8),
    "wide_qwen3_next": CONFIGS["qwen3_next"]
    | WIDE
    | dict(layer_types=ALTERNATING[:2] * 4, num_experts=8, moe_intermediate_size=256)
    | dict(linear_num_value_heads=16, linear_num_key_heads=8),
    "wide_gpt_oss": CONFIGS["gpt_oss"]
    | WIDE
    | dict(layer_types=["sliding_attention", "full_attention"] * 4)
    | dict(num_local_experts=4, intermediate_size=256),
    "wide_deepseek_v3": CONFIGS["deepseek_v3"]
    | WIDE
    | dict(num_key_value_heads=8, kv_lora_rank=256, q_lora_rank=256, moe_intermediate_size=256),
    "wide_qwen3_moe": CONFIGS["qwen3_moe"] | WIDE | dict(moe_intermediate_size=256),
}
BY_SENTENCEPIECE = ("gemma", "gemma2", "gemma3_text", "phi3", "llama", "mistral")
FORMATS = {name: ("f32",) for name in CONFIGS} | {
    name: ("f32", "bf16") for name in ("gemma2", "falcon_h1", "qwen3_5", "qwen3_next", "gpt_oss")
}
QUANTIZED = {name: ("q4_k_m",) for name in CONFIGS if name.startswith("wide_")}
QUANTIZED |= {name: ("q4_k_m", "q5_k_m", "q8_0") for name in ("wide_phi3", "wide_mixtral")}
# As the converter calls the splitting of these families' tokenizers, which is the tiny one's too.
PRES = dict(granite="refact", starcoder2="starcoder", cohere="command-r", cohere2="command-r")
OPTIONS = dict(qwen3_5_text=("--no-mtp",), qwen3_next=("--no-mtp",))  # of the converter
WITHOUT_PREFIX, WITH_PREFIX = b"\x18\x00", b"\x18\x01"  # add_dummy_prefix of the normalizer
# Tokens that the converter looks for in GLM's vocabularies.
LOOKED_FOR = {"glm4": ("<|user|>",), "glm4_moe": ("<|user|>", "[gMASK]", "<|observation|>")}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of the checkpoint, by its Hugging Face name."""
    model = family(config["model_type"])
    c = model.config(config)
    return {name: place.shape for name, place in places(model, c).items()}


def values(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As gguf_answers.py draws them; Gemma's norms store what they differ from 1 by."""
    w = base.values(name, shape).astype(np.float32)
    if name.endswith((".gate.weight", ".router.weight")):
        return w * 8  # routers' scores wide apart, so that rounding changes no choice
    if name.endswith("A_log"):
        return np.round(w * 16) / 16  # torch's exp of others is off by a last bit at times
    if not name.endswith("norm.weight"):
        return w
    w = 1 + w / 4 if len(shape) > 1 else w
    below = config["model_type"].startswith(("gemma", "qwen3_5", "qwen3_next"))
    return w - 1 if below and not name.endswith("linear_attn.norm.weight") else w


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: values(config, name, shape) for name, shape in shapes(config).items()}


def tokenizer(config: dict[str, Any], path: Path) -> Path:
    """The tokenizer of a checkpoint, in a new folder."""
    sentencepiece = config["model_type"] in BY_SENTENCEPIECE
    shutil.copytree(SENTENCEPIECE if sentencepiece else base.TOKENIZER, path)
    if config["model_type"] in ("phi3", "llama", "mistral"):
        _with_space(path)
    if config["model_type"] in ("llama", "mistral"):
        _as_llama(path, config["model_type"] == "mistral")
    if own := LOOKED_FOR.get(config["model_type"]):
        file = path / "tokenizer.json"
        spec = json.loads(file.read_text())
        first = spec["added_tokens"][0]
        spec["added_tokens"] += [first | {"id": 482 + n, "content": t} for n, t in enumerate(own)]
        file.write_text(json.dumps(spec))
    return path


def _with_space(path: Path) -> None:
    """Puts a space before each text, as Phi-3's tokenizer does."""
    model, spec = path / "tokenizer.model", path / "tokenizer.json"
    pieces, own = model.read_bytes().rsplit(WITHOUT_PREFIX, 1)
    model.write_bytes(pieces + WITH_PREFIX + own)
    changed = json.loads(spec.read_text())
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    changed["normalizer"] = {"type": "Sequence", "normalizers": [prepend, changed["normalizer"]]}
    spec.write_text(json.dumps(changed))


def _as_llama(path: Path, newer: bool) -> None:
    """As Llama 2's files have it, or as newer ones of Mistral."""
    file, own = path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}
    own |= {"legacy": not newer} | ({"add_prefix_space": True} if newer else {})
    file.write_text(json.dumps(json.loads(file.read_text()) | own, indent=2))
    if newer:
        spec = json.loads((path / "tokenizer.json").read_text())
        pre = dict(type="Metaspace", replacement="\u2581", prepend_scheme="first", split=False)
        spec |= {"normalizer": None, "pre_tokenizer": pre}
        (path / "tokenizer.json").write_text(json.dumps(spec))


def folder(name: str, path: Path) -> Path:
    """The checkpoint of a case, with tokenizer, as a Hugging Face folder."""
    config = CONFIGS[name]
    tokenizer(config, path)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights(config), path / "model.safetensors", {"format": "pt"})
    return path


def answers(work: Path, libraries: Path, names: list[str]) -> dict[str, Any]:
    quantize, out = base.quantizer(libraries), {}
    for name in names:
        source = folder(name, work / name)
        out[name] = {}
        for fmt in FORMATS[name]:
            file = work / f"{name}.{fmt}.gguf"
            base.convert(source, file, fmt, OPTIONS.get(CONFIGS[name]["model_type"], ()))
            out[name][fmt] = base.described(file)
        for fmt in QUANTIZED.get(name, ()):
            file = work / f"{name}.{fmt}.gguf"
            quantize(work / f"{name}.f32.gguf", file, base.FILES[fmt])
            out[name][fmt] = base.described(file)
    return out


if __name__ == "__main__":
    llama_cpp, libraries, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRES.get(
        self.hparams["model_type"], base.PRE
    )
    found = json.loads(ANSWERS.read_text()) if names and ANSWERS.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        found |= answers(Path(work), libraries, names or list(CONFIGS))
    found = {name: found[name] for name in CONFIGS if name in found}
    lines = lambda answer: ",\n".join(f"  {json.dumps(k)}: {json.dumps(answer[k])}" for k in answer)
    cases = ",\n".join(f" {json.dumps(k)}: {{\n{lines(found[k])}\n }}" for k in found)
    ANSWERS.write_text("{\n" + cases + "\n}\n")
    print(f"{ANSWERS}: {len(found)} checkpoints, {ANSWERS.stat().st_size} bytes")
