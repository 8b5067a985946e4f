"""What adapters are named by, and which weights each of them changes.

A pair belongs to a linear module, or to the matrices of all experts of a layer. These have
transformers 5's names, which PEFT's `target_parameters` use: one pair an expert for gate and up
together, whichever way files keep the two. Where files keep experts one by one, PEFT has no name
for the gate, up and down of dense layers and shared experts: they have no adapters here either.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Stacks

# What files call the matrices of one expert -> the last names of their module and its parts.
OF_EXPERTS = {
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "w1": ("gate_up_proj", ("w1", "w3")),
    "down_proj": ("down_proj", ("down_proj",)),
    "w2": ("down_proj", ("w2",)),
}
MIXTRAL, MLP = ".block_sparse_moe.", ".mlp."
# PEFT refuses it, as kernels multiply by it without its module.
UNADAPTED = ".mamba.out_proj.weight"
# Unsloth's list: the default of get_peft_model, and what its notebooks pass to any model.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# One of these names that a model lacks -> its modules with that part: the whole list means them.
PARTS = {
    "q_proj": ("qkv_proj", "q_a_proj", "q_b_proj"),
    "k_proj": ("qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "v_proj": ("qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj", "c_fc"),
    "down_proj": ("c_proj",),
}
# What may stand for a fused module in a list of targets.
ALSO = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}


class Site(NamedTuple):
    """What one pair changes: `weights` lie one below another and have `heights` rows each."""

    weights: tuple[str, ...]
    heights: tuple[int, ...]
    width: int
    experts: int | None  # how many there are, where the pair is one of each
    layers: tuple[int, ...]  # () where it is in none

    @property
    def names(self) -> list[str]:
        """The module's number in each layer, "" outside of them."""
        return [str(i) for i in self.layers] or [""]


def sites(params: Params) -> dict[str, Site]:
    """Every module that can be adapted, by its path (`*` for the layer), in the tree's order."""
    flat, out = tree.flatten(params), {}
    for path, leaf in flat.items():
        stacked, shape = ".*." in path, shape_of(leaf)
        if path.count("*") == 2:
            node, _, last = path.removesuffix(".weight").rpartition(".*.")
            if path.endswith(".weight") and last in OF_EXPERTS:
                module, parts = OF_EXPERTS[last]
                paths = tuple(f"{node}.*.{part}.weight" for part in parts)
                heights = tuple(shape_of(flat[p])[-2] for p in paths)
                site = Site(paths, heights, shape[-1], shape[-3], _layers(leaf))
                out[f"{node.replace(MIXTRAL, MLP)}.{module}"] = site
        elif path.endswith(UNADAPTED):
            continue
        elif tree.of_linear(path) and len(shape) - stacked in (2, 3):
            experts = shape[-3] if len(shape) - stacked == 3 else None
            ids = _layers(leaf) if stacked else ()
            site = Site((path,), (shape[-2],), shape[-1], experts, ids)
            out[path.removesuffix(".weight")] = site
    if not any(path.count("*") == 2 for path in flat):
        return out
    return {path: site for path, site in out.items() if site.experts or not _moved(path)}


def _moved(path: str) -> bool:
    """Whether PEFT takes a linear module's name for its layer's experts', as in old files.

    Source: peft 0.21 `_convert_peft_config_moe`.
    """
    return path.rpartition(".")[2] in OF_EXPERTS | {"up_proj": (), "w3": ()}


def called(module: str) -> tuple[str, ...]:
    """A module's path and the others that name it in a list of targets."""
    owner, _, last = module.rpartition(".")
    others = ALSO.get(last, ()) if owner.endswith(".experts") else ()
    return (module, *(f"{owner}.{other}" for other in others))


# Names that are right for some families: a list may hold one that this model has no module of.
USUAL = (
    {*TARGETS, *OF_EXPERTS, "up_proj", "w3"}
    | {name for names in PARTS.values() for name in names}
    | {module for module, _ in OF_EXPERTS.values()}
)


class Named(NamedTuple):
    """Targets that are all there, the usual names that are not, and what stands for these."""

    targets: tuple[str, ...]
    absent: tuple[str, ...]
    instead: tuple[str, ...]


def named(params: Params, targets: Sequence[str]) -> Named:
    """A list of targets as modules of this model.

    Usual names that match nothing are left out, as in PEFT. Where all of `TARGETS` are listed,
    fused or factored projections that hold a missing one's part take its place.
    Raises ValueError for an unknown name, with the nearest ones, and where nothing matches.
    """
    names = {name for path, site in sites(params).items() for name in _full(path, site)}
    there = lambda target: target in names or any(map(tree.matcher((target,)), names))
    absent = tuple(t for t in dict.fromkeys(targets) if not there(t))
    wanted = {*TARGETS} <= {*targets}
    stand = [name for t in absent if wanted for name in PARTS.get(t, ()) if there(name)]
    instead = tuple(name for name in dict.fromkeys(stand) if name not in targets)
    found = (*(t for t in targets if t not in absent), *instead)
    unknown = [t for t in absent if t not in USUAL]
    if unknown or not found:
        modules = sorted({path.rpartition(".")[2] for path in sites(params)})
        near = {n for t in unknown or targets for n in _nearest(t, modules)}
        nearest = f"; nearest known: {sorted(near)}" if near else ""
        raise ValueError(
            f"target modules {unknown or [*targets]} match nothing{nearest}; there are {modules}"
        )
    return Named(found, absent, instead)


def _nearest(name: str, modules: Sequence[str]) -> list[str]:
    """A model's own modules for a usual name, else the known names spelled most alike."""
    own = [module for module in PARTS.get(name, ()) if module in modules]
    return own or difflib.get_close_matches(name.rpartition(".")[2], {*USUAL, *modules} - {name})


def _full(path: str, site: Site) -> list[str]:
    """Every full name that a module has in its layers."""
    return [name.replace("*", i, 1) for i in site.names for name in called(path)]


def shape_of(leaf: Any) -> tuple[int, ...]:
    """A leaf's shape, of its first part where it has several."""
    return leaf.parts[0].shape if isinstance(leaf, Stacks) else leaf.shape


def _layers(leaf: Any) -> tuple[int, ...]:
    if isinstance(leaf, Stacks):
        return tuple(sorted(i for ids in leaf.layers for i in ids))
    return tuple(range(leaf.shape[0]))


def layer_count(params: Params) -> int:
    """How many layers there are in all."""
    flat = tree.flatten(params)
    return max((max(_layers(x)) + 1 for p, x in flat.items() if ".*." in p), default=0)
