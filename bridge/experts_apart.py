"""Experts that a file holds one by one, under the family's names for all of a layer's.

bitsandbytes packs linear modules alone: transformers makes one of each expert's matrices first
(`SequentialLlama4TextExperts`), where other files of the family have one tensor of them all.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np

from bridge.places import Place, places
from bridge.source import Header, Source
from pallas_kernels import nf4
from unsloth_jax import tree
from unsloth_jax.quant.nf4 import NF4

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
Names = list[tuple[str, ...]]  # of each expert's parts, one below another


def whole(source: Source, model: ModuleType, c: Any) -> Source:
    """The checkpoint with such tensors put together; itself where it holds none."""
    headers, found = source.headers(), {}
    for name, place in places(model, c).items():
        if place.path.endswith(tree.EXPERTS) and name not in headers:
            each = _parts(name, place.shape[0])
            if all(part in headers for parts in each for part in parts):
                found[name] = place, each
    return Whole(source, headers, found) if found else source


def _parts(name: str, experts: int) -> Names:
    owner, _, last = name.rpartition(".")
    return [tuple(f"{owner}.{e}.{part}.weight" for part in PARTS[last]) for e in range(experts)]


class Whole:
    """A checkpoint some of whose tensors are put together of others."""

    def __init__(
        self,
        source: Any,
        headers: Mapping[str, Header],
        found: Mapping[str, tuple[Place, Names]],
    ):
        self.config = source.config
        self._source, self._headers, self._found = source, headers, found

    def headers(self) -> dict[str, Header]:
        """Every weight by its name; a format where all parts have the same."""
        used = {part for _, each in self._found.values() for parts in each for part in parts}
        out = {name: header for name, header in self._headers.items() if name not in used}
        for name, (place, each) in self._found.items():
            own = [[self._headers[part] for part in parts] for parts in each]
            formats = {header.format for parts in own for header in parts}
            format_ = formats.pop() if len(formats) == 1 else None
            out[name] = Header(_shape(own, place), own[0][0].dtype, format_)
        return out

    def read(self, name: str) -> np.ndarray:
        """One weight as a dense array in its header's dtype."""
        if name not in self._found:
            return self._source.read(name)
        place, each = self._found[name]
        read = self._source.read
        return place.oriented(np.stack([np.concatenate([*map(read, parts)]) for parts in each]))

    def read_quantized(self, name: str) -> Any:
        """The quantized leaf of a weight, [E, O, I] where it is put together."""
        read = self._source.read_quantized
        if name not in self._found:
            return read(name)
        leaves = [_joined(name, [*map(read, parts)]) for parts in self._found[name][1]]
        return jax.tree.map(lambda *fields: np.stack(fields), *leaves)


def _shape(own: list[list[Header]], place: Place) -> tuple[int, ...]:
    """As the family's files have it; () where parts don't fit together, which fits no config."""
    shapes = {tuple(header.shape for header in parts) for parts in own}
    parts = shapes.pop()
    if shapes or any(len(shape) != 2 or shape[1] != parts[0][1] for shape in parts):
        return ()
    matrix = sum(height for height, _ in parts), parts[0][1]
    return (len(own), *(matrix[::-1] if place.swapped else matrix))


def _joined(name: str, parts: list[Any]) -> Any:
    """One leaf of matrices below one another, of the same values."""
    if len(parts) == 1:
        return parts[0]
    plain = [_plain(part) if isinstance(part, NF4) else part for part in parts]
    if isinstance(plain[0], NF4):
        (rows, width), block = plain[0].matrix, plain[0].block
        if rows * width % block:
            raise ValueError(
                f"{name}: parts of {rows} x {width} can't be put together in blocks of {block}; "
                "load with load_in_4bit=False"
            )
        height = sum(part.matrix[0] for part in plain)
        plain = [part.replace(matrix=(height, width)) for part in plain]
    return jax.tree.map(lambda *fields: np.concatenate(fields), *plain)


def _plain(leaf: NF4) -> NF4:
    """The leaf with float32 statistics: nested ones are about one matrix each."""
    if leaf.nested_absmax is None:
        return leaf
    absmax = np.asarray(nf4.unnest(leaf.statistics, leaf.nested_block))
    return leaf.replace(absmax=absmax, nested_absmax=None, nested_map=None, offset=None)
