"""Tiny GGUF files written with gguf's own writer, after llama.cpp's converter."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 2, 40
HYPERPARAMETERS = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": WIDTH,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}


def write(
    path: Path,
    tensors: dict[str, np.ndarray | tuple[np.ndarray, gguf.GGMLQuantizationType]],
    metadata: dict[str, Any],
    arch: str = "llama",
) -> Path:
    """A GGUF of `tensors` by GGUF name, quantised ones as (bytes, kind), and typed metadata."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        values, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hyperparameters(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """The tiny model's metadata; dots of a key are written as __, None leaves a key out."""
    changed = HYPERPARAMETERS | {key.replace("__", "."): v for key, v in changes.items()}
    return {f"{arch}.{key}": v for key, v in changed.items() if v is not None}


def weights(arch: str = "llama", *, tied: bool = False, bias: bool = False, seed: int = 0):
    """The tiny model's float32 weights by GGUF name, in GGUF's row order."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    made = {"token_embd.weight": draw(VOCABULARY, WIDTH), "output_norm.weight": draw(WIDTH)}
    if not tied:
        made["output.weight"] = draw(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        sizes = {"attn_q": HEADS * HEAD_DIM, "attn_k": KV_HEADS * HEAD_DIM}
        sizes |= {"attn_v": KV_HEADS * HEAD_DIM, "ffn_gate": MLP, "ffn_up": MLP}
        block = {f"{name}.weight": draw(rows, WIDTH) for name, rows in sizes.items()}
        block |= {"attn_output.weight": draw(WIDTH, HEADS * HEAD_DIM)}
        block |= {"ffn_down.weight": draw(WIDTH, MLP)}
        block |= {f"{name}_norm.weight": draw(WIDTH) for name in ("attn", "ffn")}
        if arch == "qwen3":
            block |= {f"attn_{x}_norm.weight": draw(HEAD_DIM) for x in "qk"}
        if bias:
            block |= {f"attn_{x}.bias": draw(sizes[f"attn_{x}"]) for x in "qkv"}
        made |= {f"blk.{layer}.{name}": w for name, w in block.items()}
    return made


def tokenizer_metadata(
    tokens: list[str], merges: list[str], pre: str, types: list[int] | None = None, **more: Any
) -> dict[str, Any]:
    """The keys of a byte-level BPE vocabulary."""
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges}
    keys |= {"token_type": [1] * len(tokens) if types is None else types} | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)
