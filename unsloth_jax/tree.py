"""Parameter trees addressed by dotted path, `*` standing for the layer number."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from unsloth_jax.dims import Params


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": leaf}}` -> `{"a.b": leaf}`. Anything that is not a dict is a leaf."""
    flat = {}
    for key, node in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(node, f"{path}.") if isinstance(node, dict) else {path: node})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_paths(fn: Callable[[str, Any], Any], tree: Params) -> Params:
    """`fn(path, leaf)` for every leaf, in a tree of the same shape."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def matcher(targets: tuple[str, ...] | str) -> Callable[[str], bool]:
    """A test of module paths (`...self_attn.q_proj`) in PEFT's sense.

    A tuple matches modules whose last dotted names equal an entry; a string is a regular
    expression that must match the whole path. Source: peft `LoraConfig.target_modules`.
    """
    if isinstance(targets, str):
        whole = re.compile(targets)
        return lambda path: whole.fullmatch(path) is not None
    ending = re.compile(rf"(^|\.)({'|'.join(map(re.escape, targets))})$")
    return lambda path: ending.search(path) is not None


def of_norm(path: str) -> bool:
    """Whether a weight belongs to a norm: some are tables [heads, head width] like a matrix."""
    return path.split(".")[-2].endswith("norm")


# Matrices that are no linear module's in transformers 5: what sends tokens to experts.
ROUTERS = ("gate", "router")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def of_router(path: str) -> bool:
    """Whether a weight decides which experts a token goes to: these stay in float32."""
    return path.split(".")[-2] in ROUTERS


def of_correction(path: str) -> bool:
    """Whether a weight balances experts: no gradient trains it, and files have it in float32."""
    return path.endswith(".e_score_correction_bias")


def of_linear(path: str) -> bool:
    """Whether a path is a linear module's weight or all experts' matrices in one."""
    if path.endswith(".weight"):
        convolution = path.split(".")[-2] == "conv1d"
        return not (convolution or of_norm(path) or of_router(path))
    return path.endswith(EXPERTS)
