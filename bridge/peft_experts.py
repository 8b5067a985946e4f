"""Pairs of all experts of a layer, as PEFT's `target_parameters` has them.

One pair holds all experts': A [E r, in], B [out, r E]. Source: peft 0.21 `ParamWrapper`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from unsloth_jax import tree
from unsloth_jax.lora.targets import called

ENDS = (".experts", ".experts.base_layer")  # of the keys
# Owners whose matrices transformers keeps as [E, in, out] without the mark that tells PEFT so: it
# takes them for [E, out, in], and its A and B are the transposes of the pair's b and a.
MIRRORED = ("feed_forward.experts",)


def modules(pairs: Mapping[str, Any]) -> list[str]:
    """The modules among flat pairs whose pairs are one an expert."""
    ends = tuple(f"{name}.a" for name in tree.EXPERTS)
    return [path.removesuffix(".a") for path in pairs if path.endswith(ends)]


def parameters(paths: Collection[str], targets: Collection[str] | str) -> list[str]:
    """The names of `target_parameters` for experts' modules: of some layers where these are named.

    A name without a layer stands for all, so it goes where any target means all of them.
    """
    out, listed = set(), () if isinstance(targets, str) else targets
    for path in paths:
        name = ".".join(path.split(".")[-3:])
        some = {t for t in listed if t.endswith("." + name)}
        tests = [tree.matcher((t,)) for t in listed if t not in some]
        out |= {name} if not some or any(test(n) for test in tests for n in called(path)) else some
    return sorted(out)


def mirrored(module: str) -> bool:
    """Whether PEFT's A belongs to the outputs of a module and its B to the inputs."""
    return _owner(module).endswith(MIRRORED)


def both(found: Collection[str], module: str) -> bool:
    """Whether `module` of `found` is one of two that belong to the same experts."""
    return sum(_owner(other) == _owner(module) for other in found) > 1


def key(name: str, both: bool) -> str:
    """Where PEFT keeps a pair: it wraps the experts once for each adapted matrix."""
    return _owner(name) + (".base_layer" if both and name.endswith("gate_up_proj") else "")


def _owner(module: str) -> str:
    return module.rpartition(".")[0]


def laid(module: str, side: str, x: np.ndarray) -> tuple[np.ndarray, str]:
    """(PEFT's matrix, "a" for its A or "b") of one side of a layer's pairs [E, r, I], [E, O, r]."""
    if mirrored(module):
        side, x = _other(side), x.swapaxes(1, 2)
    return LAID[side](x), side


def read(module: str, side: str, take: Callable[[str], np.ndarray], experts: int) -> np.ndarray:
    """One side of a layer's pairs, of PEFT's matrices `take("a")`, its A, and `take("b")`."""
    if mirrored(module):
        return READ[_other(side)](take(_other(side)), experts).swapaxes(1, 2)
    return READ[side](take(side), experts)


def _other(side: str) -> str:
    return {"a": "b", "b": "a"}[side]


# A layer's pairs of all experts, [E, r, I] and [E, O, r], as PEFT has them, and back.
LAID = {
    "a": lambda x: x.reshape(-1, x.shape[-1]),
    "b": lambda x: np.ascontiguousarray(x.transpose(1, 2, 0)).reshape(x.shape[1], -1),
}
READ = {
    "a": lambda x, count: x.reshape(count, -1, x.shape[-1]),
    "b": lambda x, count: x.reshape(x.shape[0], -1, count).transpose(2, 0, 1),
}
