"""Checkpoints -> parameter trees. Names and orientation are the same on both sides."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge import bnb_int8, experts_apart
from bridge.places import Place, of_path, places
from bridge.source import Header, Source
from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Stacks
from unsloth_jax.models import family_of
from unsloth_jax.quant import FORMATS
from unsloth_jax.quant.int8 import Int8

# Buffers that old checkpoints carry and the config alone decides.
BUFFERS = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"
)


BITSANDBYTES = "bitsandbytes"
METHODS = (BITSANDBYTES, "mxfp4")  # the kinds of quantized checkpoint that are read
APART = re.compile(r"\.experts\.(gate_up|down)_projs\.\d+\.")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def check(model: ModuleType, c: Any, headers: dict[str, Header], where: str) -> None:
    """Raises one ValueError with every missing, unexpected and misshapen weight."""
    apart = next((name for name in headers if APART.search(name)), None)
    if apart:
        raise ValueError(
            f"{where} keeps experts as linear modules one by one, such as {apart}, as Unsloth's "
            "4-bit files of gpt-oss do, which are not read: load the checkpoint that it was made "
            "of with load_in_4bit=True"
        )
    wrong, used = [], set()
    for name, place in places(model, c).items():
        used.add(name)
        if name not in headers:
            wrong.append(f"missing {name} {place.shape}")
        elif headers[name].shape != place.shape:
            wrong.append(f"{name} has shape {headers[name].shape}, the config says {place.shape}")
        elif not headers[name].dtype.startswith(("float", "bfloat")):
            wrong.append(
                f"{name} has dtype {headers[name].dtype}, expected a float, 4-bit NF4 blocks or "
                "int8 rows with their SCB"
            )
    tied = {HEAD} if c.tied else set()
    unused = [BUFFERS.pattern, *([model.unused(c)] if hasattr(model, "unused") else [])]
    known = re.compile("|".join(unused))
    surplus = sorted(set(headers) - used - tied)
    wrong += [f"unexpected {name}" for name in surplus if not known.fullmatch(name)]
    if wrong:
        more = f"\n  and {len(wrong) - 30} more" if len(wrong) > 30 else ""
        raise ValueError(f"{where} does not fit its config:\n  " + "\n  ".join(wrong[:30]) + more)


def _same_head(source: Source, headers: dict[str, Header], c: Any) -> None:
    """A tied checkpoint may carry its head again, but not another one."""
    if not c.tied or HEAD not in headers:
        return
    if not np.array_equal(source.read(HEAD), source.read(EMBEDDING)):
        raise ValueError(
            f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; set it to false to "
            "use the head, or remove the head from the file"
        )


def is_linear(path: str) -> bool:
    """Whether this weight is packed: a matrix of a linear module or of experts, in a layer."""
    return ".*." in path and tree.of_linear(path)


def described(source: Source) -> tuple[ModuleType, Any]:
    """(family, config) of a checkpoint, from its config.json alone. Raises ValueError."""
    model = family_of(source.config)
    method = (source.config.get("quantization_config") or {}).get("quant_method", BITSANDBYTES)
    if method not in METHODS:
        raise ValueError(
            f"config.json's quantization_config has quant_method {method!r}; supported: "
            f"{METHODS}, or none"
        )
    return model, model.config(source.config)


def own_format(config: dict[str, Any]) -> str | None:
    """The format, of FORMATS, that config.json says its weights have; None for 16 or 32 bits."""
    said = config.get("quantization_config") or {}
    if said.get("load_in_8bit") and not said.get("llm_int8_has_fp16_weight"):
        return "int8"
    return "nf4" if said.get("load_in_4bit") else None


def kept(config: dict[str, Any], quantize: str | None) -> str | None:
    """The format that `load` gives the layers of a checkpoint: its own goes before another."""
    return quantize and (own_format(config) or quantize)


def load(
    source: Source,
    dtype: Any = None,
    quantize: str | None = None,
    where: Callable[[str], bool] = is_linear,
) -> tuple[ModuleType, Any, Params]:
    """(family, config, parameters) of a checkpoint, read weight by weight into stacks in place.

    `dtype` None keeps each weight's own; otherwise routers are in float32. `quantize`, of FORMATS,
    packs the weights that `where` names, unless the checkpoint is already quantized: then its own
    are taken as they are. With `quantize=None` quantized weights are dequantized. Raises
    ValueError as `check` does.
    """
    model, c = described(source)
    name = str(getattr(source, "path", getattr(source, "folder", "the checkpoint")))
    source = experts_apart.whole(source, model, c)
    headers = source.headers()
    check(model, c, headers, name)
    _same_head(source, headers, c)
    stored = any(h.format for h in headers.values())
    flat = {}
    for path in model.weights(c):
        pack = quantize if not stored and where(path) else None
        read = _reader(source, headers, of_path(model, c, path), dtype, quantize, pack)
        flat[path] = _leaf(read, of_path(model, c, path), c.layers)
    return model, c, tree.unflatten(flat)


class Reading(NamedTuple):
    """How a tensor becomes a leaf on the device, and what leaves of one stack have in common."""

    kind: Callable[[str], Any]
    value: Callable[[str], Any]


def _reader(source, headers, found: dict[str, Place], dtype, keep: str | None, pack: str | None):
    of_router = lambda name: tree.of_router(found[name].path)
    as_stored = lambda name: keep if headers[name].format and not of_router(name) else None

    def read(name: str) -> Any:
        if as_stored(name):
            leaf = source.read_quantized(name)
            _finite_statistics(name, leaf)
            if isinstance(leaf, Int8) and dtype is not None:
                leaf = leaf.replace(dtype=jnp.dtype(dtype).name)  # files name none
            return jax.device_put(leaf)
        value = found[name].oriented(source.read(name))
        _finite(name, value)
        if dtype is not None:
            kept = np.float32 if of_router(name) else dtype
            value = value.astype(kept, copy=False)
        if pack:
            value = jax.device_put(value)  # rebound, so that the host copy goes before it packs
            packed = FORMATS[pack](value)
            _packable(name, packed)
            return packed
        return value

    def kind(name: str) -> Any:
        header = headers[name]
        return header.format if as_stored(name) else None, header.dtype if dtype is None else None

    return Reading(kind, read)


def _leaf(read: Reading, found: dict[str, Place], layers: int) -> Any:
    """The leaf of one path: a weight, a stack, or `Stacks` where layers lack it or differ."""
    by_layer: dict[int | None, list[str]] = {}
    for name, place in found.items():
        by_layer.setdefault(place.layer, []).append(name)
    if None in by_layer:
        return jax.device_put(read.value(*by_layer[None]))
    parts: dict[Any, list[int]] = {}
    for i, wanted in by_layer.items():
        kinds = {read.kind(name) for name in wanted}
        if len(kinds) > 1:
            raise ValueError(f"experts of one layer are stored in several kinds: {wanted}, {kinds}")
        parts.setdefault(kinds.pop(), []).append(i)

    def one(i: int) -> Any:
        wanted = by_layer[i]
        if found[wanted[0]].expert is None:
            return read.value(wanted[0])
        return fill(lambda e: read.value(wanted[e]), len(wanted))

    filled = [fill(lambda n, ids=ids: one(ids[n]), len(ids)) for ids in parts.values()]
    if [*parts.values()] == [[*range(layers)]]:
        return filled[0]
    return Stacks(tuple(filled), tuple(tuple(ids) for ids in parts.values()))


def _finite(name: str, value: np.ndarray) -> None:
    # The sum is not finite where a value isn't; it costs no array of flags.
    with np.errstate(invalid="ignore"):
        total = value.sum(dtype=np.float64)
    if not np.isfinite(total):
        raise ValueError(f"{name} holds values that are not finite")


def _packable(name: str, leaf: Any) -> None:
    if isinstance(leaf, Int8) and not np.isfinite(np.asarray(leaf.absmax)).all():
        raise ValueError(
            f"{name} holds values over 65504, the most of float16, through which bitsandbytes' "
            "int8 goes: load in 4 bits, or with load_in_16bit=True"
        )


# The field of a 4-bit leaf -> what a checkpoint calls it.
STATISTICS = {
    "absmax": "absmax",
    "nested_absmax": "nested_absmax",
    "nested_map": "nested_quant_map",
    "offset": "nested_offset",
}


def _finite_statistics(name: str, leaf: Any) -> None:
    """Raises ValueError as for dense weights; bytes are always finite, what scales them may not."""
    if isinstance(leaf, Int8):
        _finite(bnb_int8.scale_of(name), leaf.absmax)
        return
    for field, called in STATISTICS.items():
        value = getattr(leaf, field)
        if value is not None:
            _finite(f"{name}.{called}", np.asarray(value))


def _put(stack: Any, leaf: Any, i: jax.Array) -> Any:
    put = lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0)
    return jax.tree.map(put, stack, leaf)


_put = jax.jit(_put, donate_argnums=0)


def fill(read: Callable[[int], Any], count: int) -> Any:
    """The leaves `read(0)`, ... as a stack, each written in its place as it comes.

    Waits for each: else leaves that are read ahead of the device would pile up in memory.
    """
    leaf = read(0)
    stack = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), leaf)
    for i in range(count):
        stack = jax.block_until_ready(_put(stack, leaf if i == 0 else read(i), jnp.int32(i)))
        leaf = None
    return stack
