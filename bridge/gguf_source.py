"""A GGUF file as a source of Hugging Face weights: names, orientation and row order undone.

Layout after llama.cpp's converter; quantised blocks through gguf's dequantisers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from bridge import gguf_config, gguf_header, gguf_layouts
from bridge.gguf_experts import CORRECTION
from bridge.places import Place, places
from bridge.source import Header
from unsloth_jax.models import family

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
# Modules that only some architectures have; they win where gguf calls two of them the same.
JOINED = ("self_attn.qkv_proj", "mlp.gate_up_proj")
BEHIND = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
GATED = ("gate", "up", "down")
OWN_MODULES = {
    "gemma2": BEHIND,
    "gemma3": BEHIND,
    "phi3": JOINED,
    "olmo2": BEHIND[1:],
    "exaone4": BEHIND[1:],
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm", JOINED[1]),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj"),
    "falcon-h1": (
        *(f"feed_forward.{n}_proj" for n in GATED),
        *(f"mamba.{n}" for n in ("in_proj", "out_proj", "conv1d", "norm")),
    ),
    "qwen35": tuple(
        f"linear_attn.{n}"
        for n in (*(f"in_proj_{x}" for x in ("qkv", "z", "b", "a")), "out_proj", "conv1d", "norm")
    ),
    "llama": tuple(
        f"block_sparse_moe.{x}" for x in ("gate", *(f"experts.w{n}" for n in (1, 2, 3)))
    ),
    "glm4moe": (
        *(f"mlp.{x}" for x in ("gate", "gate.e_score_correction")),
        *(f"mlp.{kind}experts.{n}_proj" for kind in ("", "shared_") for n in GATED),
    ),
    "llama4": (
        "feed_forward.router",
        *(f"feed_forward.{p}{n}_proj" for p in ("", "shared_expert.", "experts.") for n in GATED),
    ),
    "qwen3next": (
        *(f"linear_attn.{n}" for n in ("in_proj_qkv", "in_proj_z", "in_proj_ba", "out_proj")),
        *("linear_attn.conv1d", "linear_attn.norm", "mlp.gate", "mlp.shared_expert_gate"),
        *(f"mlp.{kind}.{n}_proj" for kind in ("experts", "shared_expert") for n in GATED),
    ),
    "gpt-oss": (
        *("mlp.router", "self_attn.sinks"),
        *(f"mlp.experts.{n}_proj" for n in GATED),
    ),
    "deepseek2": (
        *(f"self_attn.{n}_proj" for n in ("q_a", "q_b", "k_b", "v_b")),
        *("self_attn.kv_a_proj_with_mqa", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        *(f"mlp.{x}" for x in ("gate", "gate.e_score_correction")),
        *(f"mlp.{kind}experts.{n}_proj" for kind in ("", "shared_") for n in GATED),
    ),
    "qwen3moe": tuple(f"mlp.{x}" for x in ("gate", *(f"experts.{n}_proj" for n in GATED))),
}
# Modules outside layers, and weights within them, that gguf's map calls otherwise or not at all.
OWN_MODEL = {"falcon-h1": ("model.final_layernorm",)}
MAMBA = {"ssm_a": "mamba.A_log", "ssm_d": "mamba.D", "ssm_dt.bias": "mamba.dt_bias"}
DELTA = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
OWN_WEIGHTS = {
    "falcon-h1": MAMBA | {"ffn_norm": "pre_ff_layernorm.weight"},
    "qwen35": DELTA,
    "qwen3next": DELTA,
}
# Architectures whose rows of q and k are reordered, and those whose norms have 1 added.
PAIRED = ("llama", "granite", "smollm3", "mistral3")
NORM_OFFSET = {"gemma": 1.0, "gemma2": 1.0, "gemma3": 1.0}
CHUNK = 2**20  # values dequantised at a time
NO_WEIGHTS = (gguf_config.FACTORS, gguf_config.LONG, gguf_config.SHORT)
EMBEDDING = "model.embed_tokens.weight"


class GGUFWeights:
    """The weights of a GGUF file by Hugging Face name; its rope scaling is not looked at.

    `tensors` has the file's own names, `stored` the file's name of each weight. Raises ValueError
    for an unknown architecture, tensor type, tensor name or key.
    """

    def __init__(self, file: gguf_header.GGUF):
        arch = file.metadata["general.architecture"]
        _refuse_parts(file)
        _refuse_types(file)
        values = gguf_config.sizes(file)
        self.path, self.tensors = file.path, file.tensors
        self.stored = _stored_names(file, arch, values["block_count"])
        self._bytes = np.memmap(file.path, np.uint8, "r")
        self._heads = _permuted_heads(arch, values)
        self._offset = NORM_OFFSET.get(arch, 0.0)

    def headers(self) -> dict[str, Header]:
        """Every weight by its full Hugging Face name; quantised blocks count as float32."""
        places = {name: self.tensors[stored] for name, stored in self.stored.items()}
        blocks = lambda kind: None if kind in FLOATS else kind.name
        return {
            name: Header(t.shape, _dtype(t.kind), blocks=blocks(t.kind))
            for name, t in places.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One weight [out, in] as stored (quantised blocks as float32), possibly read-only.

        Raises ValueError for a name the file does not have.
        """
        if name not in self.stored:
            raise ValueError(f"{self.path}: no weight {name!r}; known: {sorted(self.stored)}")
        w = self.tensor(self.stored[name])
        heads = self._heads_of(name)
        if heads is not None:
            return halves_from_pairs(w, heads)
        return w - w.dtype.type(self.offset(name)) if self.offset(name) else w

    def offset(self, name: str) -> float:
        """What the file's tensor is above the weight."""
        return self._offset if name.endswith("norm.weight") else 0.0

    def tensor(self, stored: str) -> np.ndarray:
        """One tensor by the file's own name, rows in the file's order."""
        t = self.tensors[stored]
        raw = self._raw(t)
        return raw.view(FLOATS[t.kind]).reshape(t.shape) if t.kind in FLOATS else _filled(raw, t)

    def pieces(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers of a weight, float32 values of these rows), so many rows at a time."""
        t, heads = self.tensors[self.stored.get(name, name)], self._heads_of(name)
        rows = np.arange(t.shape[0])
        if heads is not None:
            rows = np.argsort(halves_from_pairs(rows, heads))
        for some, values in _dequantised(self._raw(t), t):
            yield rows[some], values

    def _raw(self, tensor: gguf_header.Tensor) -> np.ndarray:
        return np.asarray(self._bytes[tensor.start : tensor.start + tensor.size])

    def _heads_of(self, name: str) -> int | None:
        return self._heads.get(name.rsplit(".", 1)[0].rsplit(".", 1)[-1])


class GGUFSource(GGUFWeights):
    """An opened GGUF file: `config` in config.json's words, weights read one at a time.

    Weights are the family's: of experts that it holds one by one, `tensors` has each by itself.
    Raises ValueError for a file that is not GGUF, cut short, or of an unknown architecture,
    tensor type, tensor name or rope scaling.
    """

    config: dict[str, Any]

    def __init__(self, path: str | Path):
        file = gguf_header.read(path)
        values = gguf_config.hyperparameters(file)
        super().__init__(file)
        if EMBEDDING not in self.stored:
            raise ValueError(f"{file.path}: no token_embd.weight")
        embedding = self.tensors[self.stored[EMBEDDING]]
        self.config = gguf_config.config(
            file,
            values,
            set(self.stored),
            vocabulary=embedding.shape[0],
            dtype=_dtype(embedding.kind),
            rope_factors={n: self.tensor(n) for n in NO_WEIGHTS if n in self.tensors},
        )
        self._arch, self._family = gguf_config.architecture(file), family(self.config["model_type"])
        try:
            self._c = self._family.config(self.config)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
        self._places = places(self._family, self._c)
        self.stored, self.tensors = gguf_layouts.one_by_one(self._places, self.stored, self.tensors)
        self._cut = gguf_layouts.cut(self._family, self._c, self._places, self.stored)
        self._joined = gguf_layouts.joined(self._places, self.stored) | self._cut

    def headers(self) -> dict[str, Header]:
        """Every weight by its full Hugging Face name; quantised blocks count as float32."""
        found = {n: h._replace(shape=self._shape(n, h.shape)) for n, h in super().headers().items()}
        for name, (place, parts) in self._joined.items():
            each = [found.pop(part) for part in parts]
            shape = place.shape if name in self._cut else _below(place, each)
            dtype = np.result_type(*(np.dtype(h.dtype) for h in each)).name
            blocks = next((h.blocks for h in each if h.blocks), None)
            found[name] = Header(shape, dtype, blocks=blocks)
        return found

    def read(self, name: str) -> np.ndarray:
        """One weight as Hugging Face has it, quantised blocks as float32, possibly read-only.

        Raises ValueError for a name the file does not have.
        """
        if name in self._joined:
            place, parts = self._joined[name]
            each = [GGUFWeights.read(self, part) for part in parts]
            if name in self._cut:
                return np.ascontiguousarray(self._family.from_gguf_parts(self._c, name, each))
            return place.oriented(np.concatenate(each, axis=1))
        w = super().read(name)
        if not hasattr(self._family, "gguf_shape"):
            return w
        return gguf_layouts.weight(self._arch, self._c, name, w, self._shape(name, w.shape))

    def _shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """A weight's shape, of the shape in the file."""
        if name not in self._places or not hasattr(self._family, "gguf_shape"):
            return stored
        own = self._places[name].shape
        theirs = self._family.gguf_shape(self._c, name, own)
        return own if stored in (theirs, gguf_layouts.without_ones(theirs)) else stored


def _below(place: Place, each: list[Header]) -> tuple[int, ...]:
    """The shape of experts' matrices one below another, as the family's files have them."""
    count, _, inputs = each[0].shape
    rows = sum(h.shape[1] for h in each)
    return (count, inputs, rows) if place.swapped else (count, rows, inputs)


def _permuted_heads(arch: str, values: dict[str, Any]) -> dict[str, int]:
    """Heads of the projections whose rows llama.cpp's converter reorders."""
    if arch not in PAIRED:
        return {}
    heads = values["attention.head_count"]
    return {"q_proj": heads, "k_proj": values.get("attention.head_count_kv", heads)}


def halves_from_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads x (pair, side)] of a llama GGUF -> Hugging Face's [heads x (side, pair)].

    Rope turns neighbours in GGUF and halves in transformers; biases are permuted likewise.
    """
    pairs = w.reshape(heads, -1, 2, *w.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def _filled(raw: np.ndarray, tensor: gguf_header.Tensor) -> np.ndarray:
    """float32 values of a tensor's blocks, filled in place: gguf's own result exists twice."""
    out = np.empty(tensor.shape, np.float32)
    for rows, values in _dequantised(raw, tensor):
        out[rows] = values
    return out


def _dequantised(raw: np.ndarray, tensor: gguf_header.Tensor) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, their float32 values) of a tensor, some CHUNK values at a time."""
    count, rest = tensor.shape[0], tensor.shape[1:]
    rows = raw.reshape(count, -1)
    step = max(1, CHUNK // int(np.prod(rest)))
    for at in range(0, count, step):
        some = slice(at, at + step)
        yield some, gguf.quants.dequantize(rows[some], tensor.kind).reshape(-1, *rest)


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


def _stored_names(file: gguf_header.GGUF, arch: str, layers: int) -> dict[str, str]:
    """Hugging Face's name -> the file's. Raises ValueError listing the tensors that have none."""
    names = _hugging_face_names(arch, layers)
    unknown = [name for name in file.tensors if name not in names and name not in NO_WEIGHTS]
    if unknown:
        raise ValueError(f"{file.path}: tensors without a place in {arch!r}: {sorted(unknown)}")
    return {names[name]: name for name in file.tensors if name not in NO_WEIGHTS}


def _hugging_face_names(arch: str, layers: int) -> dict[str, str]:
    """GGUF's tensor name -> Hugging Face's, by inverting gguf's own map over our modules."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    to_gguf = gguf.get_tensor_name_map(number, layers)
    each = (*LAYER_MODULES, *OWN_MODULES.get(arch, ()))
    modules = [f"model.layers.{i}.{module}" for i in range(layers) for module in each]
    outside = (*MODULES, *OWN_MODEL.get(arch, ()))
    pairs = {module: to_gguf.get_name(module) for module in (*outside, *modules)}
    whole = {
        f"blk.{i}.{short}": f"model.layers.{i}.{name}"
        for i in range(layers)
        for short, name in OWN_WEIGHTS.get(arch, {}).items()
    }
    return whole | {
        f"{short}.{part}": f"{module}.{part}".replace(*CORRECTION[::-1])
        for module, short in pairs.items()
        if short is not None
        for part in ("weight", "bias")
    }
