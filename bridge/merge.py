"""Base plus adapters, one weight at a time on the host, in float32."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bridge.places import Place, places
from bridge.safetensors_file import Weight
from bridge.source import Source
from unsloth_jax import leaves, lora, quant, tree
from unsloth_jax.dims import Params
from unsloth_jax.lora.targets import Site, sites

ORIGINAL, DEQUANTIZED = "original16", "dequant4"
DEQUANTIZED8 = "dequant8"  # what DEQUANTIZED is where the weights trained on are int8
CHECKPOINT = "checkpoint"  # what ORIGINAL is where the checkpoint's own weights are blocks
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Merged(NamedTuple):
    """Every weight of the merged model in Hugging Face's order, and what it was added to."""

    weights: list[Weight]
    base: str
    adapted: frozenset[str]
    facts: dict[str, Any]
    norms: dict[str, "Norms"]  # of every adapted weight that was read

    def rounding(self) -> float | None:
        """||what rounding changed|| / ||delta|| over all that was read, None without a delta."""
        read = self.norms.values()
        delta = math.hypot(*(n.delta for n in read))
        return math.hypot(*(n.lost for n in read)) / delta if delta else None


class Norms(NamedTuple):
    """Of one merged weight: its delta, and what rounding to the output's dtype took."""

    delta: float
    lost: float


class Pair(NamedTuple):
    """One layer's adapter on the host."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None  # DoRA's, one number a row

    def delta(self, w: np.ndarray) -> np.ndarray:
        """What it adds to w, float32: scale * b @ a, or what gives rows of this magnitude."""
        delta = np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))
        if self.magnitude is None:
            return delta
        w = w.astype(np.float32)
        merged = w + delta
        gain = self.magnitude / np.linalg.norm(merged, axis=1)
        return gain[:, None] * merged - w


def pairs(adapters: Params | None, scale: float, params: Params) -> dict[str, Pair]:
    """Every adapter by the full name of the weight of `params` that it belongs to."""
    own, out = lora.parts(adapters or {})[0], {}
    known = sites(params) if own else {}
    for path in (p.removesuffix(".a") for p in own if p.endswith(".a")):
        sides = [own.get(f"{path}.{side}") for side in ("a", "b", "magnitude")]
        if path not in known:
            raise ValueError(f"adapters of {path} belong to no weight of the model")
        for i in _numbers(sides[0]) if ".*." in path else (None,):
            here = [x if x is None or i is None else leaves.layer(x, i) for x in sides]
            a, b, magnitude = (x if x is None else np.asarray(x) for x in here)
            pair = Pair(a, b, scale, magnitude)
            out |= _of_weights(known[path], pair, i)
    return out


def _numbers(leaf: Any) -> list[int]:
    if isinstance(leaf, leaves.Stacks):
        return [i for ids in leaf.layers for i in ids]
    return [*range(leaf.shape[0])]


def _of_weights(site: Site, pair: Pair, layer: int | None) -> dict[str, Pair]:
    """The pair's part of each of the site's weights in one layer, and of each expert's."""
    out, at = {}, 0
    for path, height in zip(site.weights, site.heights, strict=True):
        part = pair._replace(b=pair.b[..., at : at + height, :])
        at += height
        name = path if layer is None else path.replace("*", str(layer), 1)
        if "*" not in name:
            out[name] = part
            continue
        for e in range(site.experts):
            out[name.replace("*", str(e))] = part._replace(a=part.a[e], b=part.b[e])
    return out


def merged(
    model: ModuleType,
    c: Any,
    params: Params,
    adapters: Params | None,
    scale: float,
    source: Source | None,
    dtype: str | None = None,
    base: str = ORIGINAL,
    initial: Params | None = None,
) -> Merged:
    """cast(W + what its adapter adds) of every weight, or cast(W as trained), made when read.

    `base="original16"` takes W from the checkpoint where `source` holds it in 16 or 32 bits, or in
    the blocks of a quantized GGUF (then `base` of the result is "checkpoint"), whatever `params`
    made of it. "dequant4" (and bitsandbytes' 4-bit checkpoints), "dequant8" for int8, takes every
    weight that `params` hold quantized from there, adapted or not. `dtype` None keeps 16-bit
    weights as they are and turns float32 into bfloat16; what balances experts keeps its own in any
    case. `initial` holds the pairs that were taken out of `params` before training: the checkpoint
    gets the difference to them. Raises ValueError for an unknown base or an adapter that belongs
    to no weight, and while reading for a result not finite.
    """
    trained_on = dequantized(params)
    if base not in (ORIGINAL, trained_on):
        raise ValueError(f"base must be one of {[ORIGINAL, trained_on]}, got {base!r}")
    flat, deltas = tree.flatten(params), pairs(adapters, scale, params)
    whole = lora.parts(adapters or {})[1]
    where = places(model, c)
    if lost := sorted(set(deltas) - set(where)):
        raise ValueError(f"adapters of {lost} belong to no weight of the model")
    headers = source.headers() if source is not None else {}
    small = lambda name: name in headers and headers[name].format is not None
    at_hand = base == ORIGINAL and all(n in headers and not small(n) for n in deltas)
    if at_hand and initial is not None:
        deltas = pairs(lora.difference(adapters, initial), scale, params)

    trained = {name for name, place in where.items() if place.path in whole}
    packed = {n for n, p in where.items() if not at_hand and _packed(flat[p.path], p.layer)}
    ours = trained | packed | {n for n in where if not at_hand and (n in deltas or small(n))}

    def original(name: str) -> np.ndarray:
        place = where[name]
        # A resized table is no longer the checkpoint's.
        kept = name in headers and headers[name].shape == place.shape
        if kept and name not in ours:
            return place.oriented(source.read(name))
        return held((whole if name in trained else flat)[place.path], place)

    weights, norms = [], {}
    for name in sorted(where):
        stored = headers[name].dtype if name in headers else None
        kind = DTYPES[dtype or _sixteen(stored or "bfloat16")]
        if tree.of_correction(name):
            kind = DTYPES[stored or held(flat[where[name].path], where[name]).dtype.name]
        read = _reader(name, original, deltas.get(name), kind, norms)
        weights.append(Weight(name, where[name].shape, kind, where[name].turned(read)))
    blocks = sorted({headers[n].blocks for n in deltas if n in headers} - {None})
    used = (CHECKPOINT if blocks else ORIGINAL) if at_hand else trained_on
    facts = _facts(used, blocks, len(deltas), len(trained), scale, len(packed - trained))
    return Merged(weights, facts["base"], frozenset(deltas) | trained, facts, norms)


def _packed(leaf: Any, layer: int | None) -> bool:
    """Whether the leaf holds this layer quantized."""
    if not isinstance(leaf, leaves.Stacks):
        return isinstance(leaf, leaves.Quantized)
    both = zip(leaf.parts, leaf.layers, strict=True)
    return any(layer in ids and isinstance(part, leaves.Quantized) for part, ids in both)


def dequantized(params: Params) -> str:
    """What the base is called where it is the weights that were trained on."""
    return DEQUANTIZED8 if quant.stored(params) == "int8" else DEQUANTIZED


def _facts(
    used: str, blocks: list[str], adapted: int, trained: int, scale: float, packed: int
) -> dict:
    facts = {"base": used, "adapted": adapted, "scale": scale}
    facts |= {k: n for k, n in {"trained": trained, "dequantized": packed}.items() if n}
    return facts | ({"base_blocks": blocks} if used == CHECKPOINT else {})


def _sixteen(dtype: str) -> str:
    return dtype if dtype in ("float16", "bfloat16") else "bfloat16"


def held(leaf: Any, place: Place) -> np.ndarray:
    """One weight of the parameter tree, dequantized, on the host."""
    return np.asarray(leaves.dense(place.pick(leaf)))


def _reader(
    name: str, read: Callable, pair: Pair | None, dtype: np.dtype, norms: dict[str, Norms]
) -> Callable[[], np.ndarray]:
    def value() -> np.ndarray:
        w = read(name)
        if pair is None:
            return w if w.dtype == dtype else w.astype(dtype)
        delta = pair.delta(w)
        exact = w.astype(np.float32) + delta
        out = exact.astype(dtype)
        if not np.isfinite(out).all():
            raise ValueError(f"merging {name} into {dtype} gives values that are not finite")
        exact -= out.astype(np.float32)
        norms[name] = Norms(float(np.linalg.norm(delta)), float(np.linalg.norm(exact)))
        return out

    return value


def distances(
    model: ModuleType,
    c: Any,
    params: Params,
    adapters: Params | None,
    scale: float,
    source: Source,
    initial: Params | None = None,
) -> dict[str, float]:
    """||W - dequant(W4)|| / ||delta|| of every adapted weight that the checkpoint has otherwise.

    W4 counts with the pairs that were taken out of it. Deltas of zero are left out. Large values
    mean that the adapter was trained on weights unlike those it is added to.
    """
    flat, headers, out = tree.flatten(params), source.headers(), {}
    where = places(model, c)
    began = pairs(initial, scale, params)
    adapters = adapters if initial is None else lora.difference(adapters, initial)
    for name, pair in pairs(adapters, scale, params).items():
        if name in headers and headers[name].format is None:
            w = where[name].oriented(source.read(name))
            trained_on = held(flat[where[name].path], where[name]).astype(np.float32)
            trained_on = trained_on + (began[name].delta(trained_on) if began else 0)
            gap = w.astype(np.float32) - trained_on
            size = float(np.linalg.norm(pair.delta(w)))
            out |= {name: float(np.linalg.norm(gap)) / size} if size else {}
    return out
