"""Which tensor of a checkpoint is which part of the parameter tree."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from unsloth_jax import leaves
from unsloth_jax.models import layers_of


class Place(NamedTuple):
    """One tensor of a file: a whole leaf, a layer of one, or one expert of a layer."""

    path: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]  # as files have it
    swapped: bool = False  # whether files hold the last two axes the other way round

    def oriented(self, value: np.ndarray) -> np.ndarray:
        """From a file's orientation to [..., out, in], or back."""
        return np.ascontiguousarray(value.swapaxes(-1, -2)) if self.swapped else value

    def turned(self, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        """The same values in a file's orientation."""
        return (lambda: self.oriented(read())) if self.swapped else read

    def pick(self, leaf: Any) -> Any:
        """This tensor's part of the leaf at its path."""
        for i in (self.layer, self.expert):
            leaf = leaf if i is None else leaves.layer(leaf, i)
        return leaf


def of_path(model: ModuleType, c: Any, path: str) -> dict[str, Place]:
    """Name -> place of every tensor at one path of `model.weights(c)`, in the leaf's order."""
    shape, _ = model.weights(c)[path]
    swapped = path in getattr(model, "TRANSPOSED", ())
    experts = range(shape[0]) if path.count("*") == 2 else [None]
    shape = shape if experts == [None] else shape[1:]
    shape = (*shape[:-2], shape[-1], shape[-2]) if swapped else shape
    out = {}
    for i in layers_of(model, c, path) or [None]:
        for e in experts:
            name = path
            for number in (i, e):
                name = name if number is None else name.replace("*", str(number), 1)
            out[name] = Place(path, i, e, shape, swapped)
    return out


def places(model: ModuleType, c: Any) -> dict[str, Place]:
    """Name -> place of every tensor of a checkpoint of this config."""
    return {name: p for path in model.weights(c) for name, p in of_path(model, c, path).items()}
