"""Weights that were trained as they are, in PEFT's adapter folders: its `modules_to_save`.

Names: peft 0.21 `ModulesToSaveWrapper`, `get_peft_model_state_dict`. A tied head is written
beside the embedding, so that PEFT, which unties them, has the same in both.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unsloth_jax import tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Stacks, layer

PREFIX = "base_model.model."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Place(NamedTuple):
    """Where a weight stands in a tree, and in which layer of its stack (None outside them)."""

    path: str
    layer: int | None
    shape: tuple[int, ...]


def _places(flat: Mapping[str, Any]) -> dict[str, Place]:
    """Every weight and bias by its full name."""
    out = {}
    for path, leaf in flat.items():
        stacked, part = ".*." in path, leaf.parts[0] if isinstance(leaf, Stacks) else leaf
        count = sum(map(len, leaf.layers)) if isinstance(leaf, Stacks) else leaf.shape[0]
        for i in range(count) if stacked else (None,):
            name = path if i is None else path.replace("*", str(i), 1)
            out[name] = Place(path, i, tuple(part.shape[1:] if stacked else part.shape))
    return out


def _owns(module: str, name: str) -> bool:
    """PEFT's rule: a module whose name ends like this, and all inside it."""
    words = name.split(".")
    return any(".".join(words[:n]).endswith(module) for n in range(1, len(words)))


def tensors(trained: Mapping[str, Any], saved: Sequence[str]) -> dict[str, np.ndarray]:
    """Trained weights (by path) by PEFT's names, float32.

    Raises ValueError where they are not what `saved` names, or not finite.
    """
    places = _places(trained)
    tied = HEAD not in trained and EMBEDDING in trained and "lm_head" in saved
    strays = [name for name in places if not any(_owns(module, name) for module in saved)]
    absent = [m for m in saved if not any(_owns(m, name) for name in places)]
    if strays or absent != ["lm_head"] * tied:
        raise ValueError(
            f"modules_to_save={[*saved]} name {absent or 'modules'} that were not trained, and "
            f"{strays[:10] or 'nothing'} was trained beside them"
        )
    out = {}
    for name, (path, i, _) in places.items():
        value = trained[path] if i is None else layer(trained[path], i)
        out[f"{PREFIX}{name}"] = np.array(value, np.float32, order="C")
    if tied:
        out[f"{PREFIX}{HEAD}"] = out[f"{PREFIX}{EMBEDDING}"].copy()
    wrong = [name for name, value in out.items() if not np.isfinite(value).all()]
    if wrong:
        raise ValueError(f"trained values are not finite in {wrong[:10]}")
    return out


def listed(fields: Mapping[str, Any], params: Params) -> tuple[str, ...]:
    """modules_to_save of a config, with the tied head that `ensure_weight_tying` leaves unsaid."""
    saved = tuple(fields.get("modules_to_save") or ())
    both = fields.get("ensure_weight_tying") and HEAD not in tree.flatten(params)
    unsaid = both and "lm_head" not in saved and any(_owns(m, EMBEDDING) for m in saved)
    return (*saved, "lm_head") if unsaid else saved


def named(params: Params, saved: Sequence[str], where: str) -> dict[str, Place]:
    """Full name of each weight that modules_to_save names -> its place.

    Raises ValueError for a module that is not there, for some layers of a stack without the
    others, and for one half of a tied pair.
    """
    flat = tree.flatten(params)
    places, tied = _places(flat), HEAD not in flat
    if tied:
        places |= {HEAD: places[EMBEDDING]}
    out = {name: p for name, p in places.items() if any(_owns(m, name) for m in saved)}
    absent = [m for m in saved if not any(_owns(m, name) for name in out)]
    if absent:
        raise ValueError(f"{where}: modules_to_save={[*saved]}: there is no module {absent}")
    if tied and (HEAD in out) != (EMBEDDING in out):
        raise ValueError(
            f"{where}: modules_to_save={[*saved]} trains one of embedding and head, which are one "
            "matrix in this model; expected both or neither"
        )
    chosen = {p.path for p in out.values()}
    torn = sorted(n for n, p in places.items() if p.path in chosen and n not in out)
    if torn:
        raise ValueError(
            f"{where}: modules_to_save={[*saved]} leaves {torn[:10]} out; a stack is trained whole"
        )
    return out


def arrays(
    values: Mapping[str, np.ndarray], places: Mapping[str, Place], where: str
) -> dict[str, Any]:
    """The trained weights by path, float32, stacked.

    Raises ValueError for a tied head that differs from its embedding.
    """
    read = lambda name: values[f"{PREFIX}{name}"].astype(np.float32)
    by_path: dict[str, dict[int | None, np.ndarray]] = {}
    for name, (path, i, _) in places.items():
        by_path.setdefault(path, {}).setdefault(i, read(name))
        if not np.array_equal(by_path[path][i], read(name)):
            raise ValueError(
                f"{where}: {HEAD} differs from {EMBEDDING}, which are one matrix in this model"
            )
    stack = lambda xs: xs[None] if None in xs else np.stack([xs[i] for i in sorted(xs)])
    return {path: jnp.asarray(stack(xs)) for path, xs in by_path.items()}
