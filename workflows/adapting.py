"""What of a model is trained: pairs by any start, magnitudes, whole weights, all of them."""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bridge import modules_to_save, peft_adapter
from bridge.peft_adapter import Settings
from unsloth_jax import lora, tree
from unsloth_jax.leaves import Vacant
from unsloth_jax.lora import starts, trained
from unsloth_jax.lora.targets import sites
from workflows import vocabulary
from workflows.keywords import say, shown, typed
from workflows.model import Model

TABLES = (trained.EMBEDDING, trained.HEAD)
LOFTQ = {"loftq_bits": (4,), "loftq_iter": range(1, 101)}  # PEFT's LoftQConfig


def settings(
    model: Model,
    r: Any,
    targets: Sequence[str] | str,
    alpha: float | int,
    layers: Sequence[int] | int | None,
    last: int | None,
    saved: Sequence[str] | None,
    **other: Any,
) -> Settings:
    """The adapters that get_peft_model's keywords ask for; `other` are fields of `Settings`.

    Tables among the targets are trained whole, and those of a model with added tokens always are.
    Raises TypeError or ValueError for what means nothing.
    """
    _meaningful(alpha, targets)
    check_names("modules_to_save", saved)
    if not isinstance(targets, str):
        saved = [*(saved or ()), *(name for name in TABLES if name in targets)]
        targets = _named(model, [name for name in targets if name not in TABLES])
    return Settings(
        _rank(r, model.config), alpha, targets=targets,
        layers=_layers(layers, last, model.config.layers), saved=_saved(model, saved or ()),
        revision=_commit(model), **other,
    )  # fmt: skip


def _named(model: Model, targets: Sequence[str]) -> tuple[str, ...]:
    """The targets that the model has, told where these are not what was listed."""
    found = lora.named(model.params, targets)
    if found.absent:
        instead = f"; instead of them {', '.join(found.instead)}" if found.instead else ""
        absent = f"{model.source.config['model_type']} has no {', '.join(found.absent)}{instead}"
        say(f"target_modules: {absent}; adapted are {', '.join(found.targets)}")
    return found.targets


def _saved(model: Model, asked: Sequence[str]) -> tuple[str, ...]:
    """The modules to train whole, each once; a tied pair whole."""
    names = [*dict.fromkeys(asked)]
    was = model.source.config.get("vocab_size", model.config.vocab)
    if model.config.vocab != was and not set(TABLES) <= set(names):
        say(f"{' and '.join(TABLES)} are trained whole, since the vocabulary was resized")
        names = [*dict.fromkeys([*names, *TABLES])]
    if model.config.tied and trained.EMBEDDING in names and trained.HEAD not in names:
        names.append(trained.HEAD)
    return tuple(names)


def check_names(keyword: str, given: Any) -> None:
    """Raises TypeError unless it is None or a list of names."""
    several = isinstance(given, list | tuple | set | frozenset | None)
    if not several or not all(isinstance(name, str) for name in given or ()):
        raise TypeError(f"{keyword} must be a list of names, got {shown(given)}")


def with_experts(
    model: Model, targets: Sequence[str] | str, parameters: Sequence[str] | None
) -> Sequence[str] | str:
    """Targets with the experts' matrices that `target_parameters` name.

    Raises TypeError for what is no list of names, ValueError for a name that is no experts'.
    """
    check_names("target_parameters", parameters)
    if not parameters:
        return targets
    known = [path for path, site in sites(model.params).items() if site.experts]
    wrong = [p for p in parameters if not any(tree.matcher((p,))(path) for path in known)]
    if wrong:
        raise ValueError(f"target_parameters {wrong} name no experts' matrices; there are {known}")
    if isinstance(targets, str):
        found = lora.modules(model.params, targets)
        targets = [p.replace("*", str(i), 1) for p, ids in found.items() for i in ids or ("",)]
    return [*targets, *parameters]


def begin(model: Model, peft: Settings, seed: int, iterations: int = 1) -> None:
    """Gives the model what `peft` says is trained. Raises ValueError where that can't be.

    Weights that are trained whole leave `model.params`, where only their places stay.
    """
    if changed(model):
        raise ValueError(
            "the base lacks or holds changes of adapters that the model has no more: load it again"
        )
    embeddings = [p for p in lora.modules(model.params, peft.targets, peft.layers)
                  if p.endswith(trained.EMBEDDING)]  # fmt: skip
    if embeddings:
        raise ValueError(
            f"target_modules={peft.targets!r} names the embedding {embeddings}: pairs on it are "
            "not supported, name embed_tokens in a list or in modules_to_save to train it whole"
        )
    _check_experts(model, peft)
    if peft.dora and starts.changes_base(peft.start):
        raise ValueError(
            f"use_dora=True with init_lora_weights={peft.start!r} is not supported: such adapters "
            "belong to no checkpoint that PEFT could load"
        )
    begun = starts.begin(
        jax.random.key(seed), model.params, peft.rank, peft.targets, peft.layers, peft.start,
        scale=lora.scaling(peft.alpha, peft.rank, peft.rslora), dora=peft.dora,
        iterations=iterations,
    )  # fmt: skip
    whole = trained.init(begun.params, _owners(begun.params, peft.saved)) if peft.saved else {}
    lora.parts(own := _both(begun.adapters, whole))
    model.params, model.adapters = trained.vacated(begun.params, own), own
    model.initial, model.peft = begun.initial, peft


def _check_experts(model: Model, peft: Settings) -> None:
    """Raises ValueError for what adapters of experts don't know; nor does PEFT."""
    asked = {"use_dora": peft.dora, "lora_dropout": peft.dropout}
    wrong = [f"{name}={value!r}" for name, value in asked.items() if value]
    known, chosen = sites(model.params), lora.modules(model.params, peft.targets, peft.layers)
    experts = [path for path in chosen if known[path].experts]
    if wrong and experts:
        raise ValueError(
            f"{' and '.join(wrong)} is not supported for experts, here {experts}: leave it out, or "
            "name target_modules without them, such as 'all-linear'"
        )


def _owners(params: Any, saved: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules that PEFT would train for these names: all that end like one of them."""
    places = modules_to_save.named(params, saved, "get_peft_model")
    return tuple(dict.fromkeys(place.path.rpartition(".")[0] for place in places.values()))


def begin_whole(model: Model) -> None:
    """Every weight of the model is trained, in float32; raises ValueError for quantized ones."""
    model.adapters = trained.init(model.params, trained.EVERYTHING)
    model.params = trained.vacated(model.params, model.adapters)


def load(model: Model, folder: Path) -> None:
    """Takes a PEFT folder's adapters, with the vocabulary of the tables in it."""
    rows = peft_adapter.vocabulary(folder)
    if rows is not None and rows != model.config.vocab:
        vocabulary.resize(model, rows)
    model.adapters, model.peft = peft_adapter.load(folder, model.params)
    model.params, model.initial = trained.vacated(model.params, model.adapters), None


def of_rank(trainable: Any, rank: int) -> Any:
    """Shapes of a trainable tree whose pairs have another rank."""
    axes = {"a": -2, "b": -1}

    def changed(x, axis):
        shape = list(x.shape)
        shape[axis] = rank
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    def one(path, leaf):
        axis = axes.get(path.rpartition(".")[2])
        return leaf if axis is None else jax.tree.map(lambda x: changed(x, axis), leaf)

    return tree.map_paths(one, trainable)


def same(one: Settings, other: Settings) -> bool:
    """Whether two settings mean the same adapters; names in a list have no order."""
    return _meaning(one) == _meaning(other)


def _meaning(s: Settings) -> Settings:
    targets = s.targets if isinstance(s.targets, str) else tuple(sorted(s.targets))
    return s._replace(
        targets=targets, saved=tuple(sorted(s.saved)), base=None, revision=None, metadata={}
    )


def changed(model: Model) -> bool:
    """Whether weights have left the model's base for what is trained, or were changed by it."""
    gone = any(isinstance(x, Vacant) for x in tree.flatten(model.params).values())
    return gone or model.initial is not None


def loftq(given: Any) -> int:
    """LoftQ's iterations of PEFT's `loftq_config`, an object or a mapping; 1 without one.

    Raises ValueError for a setting that is not supported.
    """
    fields = dict(given if isinstance(given, Mapping) else vars(given)) if given else {}
    for name, value in fields.items():
        if value not in LOFTQ.get(name, ()):
            raise ValueError(
                f"get_peft_model: loftq_config={fields} is not supported yet; supported: {LOFTQ}"
            )
    return fields.get("loftq_iter", 1)


def _both(pairs: Any, whole: Any) -> Any:
    return tree.unflatten(tree.flatten(pairs) | tree.flatten(whole))


def _rank(r: Any, config: Any) -> int:
    """`r` as an int; a pair wider than the widest matrix holds nothing that a narrower can't."""
    if not isinstance(r, Integral) or isinstance(r, bool) or r < 1:
        raise TypeError(f"r must be a positive integer, got {shown(r)}")
    if r > (widest := max(config.width, config.mlp_width)):
        raise ValueError(f"r must be at most {widest}, the model's widest matrix, got {r}")
    return int(r)


def _meaningful(alpha: float | int, targets: Any) -> None:
    if alpha <= 0:
        raise ValueError(f"lora_alpha must be over 0, got {alpha!r}")
    if not isinstance(targets, str | list | tuple | set | frozenset):
        raise TypeError(f"target_modules must be names or a regex, got {targets!r}")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"target_modules {targets!r} is no regular expression: {error}"
            ) from None
    elif not all(isinstance(t, str) for t in targets):
        raise TypeError(f"target_modules must be names or a regex, got {targets!r}")


def _layers(
    chosen: Sequence[int] | int | None, last: int | None, count: int
) -> tuple[int, ...] | None:
    if chosen is not None and last is not None:
        raise ValueError("give layers_to_transform or finetune_last_n_layers, not both")
    if last is not None:
        typed("get_peft_model", {"finetune_last_n_layers": last}, {"finetune_last_n_layers": int})
        return tuple(range(count - max(1, min(last, count)), count))
    return None if chosen is None else tuple(sorted(np.atleast_1d(chosen).tolist()))


def _commit(model: Model) -> str | None:
    """The commit that the hub's cache holds the base under; None for a folder of the user's."""
    held = getattr(model.source, "folder", None)
    cached = held is not None and held.parent.name == "snapshots" and held != Path(model.name)
    return held.name if cached else None
