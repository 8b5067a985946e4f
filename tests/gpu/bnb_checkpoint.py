"""A random checkpoint in 4 bits, quantized by bitsandbytes as Unsloth's own uploads are."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workflows.bench import configs, lengths

TOKENIZER = Path(__file__).resolve().parents[1] / "data" / "tiny_tokenizer"
QUANTIZATION = dict(
    quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16",
)  # fmt: skip


def make(folder: Path, shape: str, tokenizer: Path) -> None:
    """Writes the checkpoint of a name in `configs`, with the tokenizer of another folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    fields = configs.config(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(lengths.SEED)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    count, files = fields["num_hidden_layers"] + 1, {}
    for i, tensors in enumerate(parts(fields, device), start=1):
        name = f"model-{i:05}-of-{count:05}.safetensors"
        on_host = {k: v.cpu().contiguous() for k, v in tensors.items()}
        save_file(on_host, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        **fields,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        quantization_config=QUANTIZATION,
    ).save_pretrained(folder)


def parts(fields: dict[str, Any], device: str) -> Iterator[dict[str, Any]]:
    """The tensors of each layer, then the rest, by their names in a 4-bit checkpoint."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    D, F, V = (fields[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    H, K = (fields[f"num_{name}_heads"] * fields["head_dim"] for name in ("attention", "key_value"))
    sides = dict(
        q_proj=(H, D), k_proj=(K, D), v_proj=(K, D), o_proj=(D, H),
        gate_proj=(F, D), up_proj=(F, D), down_proj=(D, F),
    )  # fmt: skip
    draw = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)
    ones = lambda: torch.ones(D, device=device, dtype=torch.bfloat16)
    for i in range(fields["num_hidden_layers"]):
        at, tensors = f"model.layers.{i}", {}
        for name, (height, width) in sides.items():
            w = draw(height, width) * width**-0.5
            packed, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            path = f"{at}.{'mlp' if F in (height, width) else 'self_attn'}.{name}.weight"
            tensors[path] = packed
            tensors |= {f"{path}.{k}": v for k, v in state.as_dict(packed=True).items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = ones()
        yield tensors
    rest = {"model.embed_tokens.weight": draw(V, D) * 0.02, "lm_head.weight": draw(V, D) * 0.02}
    yield rest | {"model.norm.weight": ones()}
