"""Experts in GGUF: one tensor of all of a layer's, and what counts them.

Source: llama.cpp's conversion/qwen.py and llama.py (`modify_tensors`), gguf's `size_label`.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import gguf
import numpy as np

from bridge.places import Place
from bridge.safetensors_file import Weight
from unsloth_jax import tree
from unsloth_jax.dims import Parts

MARK = "_exps."  # in llama.cpp's names of such tensors
# How the end of a name is spelt in Hugging Face's files, and where llama.cpp's converter looks.
CORRECTION = ("e_score_correction_bias", "e_score_correction.bias")


def merged(
    weights: Iterable[Weight], found: Mapping[str, Place], parts_of: Callable[[Weight], Parts]
) -> list[Weight]:
    """The weights in the converter's order: sorted, a layer's experts stacked where they end.

    `parts_of` a weight are the tensors that the family's files hold instead of it, or none.
    """
    ordered = sorted(weights, key=lambda w: w.name)
    last = {found[w.name].layer: w.name for w in ordered if found[w.name].expert is not None}
    out: list[Weight] = []
    parts: dict[str, dict[int, Weight]] = {}
    for w in ordered:
        place = found[w.name]
        if place.expert is None:
            alone = [w] if not place.path.endswith(tree.EXPERTS) else None
            out += _cut(w, parts_of(w)) or alone or _apart(w, place)
            continue
        name = place.path.replace("*", str(place.layer), 1).replace(".*.", ".")
        parts.setdefault(name, {})[place.expert] = w
        if w.name == last[place.layer]:
            out += [_stacked(name, parts[name]) for name in sorted(parts)]
            parts = {}
    return out


def _cut(w: Weight, parts: Parts) -> list[Weight]:
    def one(name: str) -> Weight:
        shape, part = parts[name]
        read = lambda: np.ascontiguousarray(part(np.asarray(w.read())))
        return Weight(name, shape, w.dtype, read)

    return [one(name) for name in parts]


def _apart(w: Weight, place: Place) -> list[Weight]:
    """All experts' matrices with their outputs as rows, gate and up each by themselves."""
    owner, _, last = w.name.rpartition(".")
    names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    count, width, height = w.shape if place.swapped else (w.shape[0], *w.shape[:0:-1])
    rows = height // len(names)

    def one(n: int) -> Weight:
        read = lambda: np.ascontiguousarray(place.oriented(w.read())[:, n * rows : (n + 1) * rows])
        return Weight(f"{owner}.{names[n]}.weight", (count, rows, width), w.dtype, read)

    return [one(n) for n in range(len(names))]


def _stacked(name: str, parts: Mapping[int, Weight]) -> Weight:
    each = [parts[e] for e in sorted(parts)]
    read = lambda: np.stack([w.read() for w in each])
    return Weight(name, (len(each), *each[0].shape), each[0].dtype, read)


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The converter's word for the model's size, such as 8x7B, from its tensors' shapes."""
    total = sum(map(math.prod, shapes.values()))
    # It takes experts' biases for shared.
    each = {name: shape for name, shape in shapes.items() if MARK in name and len(shape) > 2}
    alone = sum(math.prod(shape) // shape[0] for shape in each.values())
    shared = total - sum(map(math.prod, each.values()))
    count = sum(shape[0] for shape in each.values()) // len(each) if each else 0
    return gguf.size_label(total, shared, alone, count)
