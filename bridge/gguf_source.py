"""A GGUF file as a source of Hugging Face weights: names, orientation and row order undone.

Layout after llama.cpp's converter; quantised blocks through gguf's dequantisers.
"""

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from bridge import gguf_config, gguf_header
from bridge.source import Header

FLOATS = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
BLOCKS = (
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
)
MODULES = ("model.embed_tokens", "model.norm", "lm_head")
LAYER_MODULES = (
    *("input_layernorm", "post_attention_layernorm"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("self_attn.q_norm", "self_attn.k_norm"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
CHUNK = 2**20  # values dequantised at a time
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING = "model.embed_tokens.weight"


class GGUFSource:
    """An opened GGUF file: `config` in config.json's words, weights read one at a time.

    Raises ValueError for a file that is not GGUF, cut short, or of an unknown architecture,
    tensor type, tensor name or rope scaling.
    """

    config: dict[str, Any]

    def __init__(self, path: str | Path):
        file = gguf_header.read(path)
        arch = gguf_config.architecture(file)
        _refuse_parts(file)
        _refuse_types(file)
        values = gguf_config.hyperparameters(file)
        self.path = file.path
        self._bytes = np.memmap(file.path, np.uint8, "r")
        self._tensors = _by_hugging_face_name(file, arch, values["block_count"])
        self.config = self._config(file, values)
        self._heads = self._permuted_heads(arch)

    def headers(self) -> dict[str, Header]:
        """Every weight by its full Hugging Face name; quantised blocks count as float32."""
        return {name: Header(t.shape, _dtype(t.kind)) for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One weight [out, in] as stored (quantised blocks as float32), possibly read-only.

        Raises ValueError for a name the file does not have.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.path}: no weight {name!r}; known: {sorted(self._tensors)}")
        w = self._values(self._tensors[name])
        heads = self._heads.get(name.rsplit(".", 1)[0].rsplit(".", 1)[-1])
        return w if heads is None else halves_from_pairs(w, heads)

    def _values(self, tensor: gguf_header.Tensor) -> np.ndarray:
        raw = np.asarray(self._bytes[tensor.start : tensor.start + tensor.size])
        if tensor.kind in FLOATS:
            return raw.view(FLOATS[tensor.kind]).reshape(tensor.shape)
        return _dequantised(raw, tensor)

    def _config(self, file: gguf_header.GGUF, values: dict[str, Any]) -> dict[str, Any]:
        if EMBEDDING not in self._tensors:
            raise ValueError(f"{file.path}: no token_embd.weight")
        embedding = self._tensors[EMBEDDING]
        factors = file.tensors.get(ROPE_FACTORS)
        return gguf_config.config(
            file,
            values,
            set(self._tensors),
            vocabulary=embedding.shape[0],
            dtype=_dtype(embedding.kind),
            rope_factors=None if factors is None else self._values(factors),
        )

    def _permuted_heads(self, arch: str) -> dict[str, int]:
        if arch != "llama":
            return {}
        heads, kv_heads = "num_attention_heads", "num_key_value_heads"
        return {"q_proj": self.config[heads], "k_proj": self.config[kv_heads]}


def halves_from_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads x (pair, side)] of a llama GGUF -> Hugging Face's [heads x (side, pair)].

    Rope turns neighbours in GGUF and halves in transformers; biases are permuted likewise.
    """
    pairs = w.reshape(heads, -1, 2, *w.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def _dequantised(raw: np.ndarray, tensor: gguf_header.Tensor) -> np.ndarray:
    """float32 values of a tensor's blocks, filled in place: gguf's own result exists twice."""
    width = tensor.shape[-1]
    out = np.empty((int(np.prod(tensor.shape[:-1])), width), np.float32)
    blocks = raw.reshape(len(out), -1)
    step = max(1, CHUNK // width)
    for row in range(0, len(out), step):
        out[row : row + step] = gguf.quants.dequantize(blocks[row : row + step], tensor.kind)
    return out.reshape(tensor.shape)


def _dtype(kind: Kind) -> str:
    return np.dtype(FLOATS.get(kind, np.float32)).name


def _refuse_parts(file: gguf_header.GGUF) -> None:
    parts = file.metadata.get("split.count", 0)
    if parts > 1:
        raise ValueError(
            f"{file.path}: one of {parts} parts; join them first with llama.cpp's "
            "`llama-gguf-split --merge`"
        )


def _refuse_types(file: gguf_header.GGUF) -> None:
    found = {name: t.kind for name, t in file.tensors.items()}
    unknown = {kind.name for kind in found.values() if kind not in (*FLOATS, *BLOCKS)}
    if unknown:
        known = [kind.name for kind in (*FLOATS, *BLOCKS)]
        first = next(name for name, kind in found.items() if kind.name in unknown)
        raise ValueError(
            f"{file.path}: tensor types {sorted(unknown)} (first {first!r}); known: {known}"
        )


def _by_hugging_face_name(
    file: gguf_header.GGUF, arch: str, layers: int
) -> dict[str, gguf_header.Tensor]:
    """The weights by Hugging Face name. Raises ValueError listing the tensors that have none."""
    names = _hugging_face_names(arch, layers)
    unknown = [name for name in file.tensors if name not in names and name != ROPE_FACTORS]
    if unknown:
        raise ValueError(f"{file.path}: tensors without a place in {arch!r}: {sorted(unknown)}")
    return {names[name]: t for name, t in file.tensors.items() if name != ROPE_FACTORS}


def _hugging_face_names(arch: str, layers: int) -> dict[str, str]:
    """GGUF's tensor name -> Hugging Face's, by inverting gguf's own map over our modules."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    to_gguf = gguf.get_tensor_name_map(number, layers)
    modules = [f"model.layers.{i}.{module}" for i in range(layers) for module in LAYER_MODULES]
    pairs = {module: to_gguf.get_name(module) for module in (*MODULES, *modules)}
    return {
        f"{short}.{part}": f"{module}.{part}"
        for module, short in pairs.items()
        if short is not None
        for part in ("weight", "bias")
    }
