"""Which type each tensor of a GGUF file gets, and its rows in that type.

The choice is llama-quantize's (llama.cpp, src/llama-quant.cpp); rows by libgguf, equal to ggml's.
"""

from collections.abc import Mapping
from typing import NamedTuple

import gguf
import libgguf
import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

LARGEST_F16 = 65504.0


class Format(NamedTuple):
    """What a whole file is called and the types of its matrices."""

    file_type: LlamaFileType
    base: Kind  # every matrix that neither of the two below names
    more: Kind  # attn_v (attn_qkv) and ffn_down of layers that `needs_more_bits` picks
    head: Kind  # output, or the embedding where it is the output too


FORMATS = {
    "f32": Format(LlamaFileType.ALL_F32, Kind.F32, Kind.F32, Kind.F32),
    "f16": Format(LlamaFileType.MOSTLY_F16, Kind.F16, Kind.F16, Kind.F16),
    "bf16": Format(LlamaFileType.MOSTLY_BF16, Kind.BF16, Kind.BF16, Kind.BF16),
    "q8_0": Format(LlamaFileType.MOSTLY_Q8_0, Kind.Q8_0, Kind.Q8_0, Kind.Q8_0),
    "q4_k_m": Format(LlamaFileType.MOSTLY_Q4_K_M, Kind.Q4_K, Kind.Q6_K, Kind.Q6_K),
    "q5_k_m": Format(LlamaFileType.MOSTLY_Q5_K_M, Kind.Q5_K, Kind.Q6_K, Kind.Q6_K),
    "q6_k": Format(LlamaFileType.MOSTLY_Q6_K, Kind.Q6_K, Kind.Q6_K, Kind.Q6_K),
}
# Where a row isn't whole blocks of the wanted type: one with blocks of 32, and F16 after that.
FALLBACK = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
PLAIN = (Kind.F32, Kind.F16, Kind.BF16)
# Relative RMSE that the rounding of normally distributed weights stays below, by type.
ERROR = {
    Kind.F32: 0.0,
    Kind.F16: 2.0**-11,
    Kind.BF16: 2.0**-8,
    Kind.Q8_0: 0.008,
    Kind.Q6_K: 0.025,
    Kind.Q5_K: 0.05,
    Kind.Q5_0: 0.05,
    Kind.Q5_1: 0.05,
    Kind.Q4_K: 0.1,
}


class Choice(NamedTuple):
    """The type a tensor gets, and the one it would have had if its rows were of another width."""

    kind: Kind
    wanted: Kind


class Sizes(NamedTuple):
    """What of a model, besides its tensors' shapes, decides types."""

    arch: str  # llama.cpp's name
    layers: int
    heads: int
    kv_heads: int
    experts: int = 1


def format_named(name: str) -> Format:
    """The format; raises ValueError listing the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown GGUF format {name!r}; known: {sorted(FORMATS)}")
    return FORMATS[name]


def is_quantized(fmt: Format) -> bool:
    """Whether llama-quantize makes such a file, not the converter."""
    return fmt.base not in PLAIN


def choose(fmt: Format, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes) -> dict[str, Choice]:
    """Type of each tensor, by its GGUF name; shapes are NumPy's, rows first."""
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    choices = {}
    for name, shape in shapes.items():
        wanted = fmt.head if name == head else _wanted(fmt, name, sizes)
        if len(shape) < 2 or not name.endswith(".weight") or name.endswith(WHOLE):
            wanted = Kind.F32
        choices[name] = Choice(_fitting(wanted, shape[-1]), wanted)
    return choices


# Endings of matrices that stay in 32 bits.
WHOLE = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"),
    "ssm_conv1d.weight",
)
# Names of tensors that some layers hold in more bits.
MORE = (
    "attn_v.weight",
    "attn_qkv.weight",
    "ffn_down.weight",
    "ffn_down_exps.weight",
    "ffn_down_shexp.weight",
)


def _beside_eight(fmt: Format, name: str) -> Kind | None:
    """What attention gets beside eight experts, where llama-quantize spends more bits on it."""
    if fmt.base in PLAIN:
        return None
    if name.endswith(("attn_k.weight", "attn_v.weight", "attn_qkv.weight")):
        return Kind.Q8_0
    return Kind.Q5_K if name.endswith("attn_output.weight") and fmt.base == Kind.Q4_K else None


def _wanted(fmt: Format, name: str, sizes: Sizes) -> Kind:
    wide = _beside_eight(fmt, name) if sizes.experts == 8 else None
    if wide is not None:
        return wide
    if not name.endswith(MORE):
        return fmt.base
    if needs_more_bits(int(name.split(".")[1]), sizes.layers):
        return fmt.more
    # llama-quantize's exception for the 70B models, whose eight heads share one value head.
    shared = sizes.arch == "qwen2" or (sizes.arch == "llama" and sizes.heads != sizes.kv_heads)
    big = name.endswith("attn_v.weight") and sizes.layers == 80 and shared
    return Kind.Q5_K if big and fmt.base == Kind.Q4_K else fmt.base


def needs_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    edge = layers // 8
    return layer < edge or layer >= 7 * layers // 8 or (layer - edge) % 3 == 2


def _fitting(kind: Kind, width: int) -> Kind:
    if width % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    smaller = FALLBACK.get(kind, Kind.F16)
    return smaller if width % GGML_QUANT_SIZES[smaller][0] == 0 else Kind.F16


def size(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * block_bytes


def overflows(w: np.ndarray) -> bool:
    """Whether float16 can't hold a value of `w`."""
    return bool(w.size and max(w.max(), -w.min()) > LARGEST_F16)


def encode(w: np.ndarray, kind: Kind) -> np.ndarray:
    """Rows of a float32 array as ggml lays them out: float32, float16 or uint8 [rows, bytes]."""
    rows = libgguf.quantize_rows(w.reshape(-1, w.shape[-1]), int(kind))
    return rows if w.ndim < 3 else rows.reshape(*w.shape[:-1], -1)


def decode(rows: np.ndarray, kind: Kind) -> np.ndarray:
    """Values of encoded rows, float32, by gguf's own code: not the program that encoded them."""
    return gguf.quants.dequantize(rows, kind)
