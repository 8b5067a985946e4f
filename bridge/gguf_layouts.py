"""A checkpoint's tensors of those that a GGUF file holds otherwise: experts, heads, factors."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from bridge.gguf_header import Tensor
from bridge.places import Place
from unsloth_jax import tree
from unsloth_jax.models import gemma

EXPERTS = ".experts."
# Architectures whose value heads stand in another order, and those whose norms are 1 above the
# weights but for the delta nets' own.
VALUES_APART = ("qwen35",)
NORMS_ABOVE = (*VALUES_APART, "qwen3next")
BY_VALUE_HEADS = ("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias")
BEHIND_KEYS = ("in_proj_qkv", "conv1d")  # values' rows come last


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As llama-quantize has a shape: without first axes of length one."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def one_by_one(
    found: Mapping[str, Place], stored: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """`stored` and `tensors` with each expert by itself, where the family's files have them so."""
    names, all_tensors = dict(stored), dict(tensors)
    for name, short in stored.items():
        owner, _, rest = name.partition(EXPERTS)
        if f"{owner}{EXPERTS}0.{rest}" not in found:
            continue
        del names[name]
        kind, (count, *shape), start, size = tensors[short]
        each = size // count
        for e in range(count):
            part = f"{short}[{e}]"
            names[f"{owner}{EXPERTS}{e}.{rest}"] = part
            all_tensors[part] = Tensor(kind, tuple(shape), start + e * each, each)
    return names, all_tensors


def cut(
    model: ModuleType, c: Any, found: Mapping[str, Place], stored: Mapping[str, str]
) -> dict[str, tuple[Place, tuple[str, ...]]]:
    """Name -> place and parts of tensors that the family's `gguf_parts` says it has in parts."""
    if not hasattr(model, "gguf_parts"):
        return {}
    parts = {name: tuple(model.gguf_parts(c, name, place.shape)) for name, place in found.items()}
    return {n: (found[n], some) for n, some in parts.items() if some and stored.keys() >= {*some}}


def joined(
    found: Mapping[str, Place], stored: Mapping[str, str]
) -> dict[str, tuple[Place, tuple[str, ...]]]:
    """Name -> place and parts, one below another, of tensors that the file holds in parts."""
    out = {}
    for name, place in found.items():
        owner, _, last = name.rpartition(".")
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        parts = tuple(f"{owner}.{one}.weight" for one in names)
        if place.path.endswith(tree.EXPERTS) and stored.keys() >= {*parts}:
            out[name] = place, parts
    return out


def weight(arch: str, c: Any, name: str, w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of a file's tensor; of A = -e^A_log the nearest to what gave it."""
    if name.endswith("A_log"):
        with np.errstate(invalid="ignore", divide="ignore"):  # the loader refuses what comes of it
            w = np.log(-np.float64(w)).astype(w.dtype)
    if arch in NORMS_ABOVE and name.endswith("norm.weight"):
        return w if name.endswith(".linear_attn.norm.weight") else w - w.dtype.type(gemma.OFFSET)
    if arch in VALUES_APART:
        w = _delta_net(c, name.split(".linear_attn.")[-1].removesuffix(".weight"), w)
    return w.reshape(shape)


def _delta_net(c: Any, module: str, w: np.ndarray) -> np.ndarray:
    """Rows of value heads [value of a key, key, ...] -> [key, value of it, ...]."""
    each = c.value_heads // c.key_heads

    def together(w: np.ndarray) -> np.ndarray:
        parts = w.reshape(each, c.key_heads, -1, *w.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(w.shape)

    if module == "out_proj":
        return np.ascontiguousarray(together(w.T).T)
    if module in BEHIND_KEYS:
        keys = 2 * c.key_heads * c.key_width
        return np.concatenate([w[:keys], together(w[keys:])])
    return together(w) if module in BY_VALUE_HEADS else w
